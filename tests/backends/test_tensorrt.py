"""The host half of the tensorrt backend and the graphs that engines are built from, against eager: the graphs run in onnxruntime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.export.packages import CONFIGS, greedy, packed, prompt, query, relative  # skips without torch, onnx, onnxruntime

# isort: split
from rsvlm_infer import backends
from rsvlm_infer.backends import cuda_memory, tensorrt
from rsvlm_infer.backends.base import ImageFeatures
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.backends.onnx import OnnxHandle, tile_calls
from rsvlm_infer.backends.tensorrt import TensorrtBackend, engine_entries
from rsvlm_infer.errors import BackendError, InputError, MissingDependencyError
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.package import Package
from tests.backends.engine_packages import CHIP, HostDriver, HostTensorrt, OrtRunner, engineless_package, tiny_checkpoint

PARITY = 1e-5  # fp32 through up to four blocks, other orders of sums
# 11 bits of every operand and of the cache, through up to four blocks and logits of random weights
HALF = 2e-2
CONTEXT = 384
SIZES = [(90, 130), (150, 33), (32, 32)]
GENERATIVE = [name for name, config in CONFIGS.items() if config.language is not None]


@dataclass(frozen=True)
class Made:
    package: Package
    eager: EagerBackend
    engines: TensorrtBackend
    runner: OrtRunner


Get = Callable[..., Made]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """By name of `CONFIGS` and precision."""
    known: dict[tuple[str, str], Made] = {}

    def get(name: str, precision: str = "fp32") -> Made:
        if (name, precision) not in known:
            folder = tmp_path_factory.mktemp(f"{name}-{precision}")
            checkpoint = tiny_checkpoint(folder, CONFIGS[name])
            package = Package.open(engineless_package(checkpoint, folder / "package", precision, CONTEXT))
            package.verify()
            runner = OrtRunner(package)
            knowledge = None if package.knowledge_folder is None else KnowledgeBase.load(package.knowledge_folder)
            engines = TensorrtBackend(package, runner, CHIP, knowledge)
            known[name, precision] = Made(package, EagerBackend.load(checkpoint, "float32"), engines, runner)
        return known[name, precision]

    return get


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_scenes(made: Get, name: str, precision: str) -> None:
    """Taps, class tokens, embeddings and visual tokens, with and without a query."""
    each, limit = made(name, precision), PARITY if precision == "fp32" else HALF
    config = CONFIGS[name]
    scenes = [packed(config, *size) for size in SIZES]
    taps, class_tokens, _, _ = each.eager._encode_tiles(scenes)
    found = each.engines.encode_tiles(scenes)
    for level, tap in enumerate(("tap_object", "tap_region", "tap_scene")):
        assert relative(np.concatenate([part[tap] for part in found]), taps[level]) < limit
    if config.vision.class_token:
        assert relative(np.concatenate([part["class_tokens"] for part in found]), class_tokens[2]) < limit
    for words in (0, 4) if config.augmentation is not None else (None,):
        for scene in scenes:
            asked = None if words is None else [query(each.eager, words)]
            (expected,), (engine,) = each.eager.encode([scene], asked), each.engines.encode([scene], asked)
            assert (engine.num_tokens, engine.cues) == (expected.num_tokens, expected.cues)
            if precision == "fp16":
                continue  # which patches are salient and which cues are best may turn on half a bit of random features
            if config.language is not None:
                assert relative(engine.handle.tokens, expected.handle.tokens) < limit
            if config.alignment is not None:
                for level in ("object", "region", "scene"):
                    assert (
                        relative(getattr(engine.handle.embeddings, level), getattr(expected.handle.embeddings, level)) < limit
                    )


@pytest.mark.parametrize("name", GENERATIVE)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_prefill_decode_and_keep(made: Get, name: str, precision: str) -> None:
    each, limit = made(name, precision), PARITY if precision == "fp32" else HALF
    scenes = [packed(CONFIGS[name], *size) for size in SIZES]
    texts = [[5, 6, 7], [8], [9, 10]]
    features = each.eager.encode(scenes)
    expected = [prompt(image, text) for image, text in zip(features, texts, strict=True)]
    # the same visual tokens, so that only the decoder differs
    found = [dataclasses.replace(one, images=(host_features(one.images[0]),)) for one in expected]
    capacity = max(len(one.token_ids) for one in found) + 6
    eager_logits, eager_cache = each.eager.prefill(expected, capacity)
    logits, cache = each.engines.prefill(found, capacity)
    assert relative(logits, eager_logits) < limit
    for step in range(5):
        if step == 2:  # a row leaves, the others change places, one is there twice
            eager_cache, cache = each.eager.keep(eager_cache, [2, 0, 2]), each.engines.keep(cache, [2, 0, 2])
            eager_logits = eager_logits[[2, 0, 2]]
        chosen = eager_logits.argmax(axis=1).astype(np.int32)
        eager_logits, logits = each.eager.decode(eager_cache, chosen), each.engines.decode(cache, chosen)
        assert relative(logits, eager_logits) < limit, step
    if precision == "fp32":
        assert greedy(each.engines, found, 8) == greedy(each.eager, expected, 8)


def host_features(features: ImageFeatures) -> ImageFeatures:
    """Eager's visual tokens as this backend keeps them."""
    tokens = features.handle.tokens.numpy()
    return ImageFeatures(OnnxHandle(tokens, None), len(tokens))


