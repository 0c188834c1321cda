"""Real engines of a tiny model with every part, built by tensorrt-rtx on the CPU for two chips. None is run: that needs a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import run
from tests.export.packages import CONFIGS, flip_byte  # skips without torch, onnx, onnxruntime

# isort: split
from rsvlm_export.export import export_checkpoint
from rsvlm_export.linears import model_weights
from rsvlm_export.onnx.parts import Form, Precision, Source
from rsvlm_export.package import form_contracts, write_graphs
from rsvlm_export.tensorrt import export as engine_export
from rsvlm_export.tensorrt import library as libraries
from rsvlm_export.tensorrt.build import build_engine, check_network, collecting_logger, network_profile, parse
from rsvlm_export.tensorrt.export import export_tensorrt
from rsvlm_export.tensorrt.library import Library, load_library
from rsvlm_export.tensorrt.profiles import profiles
from rsvlm_infer.contract import ENGINES
from rsvlm_infer.errors import BackendError, CheckpointError, InputError, MissingDependencyError
from rsvlm_infer.models.checkpoint import sha256_of
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.package import Package
from tests.backends.engine_packages import engineless_package, tiny_checkpoint

pytestmark = pytest.mark.slow
CHIPS = ("sm_89", "sm_120")
CONTEXT = 160


@pytest.fixture(scope="module")
def library() -> Library:
    """Skips where no tensorrt-rtx is: the full TensorRT builds only for a GPU that it sits on."""
    try:
        return load_library("tensorrt-rtx")
    except MissingDependencyError:
        pytest.skip('tensorrt-rtx is not installed; pip install "rsvlm-infer[tensorrt]" (97 MB), or make engines')


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("full"), CONFIGS["full"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def package(library: Library, checkpoint: Path, cache: Path) -> Path:
    return export_tensorrt(checkpoint, cache.parent / "package", "fp16", CHIPS, context=CONTEXT, cache=cache)


def never(*arguments: Any) -> bytes:
    raise AssertionError("an engine was built again")


def test_every_graph_has_an_engine_for_each_chip(package: Path, library: Library) -> None:
    opened = Package.open(package)
    opened.verify()
    entries = opened.manifest[ENGINES]
    assert {(entry["graph"], entry["chip"]) for entry in entries} == {
        (graph, chip) for graph in opened.manifest["graphs"] for chip in CHIPS
    }
    assert len(opened.manifest["graphs"]) == 7
    for entry in entries:
        file = package / entry["file"]
        described = json.loads(file.with_suffix(".json").read_text())
        assert described["sha256"] == entry["sha256"] == opened.manifest["files"][entry["file"]]["sha256"] == sha256_of(file)
        assert (described["bytes"], described["precision"]) == (file.stat().st_size, "fp16")
        assert (described["library"], described["version"]) == ("tensorrt-rtx", library.version)
        assert described["model_sha256"] == opened.manifest["model"]["sha256"]
    for graph in opened.manifest["graphs"]:
        one, other = ((package / ENGINES / chip / f"{graph}.engine").read_bytes() for chip in CHIPS)
        assert one != other


def test_networks_have_the_shapes_of_the_contract(package: Path, library: Library) -> None:
    """TensorRT's own view of each graph, and its own view of each bucket."""
    config = Package.open(package).config
    trt = library.module
    for contract in form_contracts(config, Form("tensorrt", "float16", CONTEXT)).values():
        logger, said = collecting_logger(trt)
        builder = trt.Builder(logger)
        network, _parser = parse(library, builder, logger, package / contract.file)
        check_network(trt, network, contract)
        for profile in profiles(config, contract, CONTEXT):
            made = network_profile(builder, contract, profile)
            assert bool(made), said
            for item in contract.inputs:
                if item.shape:
                    assert [tuple(shape) for shape in made.get_shape(item.name)] == list(profile.shapes(item))
                elif item.name in profile.scalars:
                    bounds = profile.scalars[item.name]
                    assert [list(values) for values in made.get_shape_input(item.name)] == [
                        [bounds.least],
                        [bounds.best],
                        [bounds.most],
                    ]
        wrong = dataclasses.replace(
            contract, inputs=(dataclasses.replace(contract.inputs[0], dtype="int32"), *contract.inputs[1:])
        )
        with pytest.raises(BackendError, match=rf"{contract.inputs[0].name} of {contract.file} must be int32"):
            check_network(trt, network, wrong)
        with pytest.raises(BackendError, match=rf"outputs of {contract.file} must be \[\]"):
            check_network(trt, network, dataclasses.replace(contract, outputs=()))


def test_known_engines_are_not_built_again(
    package: Path, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_export, "build_engine", never)
    lines: list[str] = []
    again = export_tensorrt(
        checkpoint, tmp_path / "again", "fp16", CHIPS[:1], context=CONTEXT, cache=cache, report=lines.append
    )
    assert sum(line.endswith("known") for line in lines) == 7
    for graph in Package.open(again).manifest["graphs"]:
        name = f"{ENGINES}/{CHIPS[0]}/{graph}.engine"
        assert (again / name).read_bytes() == (package / name).read_bytes()
    for changed in ({"chips": ("sm_86",)}, {"precision": "bf16"}, {"context": CONTEXT + 1}):
        settings: dict[str, Any] = {"precision": "fp16", "chips": CHIPS[:1], "context": CONTEXT, **changed}
        with pytest.raises(AssertionError, match="built again"):
            export_tensorrt(checkpoint, tmp_path / "other", cache=cache, **settings)
        assert not (tmp_path / "other").exists()  # nothing is left of an export that failed


