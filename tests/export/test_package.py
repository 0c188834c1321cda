"""Packages are whole or absent, say what they are, and what is wrong with one is refused in one line that names the next step."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer import RSVLM
from rsvlm_infer.backends import load_backend
from rsvlm_infer.contract import FORMAT_VERSION, PRECISIONS, graph_contracts
from rsvlm_infer.errors import BackendError, CheckpointError, InputError, RsvlmError
from rsvlm_infer.models.load import embedder_digest, load_checkpoint, read_config
from rsvlm_infer.models.package import Package, is_package
from tests.export.packages import CONFIGS, Pair, export_checkpoint, flip_byte, packed, prompt, random_model, save_checkpoint
from tests.native import needs_native

Get = Callable[..., Pair]


@pytest.fixture
def package(pair: Get, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pair("full").package, tmp_path / "package"))


def _edit(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((package / "manifest.json").read_text())
    change(values)
    (package / "manifest.json").write_text(json.dumps(values))


def _refused(package: Path, *words: str, error: type[RsvlmError] = CheckpointError) -> None:
    for load in (load_backend, RSVLM.from_pretrained):
        with pytest.raises(error) as caught:
            load(package)
        text = str(caught.value)
        assert "\n" not in text
        assert "; " in text  # the next step
        for word in words:
            assert word in text


def test_manifest_says_what_the_package_is(pair: Get) -> None:
    made = pair("full")
    opened = Package.open(made.package)
    manifest = opened.manifest
    assert (manifest["version"], manifest["kind"], manifest["precision"]) == (FORMAT_VERSION, "onnx", "fp32")
    assert set(manifest["graphs"]) == {"vision", "align", "bridge", "text_embed", "word_embed", "decoder", "cue_search"}
    on_disk = {path.relative_to(made.package).as_posix() for path in made.package.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    assert "knowledge/entries.jsonl" in on_disk
    assert manifest["software"]["onnx"]
    assert manifest["model"]["files"]["model.safetensors"]
    assert read_config(made.package) == made.config
    assert embedder_digest(made.package) == embedder_digest(made.checkpoint)
    assert (is_package(made.package), is_package(made.checkpoint)) == (True, False)
    assert not list(made.package.parent.glob(".package*"))


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_hold_to_the_contract(pair: Get, name: str) -> None:
    """Names, dtypes and fixed sides as onnxruntime sees them; our own ops have a body in the model."""
    onnx = pytest.importorskip("onnx")
    made = pair(name)
    for contract in graph_contracts(made.config).values():
        model = onnx.load(made.package / contract.file, load_external_data=False)
        onnx.checker.check_model(str(made.package / contract.file))
        functions = {function.name for function in model.functions}
        assert {node.op_type for node in model.graph.node if node.domain == "rsvlm"} == functions
        for tensors, values in ((contract.inputs, model.graph.input), (contract.outputs, model.graph.output)):
            assert [item.name for item in tensors] == [value.name for value in values]
            for item, value in zip(tensors, values, strict=True):
                shape = tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim)
                assert shape == item.shape
    used = {"VarlenTileAttention", "GridPositions", "PixelShuffle", "Route", "GroupedExperts", "CueSearch"}
    if name == "full":
        found = {
            function.name
            for contract in graph_contracts(made.config).values()
            for function in onnx.load(made.package / contract.file, load_external_data=False).functions
        }
        assert found == used


def test_a_tied_table_is_stored_once(pair: Get) -> None:
    made = pair("llava")
    assert made.config.language is not None
    table = made.config.language.vocab_size * made.config.language.hidden_size * 4
    weights = sum(value.numel() for name, value in made.eager.model.state_dict().items() if name.startswith("language_model"))
    tables = 2 * made.config.language.max_positions * made.config.language.head_dim // 2 * 4
    size = (made.package / "language.weights").stat().st_size
    assert size < weights * 4 + tables + 40 * 4096  # pages begin at multiples of 4096
    assert size > weights * 4
    assert table < weights * 4


def test_a_flipped_byte_is_refused(package: Path) -> None:
    flip_byte(package / "language.weights")
    _refused(package, "language.weights must have sha256", "export it again")


def test_a_missing_a_cut_and_a_foreign_file_are_refused(package: Path) -> None:
    (package / "vision.onnx").unlink()
    (package / "config.json").write_text("{}")
    _edit(package, lambda values: values["files"].update({"../secret": {"bytes": 1, "sha256": "0"}}))
    _refused(package, "vision.onnx must exist", "config.json must have", "must lie inside")


def test_a_newer_format_and_a_foreign_architecture_are_refused(package: Path) -> None:
    kept = (package / "manifest.json").read_text()
    _edit(package, lambda values: values.update(version=FORMAT_VERSION + 1))
    _refused(package, f"must be at most {FORMAT_VERSION}, got {FORMAT_VERSION + 1}", "upgrade rsvlm-infer")
    for change in ({"architecture": "mamba"}, {"kind": "coreml"}, {"format": "zip"}, {"version": "1"}, {"precision": "fp3"}):
        (package / "manifest.json").write_text(kept)
        _edit(package, lambda values, change=change: values.update(change))  # type: ignore[misc]
        _refused(package, f"{next(iter(change.values()))!r}")
    (package / "manifest.json").write_text("{")
    _refused(package, "JSON object")


@needs_native
def test_both_kinds_are_refused_in_the_same_words(pair: Get, tmp_path: Path) -> None:
    made = pair("full")
    folders = {"onnx": made.package, "native": export_checkpoint(made.checkpoint, tmp_path / "native", format="native")}
    manifests = {kind: Package.open(folder).manifest for kind, folder in folders.items()}
    assert [manifest["kind"] for manifest in manifests.values()] == list(folders)
    assert manifests["onnx"]["model"] == manifests["native"]["model"]
    changes: list[Callable[[Path], object]] = [
        lambda folder: _edit(folder, lambda values: values.update(version=FORMAT_VERSION + 1)),
        lambda folder: _edit(folder, lambda values: values.update(architecture="mamba")),
        lambda folder: _edit(folder, lambda values: values.update(format="gguf")),
        lambda folder: _edit(folder, lambda values: values.update(kind="coreml")),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: flip_byte(folder / "tokenizer.json"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ]
    for index, change in enumerate(changes):
        said = set()
        for kind, folder in folders.items():
            damaged = Path(shutil.copytree(folder, tmp_path / f"{kind}{index}"))
            change(damaged)
            with pytest.raises(CheckpointError) as caught:
                load_backend(damaged)
            said.add(str(caught.value).replace(str(damaged), "PACKAGE"))
        assert len(said) == 1
        assert "\n" not in said.pop()


def test_graphs_of_another_config_are_refused(package: Path) -> None:
    _edit(package, lambda values: values["graphs"]["align"]["inputs"].pop())
    _refused(package, "graphs ['align']")
    _edit(package, lambda values: values["graphs"].pop("bridge"))
    _refused(package, "graphs must be")


def test_a_knowledge_base_of_another_checkpoint_is_refused(pair: Get, tmp_path: Path) -> None:
    made = pair("full")
    base = made.onnx.knowledge
    assert base is not None
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "checkpoint"))
    type(base)(base.texts, base.levels, base.embeddings, "0" * 64).save(checkpoint / "knowledge")
    folder = export_checkpoint(checkpoint, tmp_path / "package")
    _refused(folder, "rsvlm kb build")


def test_export_is_whole_or_absent(pair: Get, tmp_path: Path) -> None:
    made = pair("llava")
    with pytest.raises(CheckpointError, match="--overwrite"):
        export_checkpoint(made.checkpoint, made.package)
    assert made.config.language is not None
    odd = dataclasses.replace(made.config, language=dataclasses.replace(made.config.language, head_dim=12))
    checkpoint = save_checkpoint(tmp_path / "odd", odd, random_model(odd).state_dict())
    with pytest.raises(CheckpointError, match="multiple of 16"):
        export_checkpoint(checkpoint, tmp_path / "package")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]
    target = tmp_path / "package"
    target.mkdir()
    (target / "old").touch()
    export_checkpoint(made.checkpoint, target, overwrite=True)
    assert Package.open(target).precision == "fp32"
    assert not (target / "old").exists()
    with pytest.raises(InputError, match="precision"):
        export_checkpoint(made.checkpoint, tmp_path / "other", precision="fp8")
    with pytest.raises(InputError, match="format"):
        export_checkpoint(made.checkpoint, tmp_path / "other", format="coreml")


def test_two_exports_have_the_same_files(pair: Get, tmp_path: Path) -> None:
    made = pair("full")
    again = export_checkpoint(made.checkpoint, tmp_path / "again")
    assert Package.open(again).manifest["files"] == Package.open(made.package).manifest["files"]


def test_what_was_asked_runs_or_is_refused(pair: Get) -> None:
    made = pair("llava")
    assert load_backend(made.package, "onnx", "fp32").precision == "fp32"
    for arguments, words in (
        ((made.package, "eager"), "exported package"),
        ((made.checkpoint, "onnx"), "rsvlm export"),
        ((made.package, "onnx", "int4"), "--precision int4"),
        ((made.package, "onnx:cuda"), r"\['cpu'\]"),
        ((made.package, "onnx:npu"), "'npu'"),
    ):
        with pytest.raises(BackendError, match=words):
            load_backend(*arguments)
    with pytest.raises(CheckpointError, match="exported package"):
        load_checkpoint(made.package)


def test_contracts_of_calls(pair: Get) -> None:
    made = pair("llava")
    backend = made.onnx
    (features,) = backend.encode([packed(made.config, 40, 40)])
    good = prompt(features, [3])
    with pytest.raises(InputError, match="capacity must be at least"):
        backend.prefill([good], 3)
    with pytest.raises(InputError, match="at most the model's 512"):
        backend.prefill([good], 513)
    with pytest.raises(InputError, match="placeholder"):
        backend.prefill([type(good)(good.token_ids[:-2], good.images)], 200)
    _, cache = backend.prefill([good], len(good.token_ids))
    with pytest.raises(InputError, match="is full"):
        backend.decode(cache, np.array([1], np.int32))
    with pytest.raises(BackendError, match="no alignment"):
        backend.embed_image(features)
    with pytest.raises(BackendError, match="no alignment"):
        backend.embed_text([np.array([1], np.int32)])
    assert backend.encode([]) == []
    retrieval = pair("retrieval").onnx
    with pytest.raises(InputError, match="empty text"):
        retrieval.embed_text([np.zeros(0, np.int32)])
    with pytest.raises(BackendError, match="no language model"):
        retrieval.prefill([good], 200)


def test_the_cache_stays_where_it_is(pair: Get) -> None:
    """A step writes the bound memory: the keys of earlier tokens keep their address and their bits."""
    made = pair("llava")
    (features,) = made.onnx.encode([packed(made.config, 40, 40)])
    good = prompt(features, [3])
    length = len(good.token_ids)
    _, cache = made.onnx.prefill([good], length + 3)
    places = {name: value.data_ptr() for name, value in cache.values.items()}
    before = {name: value.numpy() for name, value in cache.values.items()}
    made.onnx.decode(cache, np.array([5], np.int32))
    assert {name: value.data_ptr() for name, value in cache.values.items()} == places
    for name, value in cache.values.items():
        after = value.numpy()
        np.testing.assert_array_equal(after[:, :, :length], before[name][:, :, :length])
        assert np.abs(after[:, :, length]).max() > 0
        assert np.abs(after[:, :, length + 1 :]).max() == 0


def test_precisions_of_the_contract_are_those_of_the_backend() -> None:
    from rsvlm_infer.backends import BACKENDS

    assert BACKENDS["onnx"] == PRECISIONS