@pytest.mark.parametrize("name", ["full", "augmented", "retrieval", "clip_2021"])
def test_text_embeddings(made: Get, name: str) -> None:
    each = made(name)
    end = 69 if CONFIGS[name].text_encoder is not None else 60
    ids = [np.array([*range(3, 3 + words), end], np.int32) for words in (1, 7, 3)]
    assert relative(each.engines.embed_text(ids), each.eager.embed_text(ids)) < PARITY


@pytest.mark.parametrize(("patches", "bucket"), [(1, 0), (4, 0), (5, 1), (16, 1), (32, 2), (64, 2)])
def test_tiles_go_to_the_bucket_of_their_length(made: Get, patches: int, bucket: int) -> None:
    """The tiny config plans tiles of 4, 16 and 64 patches, and what edges leave of them."""
    each = made("full")
    each.runner.profiles.clear()
    width = 3 * CONFIGS["full"].vision.patch_size ** 2
    sizes = np.array([[1, patches]] * 3, np.int32)
    cu_seqlens = np.arange(4, dtype=np.int32) * patches
    each.engines._run(
        "vision", {"patches": np.zeros((3 * patches, width), np.float32), "cu_seqlens": cu_seqlens, "grids": sizes}
    )
    assert each.runner.profiles == {"vision": {bucket}}


def test_prompts_and_steps_have_their_own_buckets(made: Get) -> None:
    each = made("full")
    features = each.engines.encode([packed(CONFIGS["full"], 90, 130)])
    each.runner.profiles.clear()
    _, cache = each.engines.prefill([prompt(features[0], [4, 5])], 200)
    assert each.runner.profiles["decoder"] == {2 if cache.lengths[0] > 128 else 1}
    each.engines.decode(cache, np.array([7], np.int32))
    assert 0 in each.runner.profiles["decoder"]


def test_what_engines_do_not_take_is_refused(made: Get) -> None:
    each = made("full")
    image = each.engines.encode([packed(CONFIGS["full"], 32, 32)])[0]
    one = prompt(image, [4, 5])
    with pytest.raises(InputError, match=r"capacity must be at most the model's 384 positions, got 385"):
        each.engines.prefill([one], 385)
    with pytest.raises(InputError, match=r"engines of decoder take inputs_embeds with 1 to 8 B, got 9; .* send less at once"):
        each.engines.prefill([one] * 9, 100)
    patches = np.zeros((65, 3 * CONFIGS["full"].vision.patch_size ** 2), np.float32)
    one_tile = {"patches": patches, "cu_seqlens": np.array([0, 65], np.int32), "grids": np.array([[5, 13]], np.int32)}
    with pytest.raises(InputError, match=r"engines of vision take places with 17 to 64 P, got 65"):
        each.engines._run("vision", one_tile)


def test_calls_hold_no_more_tiles_than_asked() -> None:
    calls = tile_calls(np.array([4] * 7, np.int64), 3)
    assert [len(call) for call in calls] == [3, 3, 1]
    assert sorted(np.concatenate(calls).tolist()) == list(range(7))


def test_engines_of_another_chip_are_not_taken(tmp_path: Path) -> None:
    package = Package.open(engineless_package(tiny_checkpoint(tmp_path, CONFIGS["retrieval"]), tmp_path / "package", "fp16", 0))
    assert {entry["graph"] for entry in engine_entries(package, CHIP)} == set(package.manifest["graphs"])
    with pytest.raises(BackendError, match=r"must have engines for sm_120, it has them for \['sm_89'\] and misses"):
        engine_entries(package, "sm_120")


def test_a_package_names_its_backend_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = engineless_package(tiny_checkpoint(tmp_path, CONFIGS["retrieval"]), tmp_path / "package", "fp16", 0)
    monkeypatch.setattr(tensorrt, "why_not", lambda: "no CUDA driver (libcuda.so.1) is here")
    with pytest.raises(MissingDependencyError, match=r"backend 'tensorrt' cannot run here: no CUDA driver"):
        backends.load_backend(package)
    with pytest.raises(BackendError, match=r"backend 'eager' does not read .* an exported package for 'tensorrt'"):
        backends.load_backend(package, "eager")


