"""The native package: whole or refused in one clear line, mapped without a copy, and run where torch cannot be imported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer import RSVLM
from rsvlm_infer.errors import BackendError, CheckpointError
from rsvlm_infer.models.native_package import NativePackage, map_weights, write_weights
from rsvlm_infer.models.package import is_package, mapped_sha256
from tests.conftest import REPOSITORY
from tests.native import needs_native

torch = pytest.importorskip("torch", reason="packages are made with torch")

from rsvlm_export.native import export_native, lay_out  # noqa: E402
from rsvlm_infer.models.checkpoint import save_checkpoint  # noqa: E402
from rsvlm_infer.models.load import embedder_digest, load_checkpoint  # noqa: E402
from rsvlm_infer.ops.weight_matmul import dequantise, pack_weight  # noqa: E402
from tests.backends.native_packages import CONFIG, random_model, write_package  # noqa: E402

pytestmark = needs_native


def _edit_manifest(package: Path, change: Callable[[dict], object]) -> None:
    file = package / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped weight": (
        lambda p: _flip(p / "weights.safetensors", -5),
        r"weights.safetensors must have sha256 \w{12}, got \w{12}",
    ),
    "a flipped word": (lambda p: _flip(p / "tokenizer.json", 9), "tokenizer.json must have sha256"),
    "a cut file": (
        lambda p: os.truncate(p / "weights.safetensors", 1000),
        r"weights.safetensors must have \d+ bytes, got 1000",
    ),
    "a missing file": (lambda p: (p / "config.json").unlink(), "config.json must exist, it is missing"),
    "a newer version": (
        lambda p: _edit_manifest(p, lambda m: m.update(version=2)),
        "version must be at most 1, got 2; upgrade rsvlm-infer",
    ),
    "a foreign format": (
        lambda p: _edit_manifest(p, lambda m: m.update(format="gguf")),
        "format must be 'rsvlm-package', got 'gguf'",
    ),
    "a foreign architecture": (
        lambda p: _edit_manifest(p, lambda m: m.update(architecture="bert")),
        "architecture must be 'rsvlm', got 'bert'",
    ),
    "a foreign kind": (lambda p: _edit_manifest(p, lambda m: m.update(kind="coreml")), "kind must be one of .*, got 'coreml'"),
    "a precision of another kind": (
        lambda p: _edit_manifest(p, lambda m: m.update(precision="fp16")),
        "precision must be one of .*, got 'fp16'",
    ),
    "an unknown precision": (lambda p: _edit_manifest(p, lambda m: m.update(precision="int2")), "precision must be one of"),
    "a file outside": (
        lambda p: _edit_manifest(p, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        "must lie inside of the package",
    ),
    "no list of files": (
        lambda p: _edit_manifest(p, lambda m: m.update(files={})),
        "manifest files must be an object that names",
    ),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest .* must be a JSON object"),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path, CONFIG, "bf16")[1]


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_refused_in_one_line(package: Path, damage: str) -> None:
    NativePackage.open(package)
    change, message = DAMAGES[damage]
    change(package)
    assert is_package(package)
    with pytest.raises(CheckpointError, match=message) as caught:
        NativePackage.open(package)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # what to do comes last


def test_info_shows_a_package_and_its_damage(package: Path) -> None:
    from rsvlm_infer.cli.inspect import checkpoint_report

    assert checkpoint_report(package).problem is None
    _flip(package / "weights.safetensors", -5)
    problem = checkpoint_report(package).problem
    assert problem is not None
    assert "weights.safetensors must have sha256" in problem


def test_a_wrong_header_is_refused_without_reading_hashes(package: Path) -> None:
    _flip(package / "weights.safetensors", 0)
    with pytest.raises(CheckpointError, match="must be one of a native package"):
        NativePackage.open(package, verify=False)


def test_files_are_hashed_while_the_body_runs(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, hashed = threading.Event(), []

    def hash_later(path: Path, begun: threading.Event | None = None) -> str:
        if begun is not None:
            begun.set()
        assert running.wait(30), "the body must begin before the hashes end"
        hashed.append(path.name)
        return mapped_sha256(path)

    monkeypatch.setattr("rsvlm_infer.models.package.mapped_sha256", hash_later)
    opened = NativePackage.open(package, verify=False)
    with opened.verifying():
        assert not hashed
        running.set()
    assert sorted(hashed) == sorted(opened.manifest["files"])


@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_file_is_hashed_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, more: int) -> None:
    monkeypatch.setattr("rsvlm_infer.models.package.HASHED_BYTES", mmap.ALLOCATIONGRANULARITY)
    content = np.random.default_rng(parts).bytes(max(0, parts * mmap.ALLOCATIONGRANULARITY + more))
    (tmp_path / "file").write_bytes(content)
    begun = threading.Event()
    assert mapped_sha256(tmp_path / "file", begun) == hashlib.sha256(content).hexdigest()
    assert begun.is_set()


def test_a_file_that_cannot_be_read_keeps_nobody_waiting(package: Path) -> None:
    opened = NativePackage.open(package, verify=False)
    (package / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        opened.verify()


def test_damage_is_told_and_not_what_it_broke(package: Path) -> None:
    file = package / "tokenizer.json"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"it is damaged: tokenizer\.json must have sha256") as caught:
        RSVLM.from_pretrained(package)
    assert "must be a JSON object" in str(caught.value.__context__)  # the tokenizer was read beside the hashes


def test_a_loaded_model_has_compared_every_file(package: Path) -> None:
    assert RSVLM.from_pretrained(package).backend.name == "native"
    _flip(package / "weights.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"it is damaged: weights\.safetensors must have sha256"):
        RSVLM.from_pretrained(package)


def test_what_cannot_run_is_refused_before_files_are_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.models.package.mapped_sha256", lambda path, *_: pytest.fail(f"{path} was read"))
    for backend, precision, words in (
        ("eager", "auto", "use 'native'"),
        ("native", "int4", "precision of this package is bf16"),
    ):
        with pytest.raises(BackendError, match=words):
            RSVLM.from_pretrained(package, backend, precision)


def test_weights_that_do_not_fit_the_config_are_refused(package: Path) -> None:
    from rsvlm_infer.backends.native import NativeBackend

    opened = NativePackage.open(package)
    del opened.weights["language_model.layers.1.mlp.down"]
    with pytest.raises(ValueError, match=r"weight language_model.layers.1.mlp.down must be \[32, 48\], got nothing"):
        NativeBackend(opened)


def test_weights_come_back_as_they_were_written(tmp_path: Path) -> None:
    vector = np.arange(5, dtype=np.float32)
    written = {"matrix": ("int8", 3, 32, np.arange(96, dtype=np.int8)), "vector": ("", 5, 0, vector)}
    write_weights(tmp_path / "w", written)
    read = map_weights(tmp_path / "w")
    assert [read[name][:3] for name in read] == [("int8", 3, 32), ("", 5, 0)]
    np.testing.assert_array_equal(read["vector"][3].view(np.float32), vector)
    assert read["matrix"][3].ctypes.data % 64 == 0
    assert not read["matrix"][3].flags.writeable


def test_an_embedding_row_is_the_rounded_weight() -> None:
    from rsvlm_infer import _C

    config = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, hidden_size=64))
    state = random_model(config).state_dict()
    for precision, kind in (("bf16", "bf16"), ("int8", "int8"), ("int4", "int8")):
        laid = lay_out(config, state, precision)
        assert laid["language_model.embed_tokens"][0] == kind
        assert laid["language_model.layers.0.mlp.gate_up"][0] == precision
        values = {
            name: float(value) for name, value in dataclasses.asdict(config.language).items() if not isinstance(value, str)
        }
        weights = {
            name: (k, rows, columns, np.ascontiguousarray(content).reshape(-1).view(np.uint8))
            for name, (k, rows, columns, content) in laid.items()
        }
        frequencies = np.ones(config.language.head_dim // 2, np.float32)
        decoder = _C.NativeDecoder(weights=weights, settings=values, frequencies=frequencies, cache="bfloat16")
        expected = dequantise(pack_weight(state["language_model.embed_tokens.weight"], kind))
        ids = np.array([0, 31, 32, 299], np.int32)
        np.testing.assert_array_equal(decoder.embed(token_ids=ids), expected[ids.tolist()].numpy())
        with pytest.raises(ValueError, match=r"token ids must be in 0\.\.299, got 300"):
            decoder.embed(token_ids=np.array([300], np.int32))


def test_int4_scales_leave_less_error_than_the_largest_weight_asks_for() -> None:
    from rsvlm_export.native import _nearest_int4

    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    fitted = _nearest_int4(weight)
    assert fitted.shape == (40, 96)
    error = (dequantise(fitted) - weight).square().sum()
    assert error < 0.9 * (dequantise(pack_weight(weight, "int4")) - weight).square().sum()
    assert dequantise(fitted)[3, 32:64].abs().sum() == 0
    with pytest.raises(CheckpointError, match="must be finite"):
        _nearest_int4(torch.full((1, 32), torch.inf))


def test_export_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, package = write_package(tmp_path, CONFIG, "int8")
    with pytest.raises(CheckpointError, match="is not overwritten"):
        export_native(checkpoint, package, "int8")
    before = (package / "manifest.json").read_text()
    export_native(checkpoint, package, "int8", overwrite=True)
    assert (package / "manifest.json").read_text() == before  # the same checkpoint, the same bytes
    with pytest.raises(CheckpointError, match="precision must be one of"):
        export_native(checkpoint, tmp_path / "other", "int2")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("rsvlm_export.native.write_weights", fail)
    with pytest.raises(OSError, match="no space left"):
        export_native(checkpoint, tmp_path / "other", "bf16")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".other*"))


def test_low_rank_pairs_are_merged(tmp_path: Path) -> None:
    state = random_model(CONFIG).state_dict()
    name = "language_model.layers.0.attention.o"
    base = {key: value for key, value in state.items() if key != f"{name}.weight"} | {
        f"{name}.weight": state[f"{name}.weight"] * 0
    }
    pair = {f"{name}.lora_a": torch.randn(2, 32), f"{name}.lora_b": torch.randn(32, 2)}
    from tests.tasks.telling_model import write_tokenizer

    folder = save_checkpoint(tmp_path / "delta", CONFIG, pair, base=[], tokenizer=write_tokenizer(tmp_path / "words"))
    from safetensors.torch import save_file

    save_file({key: value.clone() for key, value in base.items()}, folder / "model.safetensors")
    opened = NativePackage.open(export_native(folder, tmp_path / "package", "fp32"))
    expected = pair[f"{name}.lora_b"] @ pair[f"{name}.lora_a"]
    found = opened.weights[name][3].view(np.float32).reshape(1, 32, 32)[0].T  # one block, column by column
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert opened.embedder == load_checkpoint(folder).embedder == embedder_digest(folder) == embedder_digest(opened.path)


def test_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, hidden_size=64))
    _, package = write_package(tmp_path, config, "int4")
    code = f"""
import sys
for name in ("torch", "onnxruntime", "transformers"):
    sys.modules[name] = None
import numpy as np
from rsvlm_infer import RSVLM
model = RSVLM.from_pretrained({str(package)!r})
image = np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)
answer = model.ask(image, "what", max_new_tokens=3)
result = model.classify(image, ["a", "b"])
model.embed_text("forest")
print(model.backend.name, model.backend.precision, len(answer.token_ids), result.label)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")} | {
        "PYTHONPATH": str(REPOSITORY)
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["native", "int4"]