def test_a_damaged_entry_is_built_again(
    package: Path, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(cache.glob(f"*{CHIPS[0]}*/text_embed-*.engine"))
    whole = entry.read_bytes()
    entry.unlink()  # the package has a link to the same bytes
    entry.write_bytes(whole)
    flip_byte(entry)
    monkeypatch.setattr(engine_export, "build_engine", lambda *arguments: whole)
    lines: list[str] = []
    export_tensorrt(checkpoint, tmp_path / "again", "fp16", CHIPS[:1], context=CONTEXT, cache=cache, report=lines.append)
    assert [line.split()[0] for line in lines if line.endswith(" s")] == ["text_embed"]
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_build(library: Library, tmp_path: Path, precision: str) -> None:
    """fp32 has no attention kernels: its graphs are written as plain products."""
    config = CONFIGS["llava"]
    package = Package.open(engineless_package(tiny_checkpoint(tmp_path, config), tmp_path / "package", precision, CONTEXT))
    form = Form("tensorrt", {"bf16": "bfloat16", "fp32": "float32"}[precision], CONTEXT)
    for name in ("decoder", "vision"):
        contract = form_contracts(config, form)[name]
        buckets = profiles(config, contract, CONTEXT)[:1]
        assert build_engine(library, package.path / contract.file, contract, buckets, CHIPS[0])


def test_a_graph_that_cannot_be_read_is_an_error_with_a_reason(library: Library, tmp_path: Path) -> None:
    contract = form_contracts(CONFIGS["full"], Form("tensorrt", "float16", CONTEXT))["text_embed"]
    file = tmp_path / contract.file
    file.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"tensorrt-rtx .* cannot read text_embed.onnx \("):
        build_engine(library, file, contract, profiles(CONFIGS["full"], contract, CONTEXT), CHIPS[0])


@pytest.mark.parametrize("graph", ["vision", "bridge"])
def test_graphs_of_plugins_ask_for_them(library: Library, checkpoint: Path, tmp_path: Path, graph: str) -> None:
    """tensorrt-rtx has no plugins: that it misses ours by name shows that the nodes reach its look-up, and nothing more."""
    loaded = load_checkpoint(checkpoint)
    form = Form("tensorrt", "float16", CONTEXT, plugins=True)
    write_graphs(loaded.config, Source(model_weights(loaded.model), Precision("float16"), form), tmp_path)
    contract = form_contracts(loaded.config, form)[graph]
    with pytest.raises(BackendError, match=rf"cannot read {graph}.onnx \(tile_schedule: .*Plugin not found"):
        build_engine(library, tmp_path / contract.file, contract, profiles(loaded.config, contract, CONTEXT), CHIPS[0])


def test_refusals(library: Library, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    with pytest.raises(InputError, match=r"--chip must be one of \['sm_75', .* got 'sm_90'; choose one"):
        export_tensorrt(checkpoint, target, chips=["sm_90"])
    with pytest.raises(InputError, match=r"--chip must name at least one chip, got none; choose from \['sm_75'"):
        export_tensorrt(checkpoint, target)
    with pytest.raises(InputError, match=r"--precision must be one of .* for --format tensorrt, got 'int8'"):
        export_checkpoint(checkpoint, target, format="tensorrt", precision="int8", chips=["sm_89"])
    with pytest.raises(InputError, match=r"--precision must be fp16 or bf16 with --plugins, got 'fp32'"):
        export_tensorrt(checkpoint, target, "fp32", chips=["sm_89"], plugins=True)
    target.mkdir()
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        export_tensorrt(checkpoint, target, chips=["sm_89"])


def test_options_of_engines_are_refused_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--chip, --context and --plugins must be left out for --format onnx"):
        export_checkpoint(checkpoint, tmp_path / "package", chips=["sm_89"])


def test_without_tensorrt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rsvlm-infer\[tensorrt\]"'):
        export_tensorrt(checkpoint, tmp_path / "package", chips=["sm_89"])


def test_command_and_info(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    config = CONFIGS["retrieval"]  # few and small graphs
    target = tmp_path / "package"
    arguments = [
        "export",
        str(tiny_checkpoint(tmp_path, config)),
        "-o",
        str(target),
        "--format",
        "tensorrt",
        "--precision",
        "fp16",
    ]
    code, out, err = run(capsys, *arguments, "--chip", "sm_89")
    assert (code, out.strip()) == (0, str(target)), err
    assert "text_embed for sm_89" in err
    assert list((tmp_path / "home" / "engines").glob("*/text_embed-*.engine"))
    code, out, _ = run(capsys, "info", str(target))
    assert code == 0
    assert f"engines     sm_89 (tensorrt-rtx {library.version})" in out
    code, _, err = run(capsys, "verify", str(target), "--against", str(tmp_path / "checkpoint"), "--data", str(tmp_path))
    assert code != 0
    assert "engines have not met a GPU yet; verify an onnx package" in err
    flip_byte(target / ENGINES / "sm_89" / "text_embed.engine")
    code, out, _ = run(capsys, "info", str(target))
    assert code != 0
    assert "damaged: engines/sm_89/text_embed.engine" in out
