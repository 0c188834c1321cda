"""The native backend against eager: the same tokens in fp32, the same bits alone and in a batch, on every instruction set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.backends import Prompt, Query, load_backend
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import BackendError, InputError
from rsvlm_infer.knowledge.store import KnowledgeBase
from tests.native import INSTRUCTION_SETS, limited_to, needs_native, threads

pytest.importorskip("torch", reason="packages are made with torch, and eager is the reference")

from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.backends.native import NativeBackend
from tests.backends.native_packages import AWKWARD, CONFIG, IMAGE, packed_scene, write_package

pytestmark = needs_native

# of the largest logit: fp32 sums in another order; bf16 rounds weights, and rows of prompts to 8 bits
TOLERANCES = {"fp32": 2e-5, "bf16": 0.1}
CONFIGS = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, language=AWKWARD, projector=dataclasses.replace(CONFIG.projector, input_norm=False)),
    "clip": dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(
            CONFIG.vision, family="clip", activation="quick_gelu", pre_norm=True, patch_bias=False, layer_scale=False
        ),
        alignment=dataclasses.replace(CONFIG.alignment, pooling="class", levels=("scene",)),
        augmentation=None,
        experts=None,
        tiling="anyres",
        grid_pinpoints=((32, 64), (64, 32)),
    ),
    "siglip": dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(
            CONFIG.vision, family="siglip", class_token=False, activation="gelu_tanh", interpolation="bilinear"
        ),
        experts=dataclasses.replace(CONFIG.experts, kind="gelu_mlp"),
        tiling="fixed",
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def backends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EagerBackend, NativeBackend]:
    config = CONFIGS[request.param]
    checkpoint, package = write_package(tmp_path_factory.mktemp(request.param), config)
    vectors = np.random.default_rng(0).normal(size=(9, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    knowledge = KnowledgeBase([f"fact {index}" for index in range(9)], np.arange(9) % 3, vectors)
    eager, native = EagerBackend.load(checkpoint, "float32"), NativeBackend.load(package)
    eager.knowledge = native.knowledge = knowledge
    return eager, native


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeBackend]:
    """One model at all precisions, wide enough for groups of 32 columns."""
    language = dataclasses.replace(CONFIG.language, hidden_size=64, intermediate_size=96, head_dim=16)
    config = dataclasses.replace(CONFIG, language=language)
    folder = tmp_path_factory.mktemp("precisions")
    return {name: NativeBackend.load(write_package(folder, config, name)[1]) for name in ("fp32", "bf16", "int8", "int4")}


def _query(backend: EagerBackend | NativeBackend) -> Query:
    ids = np.array([4, 9, 2], np.int32)
    return Query(ids, backend.embed_text([ids])[0])


def _ids(num_tokens: int, text: list[int]) -> np.ndarray:
    return np.array([1, *[IMAGE] * num_tokens, *text], np.int32)


def _random_prompts(config: RsvlmConfig, lengths: tuple[int, ...]) -> list[Prompt]:
    assert config.language is not None
    generator = np.random.default_rng(3)
    return [Prompt(generator.integers(0, config.language.vocab_size, n).astype(np.int32)) for n in lengths]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_scenes_and_texts_equal_eager(backends: tuple[EagerBackend, NativeBackend], isa: str) -> None:
    eager, native = backends
    native.forget()
    scenes = [packed_scene(native.config, 100, 60, 1), packed_scene(native.config, 33, 32, 2)]
    with limited_to(isa):
        query = _query(native)
        np.testing.assert_allclose(query.embedding, _query(eager).embedding, atol=1e-5)
        found = native.encode(scenes, [query, None])
    for expected, got in zip(eager.encode(scenes, [_query(eager), None]), found, strict=True):
        assert got.num_tokens == expected.num_tokens
        assert got.cues == expected.cues
        scale = float(expected.handle.tokens.abs().max())
        np.testing.assert_allclose(got.handle.tokens, expected.handle.tokens.numpy(), atol=2e-5 * scale)
        for name in ("object", "region", "scene"):
            np.testing.assert_allclose(
                getattr(native.embed_image(got), name), getattr(eager.embed_image(expected), name), atol=2e-5
            )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_greedy_tokens_equal_eager(backends: tuple[EagerBackend, NativeBackend], isa: str) -> None:
    eager, native = backends
    scene = packed_scene(native.config, 40, 90, 1)
    prompts = []
    for backend in (eager, native):
        image = backend.encode([scene])[0]
        prompts.append(Prompt(_ids(image.num_tokens, [5, 6, 7]), (image,)))
    with limited_to(isa):
        expected, cache = eager.prefill(prompts[:1], 600)
        got, own = native.prefill(prompts[1:], 600)
        for _ in range(12):
            np.testing.assert_allclose(got, expected, atol=TOLERANCES["fp32"] * np.abs(expected).max())
            token = expected.argmax(axis=1).astype(np.int32)
            assert got.argmax(axis=1) == token
            expected, got = eager.decode(cache, token), native.decode(own, token)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_rows_have_the_same_bits_alone_in_a_batch_and_after_keep(
    languages: dict[str, NativeBackend], isa: str, precision: str
) -> None:
    backend = languages[precision]
    prompts = _random_prompts(backend.config, (7, 101, 1, 500, 64))
    with limited_to(isa):
        backend._prefixes = []
        first, cache = backend.prefill(prompts, 600)
        steps = [first, backend.decode(cache, np.arange(5, dtype=np.int32) + 11)]
        cache = backend.keep(cache, [3, 0, 4])
        steps.append(backend.decode(cache, np.array([20, 21, 22], np.int32)))
        cache = backend.keep(cache, [1, 0, 1])
        steps.append(backend.decode(cache, np.array([30, 31, 32], np.int32)))
        for row, tokens in ((3, (14, 20, 31)), (0, (11, 21, 30)), (0, (11, 21, 32))):
            backend._prefixes = []
            alone, own = backend.prefill([prompts[row]], 600)
            np.testing.assert_array_equal(steps[0][row], alone[0])
            places = (row, [3, 0, 4].index(row), 1 if row == 3 else {30: 0, 32: 2}[tokens[2]])
            for step, place, token in zip(steps[1:], places, tokens, strict=True):
                np.testing.assert_array_equal(step[place], backend.decode(own, np.array([token], np.int32))[0])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_threads_do_not_change_a_bit(languages: dict[str, NativeBackend], precision: str) -> None:
    backend, scene = languages[precision], packed_scene(CONFIG, 90, 64, 3)
    prompts = _random_prompts(backend.config, (40, 300, 3))

    def run() -> list[np.ndarray]:
        backend.forget()
        tokens = backend.encode([scene])[0].handle.tokens
        logits, cache = backend.prefill(prompts, 320)
        best, values = backend._decoder.decode_best(
            cache=cache.store, rows=cache.rows, positions=cache.lengths, token_ids=np.array([4, 5, 6], np.int32)
        )
        step = backend.decode(cache, np.array([4, 5, 6], np.int32))
        np.testing.assert_array_equal(best, step.argmax(axis=1))
        np.testing.assert_array_equal(values, step.max(axis=1))
        return [tokens, logits, step, best]

    with threads(1):
        alone = run()
    with threads(2):
        for expected, got in zip(alone, run(), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_bf16_stays_near_fp32_and_fewer_bits_err_more(languages: dict[str, NativeBackend], isa: str) -> None:
    prompts = _random_prompts(languages["fp32"].config, (33,))
    with limited_to(isa):
        exact = languages["fp32"].prefill(prompts, 40)[0]
        errors = {
            name: float(np.abs(languages[name].prefill(prompts, 40)[0] - exact).max() / np.abs(exact).max())
            for name in ("bf16", "int8", "int4")
        }
    assert 0 < errors["bf16"] < TOLERANCES["bf16"]
    assert errors["int8"] < errors["int4"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reused_beginning_gives_the_same_bits(languages: dict[str, NativeBackend], precision: str) -> None:
    backend = languages[precision]
    (prompt,) = _random_prompts(backend.config, (300,))
    backend._prefixes = []
    whole, cache = backend.prefill([prompt], 320)
    step = backend.decode(cache, np.array([5], np.int32))
    for shared in (290, 40):
        other = prompt.token_ids.copy()
        other[shared:] = (other[shared:] + 1) % 300
        backend._prefixes = []
        backend.prefill([Prompt(other)], 320)
        before = backend.reused_tokens
        again, cache = backend.prefill([prompt], 320)
        assert backend.reused_tokens - before == shared
        np.testing.assert_array_equal(again, whole)
        np.testing.assert_array_equal(backend.decode(cache, np.array([5], np.int32)), step)


def test_a_scene_is_encoded_once_for_several_questions(
    backends: tuple[EagerBackend, NativeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, native = backends
    native.forget()
    scene, other = packed_scene(native.config, 64, 64, 5), packed_scene(native.config, 64, 64, 6)
    first = native.encode([scene])[0].handle.tokens
    assert len(native._scenes) == 1
    np.testing.assert_array_equal(native.encode([scene], [_query(native)])[0].handle.tokens.shape, first.shape)
    assert len(native._scenes) == 1
    assert not np.array_equal(native.encode([other])[0].handle.tokens, first)
    np.testing.assert_array_equal(native.encode([scene])[0].handle.tokens, first)
    assert len(native._scenes) == 2
    scene.patches[0, 0] += 1.0  # in place: what was kept is a copy
    assert not np.array_equal(native.encode([scene])[0].handle.tokens, first)
    scene.patches[0, 0] = np.nan
    kept = native._encode_levels(scene)
    assert native._encode_levels(scene) is kept
    monkeypatch.setattr("rsvlm_infer.backends.native.KEPT_STATE_BYTES", 0)
    native.encode([packed_scene(native.config, 40, 40, 7)])
    assert len(native._scenes) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_tiles_have_the_same_bits_together_and_alone(
    backends: tuple[EagerBackend, NativeBackend], isa: str, count: int
) -> None:
    """Some threads take several tiles, one takes several short ones together, and all share what is left."""
    _, native = backends
    grids = [(side, side + 1) for side in (3, 11, 9, 14, 2, 12, 1, 17, 4, 13)]
    generator = np.random.default_rng(8)
    vision = native.config.vision
    patches = [generator.standard_normal((rows * columns, 3 * vision.patch_size**2), np.float32) for rows, columns in grids]
    positions = [native._grid_positions(*grid) for grid in grids]
    bounds = np.concatenate(([0], np.cumsum([len(tile) for tile in patches]))).tolist()
    with limited_to(isa), threads(count):
        together = native._scene_model.encode(patches=np.concatenate(patches), positions=positions, bounds=bounds)
        for tile, alone in enumerate(patches):
            found = native._scene_model.encode(patches=alone, positions=[positions[tile]], bounds=[0, len(alone)])
            for level in range(3):
                np.testing.assert_array_equal(together[level][bounds[tile] : bounds[tile + 1]], found[level])
                np.testing.assert_array_equal(together[3 + level][tile : tile + 1], found[3 + level])


def test_refusals_name_what_is_wrong(languages: dict[str, NativeBackend], tmp_path: Path) -> None:
    backend = languages["fp32"]
    with pytest.raises(InputError, match="one image placeholder"):
        backend.prefill([Prompt(np.array([1, IMAGE], np.int32))], 50)
    with pytest.raises(InputError, match="capacity must be at least"):
        backend.prefill(_random_prompts(backend.config, (9,)), 3)
    _, cache = backend.prefill(_random_prompts(backend.config, (9,)), 9)
    with pytest.raises(InputError, match="is full"):
        backend.decode(cache, np.array([1], np.int32))
    with pytest.raises(InputError, match="empty text"):
        backend.embed_text([np.zeros(0, np.int32)])
    checkpoint, package = write_package(tmp_path, CONFIG)
    assert load_backend(package).name == "native"
    with pytest.raises(BackendError, match="export it first"):
        load_backend(checkpoint, "native")
    with pytest.raises(BackendError, match="use 'native'"):
        load_backend(package, "eager")
    with pytest.raises(BackendError, match="precision of this package is fp32"):
        load_backend(package, "native", "int4")