def test_without_a_driver_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "LIBRARY", "libnone.so.1")
    assert cuda_memory.why_not() == "no CUDA driver (libnone.so.1) is here"
    with pytest.raises(BackendError, match=r"CUDA memory is not to be had: no CUDA driver"):
        cuda_memory.Device()
    assert tensorrt.why_not() is not None


@pytest.fixture
def on_host(made: Get, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TensorrtBackend, HostTensorrt, HostDriver]]:
    """`TensorrtBackend.load` of a float16 package, with stand-ins for libcuda and tensorrt."""

    def load(refused: str = "", host_tensors: tuple[str, ...] = ()) -> tuple[TensorrtBackend, HostTensorrt, HostDriver]:
        driver, library = HostDriver(), HostTensorrt(made("full", "fp16").package, host_tensors)
        library.refused = refused
        monkeypatch.setattr(cuda_memory.ctypes, "CDLL", lambda name: driver)
        monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: object() if name == "tensorrt" else None)
        monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: library)
        assert tensorrt.why_not() is None
        return TensorrtBackend.load(library.package.path), library, driver

    return load


@pytest.mark.parametrize("host_tensors", [(), ("written",)])
def test_what_is_bound_is_what_the_graphs_say(
    made: Get, on_host: Callable[..., tuple[TensorrtBackend, HostTensorrt, HostDriver]], host_tensors: tuple[str, ...]
) -> None:
    """The runner against plain onnxruntime on the same graphs: the same bits, through addresses, buckets and kept cache rows."""
    backend, library, driver = on_host(host_tensors=host_tensors)
    plain = made("full", "fp16").engines
    scenes = [packed(CONFIGS["full"], *size) for size in SIZES]
    prompts = []
    for one, other in zip(backend.encode(scenes), plain.encode(scenes), strict=True):
        np.testing.assert_array_equal(one.handle.tokens, other.handle.tokens)
        np.testing.assert_array_equal(one.handle.embeddings.object, other.handle.embeddings.object)
        prompts.append(prompt(one, [4, 5]))
    logits, cache = backend.prefill(prompts, CONTEXT)
    expected, plain_cache = plain.prefill(prompts, CONTEXT)
    np.testing.assert_array_equal(logits, expected)
    cache, plain_cache = backend.keep(cache, [2, 0, 2]), plain.keep(plain_cache, [2, 0, 2])
    for token in (7, 9):
        ids = np.full(3, token, np.int32)
        np.testing.assert_array_equal(backend.decode(cache, ids), plain.decode(plain_cache, ids))
    assert {profile for graph, profile in library.profiles if graph == "decoder"} == {0, 2}
    assert "cue_search" not in {graph for graph, _ in library.profiles}
    before = len(driver.alive)
    del cache
    assert before - len(driver.alive) == 2 * backend.config.language.num_layers  # keys and values of each layer are freed


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("deserialize", r"tensorrt 0.0.0 refuses engines/sm_89/vision.engine; export the package again"),
        ("profile", r"engine of vision refuses profile \d; export the package again"),
        ("execute", r"engine of vision failed; look at TensorRT's messages"),
    ],
)
def test_what_tensorrt_refuses_is_an_error(
    on_host: Callable[..., tuple[TensorrtBackend, HostTensorrt, HostDriver]], refused: str, words: str
) -> None:
    with pytest.raises(BackendError, match=words):
        on_host(refused)[0].encode([packed(CONFIGS["full"], 32, 32)])


def test_other_libraries_than_the_one_that_built_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"engines need another 1.0, which is not installed"):
        tensorrt._library("another", "1.0")
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: SimpleNamespace(__version__="2.0"))
    with pytest.raises(BackendError, match=r"engines need tensorrt 1.0, installed is 2.0; install it, or export again"):
        tensorrt._library("tensorrt", "1.0")


def test_a_driver_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HostDriver(status=2)
    monkeypatch.setattr(cuda_memory.ctypes, "CDLL", lambda name: driver)
    device = cuda_memory.Device()
    assert device.chip == CHIP
    with pytest.raises(BackendError, match=r"cuMemAlloc_v2 of the CUDA driver must return 0, got 2"):
        device.zeros(64)
    monkeypatch.setattr(driver, "cuDeviceGetCount", lambda count: 0)
    assert cuda_memory.why_not() == "the CUDA driver sees no device"
