"""Rounding: codes mean what the runtime takes them for, compensation helps, layers that rounding hurts are kept finer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.packages import (
    BYTE_IMAGE,
    SPEAKING,
    Pair,
    export_checkpoint,
    greedy,
    make_pair,
    packed,
    prompt,
    query,
    relative,
    torch,
)

from rsvlm_export.calibrate import Seen, find_images, watch  # isort: skip
from rsvlm_export.linears import Linear, ModelWeights, model_weights
from rsvlm_export.onnx.builder import Graph, WeightFile
from rsvlm_export.onnx.parts import Precision, Source
from rsvlm_export.quantize import LIMITS, quantize, wants_hessian
from rsvlm_export.rounding import block_values, relative_error, round_blocks, round_rows, rounded_inputs, row_product
from rsvlm_infer.contract import GraphContract, TensorContract
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.package import Package

Get = Callable[..., Pair]


def _weight(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(outputs, inputs)) * inputs**-0.5).astype(np.float32)


def _inputs(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """Rows whose entries go together, as activations do."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, width // 4)) @ rng.normal(size=(width // 4, width)) + 0.1 * rng.normal(size=(rows, width))
    ).astype(np.float32)


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 255)])
@pytest.mark.parametrize("inputs", [32, 64, 100])
def test_nearest_codes_are_within_half_a_step(bits: int, steps: int, inputs: int) -> None:
    weight = _weight(7, inputs)
    codes = round_blocks(weight, bits)
    value = block_values(codes, inputs)
    assert value.shape == weight.shape
    step = np.repeat(codes.scales, 32, axis=1)[:, :inputs]
    inside = np.abs(value - weight) <= 0.51 * step
    assert inside.mean() > 0.9  # beyond half a step only what a shrunken range clips
    assert relative_error(value, weight) < 1.6 / steps


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 100])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_runtime_multiplies_what_the_codes_stand_for(tmp_path: Path, bits: int, inputs: int, rows: int) -> None:
    """accuracy_level 4 rounds inputs to int8 per block: 1 % of scale; a wrong nibble or zero gives 50 %."""
    weight = _weight(48, inputs)
    weight[3] += 0.5  # all codes on one side, so that the zeros matter
    linear = Linear("layer", "language", weight, np.arange(48, dtype=np.float32), "")
    codes = round_blocks(weight, bits, np.eye(inputs))
    found = _run_linear(tmp_path, linear, codes, x := _inputs(rows, inputs))
    assert linear.bias is not None
    assert relative(found, x @ block_values(codes, inputs).T + linear.bias) < 0.015
    exact = rounded_inputs(x) @ block_values(codes, inputs).T + linear.bias
    assert relative(found, exact) < 2e-3  # the rounding of inputs is the runtime's own


@pytest.mark.parametrize("rows", [1, 40])
def test_rows_with_rounded_inputs(tmp_path: Path, rows: int) -> None:
    linear = Linear("layer", "vision", _weight(48, 64), None, "")
    codes = round_rows(linear.weight)
    x = _inputs(rows, 64)
    found = _run_linear(tmp_path, linear, codes, x)
    assert relative(found, row_product(x, codes)) < 5e-3  # a half may be rounded to either side: one step of 255
    assert relative(found, x @ linear.weight.T) < 0.03
    assert row_product(np.zeros((2, 64), np.float32), codes).max() == 0


def _run_linear(folder: Path, linear: Linear, codes: Any, x: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    outputs, inputs = linear.weight.shape
    contract = GraphContract(
        "layer", (TensorContract("x", "float32", ("N", inputs)),), (TensorContract("y", "float32", ("N", outputs)),)
    )
    graph = Graph(contract, WeightFile(folder / "layer.weights"))
    source = Source(ModelWeights({"layer": linear}, {}), Precision("float16", {"layer": codes}))
    graph.rename(source.linear(graph, "x", "layer"), "y")
    session = onnxruntime.InferenceSession(str(graph.finish(folder)), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def test_compensation_errs_less_than_the_nearest_codes() -> None:
    weight, inputs = _weight(40, 96), _inputs(600, 96)
    x, fresh = inputs[:400], inputs[400:]
    nearest = block_values(round_blocks(weight, 4), 96)
    compensated = block_values(round_blocks(weight, 4, (x.T @ x).astype(np.float64)), 96)
    for rows in (x, fresh):  # also on inputs that it was not fitted to
        exact = rows @ weight.T
        assert relative_error(rows @ compensated.T, exact) < 0.6 * relative_error(rows @ nearest.T, exact)


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight, x = _weight(8, 64), _inputs(50, 64)
    x[:, 10:20] = 0
    value = block_values(round_blocks(weight, 4, (x.T @ x).astype(np.float64)), 64)
    assert np.isfinite(value).all()
    assert relative_error(value, weight) < 0.5


def _plan(linear: Linear, x: np.ndarray, precision: str) -> dict[str, Any]:
    seen = Seen((x.T @ x).astype(np.float64), 1, [x])
    (layer,) = quantize(ModelWeights({linear.name: linear}, {}), {linear.name: seen}, precision).layers
    return layer


def test_a_layer_that_rounding_hurts_is_kept_finer() -> None:
    smooth = Linear("a", "language", _weight(32, 64), None, "")
    assert _plan(smooth, _inputs(100, 64), "int4")["kept"] == "int4"
    spiky = _weight(32, 64)
    spiky[:, ::8] *= 300  # one weight of eight takes the whole range of its block
    x = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    x[:, ::8] = 0  # and is never used
    layer = _plan(Linear("b", "language", spiky, None, ""), x, "int4")
    assert layer["kept"] == "float16"
    assert set(layer["errors"]) == {"int4", "int8"}
    outlier = _inputs(100, 64)
    outlier[0, 0] = 1e4  # a massive activation eats the range of all inputs
    layer = _plan(Linear("c", "vision", _weight(32, 64), None, ""), outlier[1:], "int8")
    assert (layer["asked"], layer["kept"]) == ("int8_dynamic", "int8_dynamic")
    weight = _weight(32, 64)
    weight[:, 0] = 0
    assert _plan(Linear("d", "vision", weight, None, ""), outlier, "int8")["kept"] == "float16"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_are_spread_over_the_folder(images: Path, tmp_path: Path) -> None:
    assert [file.stem for file in find_images(images, 2)] == ["0", "1"]
    assert [file.stem for file in find_images(images, 9)] == ["0", "1", "2"]
    assert find_images(images / "1.png", 9) == [images / "1.png"]
    entries = [
        {"filename": f"{i}.png", "split": split, "theme": "river", "captions": ["x"]}
        for i, split in enumerate(("test", "train", "val"))
    ]
    (images / "images").mkdir()
    for i in range(3):
        (images / f"{i}.png").rename(images / "images" / f"{i}.png")
    (images / "captions.json").write_text(json.dumps(entries))
    assert [file.stem for file in find_images(images, 9)] == ["1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--calibrate"):
        find_images(tmp_path / "empty", 2)


def test_what_is_measured_was_not_fitted() -> None:
    seen = Seen(np.zeros((4, 4)))
    calls = [np.full((20, 4), value, np.float32) for value in range(1, 7)]
    seen.add(calls[0][:3])  # a step of few rows is fitted and not measured
    for rows in calls:
        seen.add(rows)
    assert [int(rows[0, 0]) for rows in seen.measured] == [3, 6]
    assert seen.hessian is not None
    assert seen.hessian[0, 0] == 3 + 20 * (1 + 4 + 16 + 25)
    few = Seen(None)
    few.add(calls[4])
    assert [int(rows[0, 0]) for rows in few.measured] == [5]


def test_watching_changes_nothing_and_sees_every_layer(pair: Get) -> None:
    made = pair("full")
    model = made.eager.model
    weights = model_weights(model)
    scene = packed(made.config, 90, 130)

    def run() -> None:
        (features,) = made.eager.encode([scene], [query(made.eager, 3)])
        made.eager.prefill([prompt(features, [3, 4])], 200)

    (before,) = made.eager.encode([scene])
    seen = watch(model, weights.linears.values(), wants_hessian("int4"), run)
    (after,) = made.eager.encode([scene])
    assert torch.equal(before.handle.tokens, after.handle.tokens)
    assert set(seen) == set(weights.linears)
    for name, each in seen.items():
        assert len(each.measured) > 0
        assert (each.hessian is not None) == name.startswith("language.")
    hidden = seen["language.0.gate_up"]
    assert hidden.hessian is not None
    assert len(hidden.hessian) == 48
    assert np.trace(hidden.hessian) > 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_stored_weights_stay_near(pair: Get, precision: str) -> None:
    """Weights rounded to 11 or 8 bits, arithmetic in float32."""
    made = pair("full", precision)
    scene = packed(made.config, 90, 130)
    (expected,), (found,) = made.eager.encode([scene]), made.onnx.encode([scene])
    limit = {"fp16": 5e-3, "bf16": 4e-2}[precision]
    assert 0 < relative(found.handle.tokens, expected.handle.tokens) < limit
    logits = [backend.prefill([prompt(each, [4])], 200)[0] for backend, each in ((made.eager, expected), (made.onnx, found))]
    assert relative(logits[1], logits[0]) < limit
    assert Package.open(made.package).manifest["stored"] == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    fp32 = (pair("full").package / "language.weights").stat().st_size
    assert (made.package / "language.weights").stat().st_size < 0.75 * fp32


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_packages_run_and_list_their_layers(tmp_path: Path, images: Path, precision: str) -> None:
    made = make_pair(tmp_path, SPEAKING, precision, calibrate=images, calibration_images=2)
    layers = {layer["name"]: layer for layer in Package.open(made.package).manifest["layers"]}
    assert {"vision.0.qkv", "language.1.down", "language.head"} <= set(layers)
    assert layers["vision.0.fc1"]["asked"] == "int8_dynamic"
    assert layers["language.0.qkv"]["asked"] == precision
    for layer in layers.values():
        assert layer["kept"] == "float16" or layer["errors"][layer["kept"]] <= LIMITS[layer["kept"]]
    scene = packed(made.config, 90, 130)
    (expected,), (found,) = made.eager.encode([scene]), made.onnx.encode([scene])
    error = relative(found.handle.tokens, expected.handle.tokens)
    assert 1e-4 < error < 0.3  # random weights: the codes are in use, and nothing is swapped
    assert len(greedy(made.onnx, [prompt(found, [5], BYTE_IMAGE)], 4)[0]) >= 1
    assert json.loads((made.package / "manifest.json").read_text())["precision"] == precision


def test_integers_need_images(pair: Get, tmp_path: Path) -> None:
    made = pair("llava")
    with pytest.raises(InputError, match="--calibrate must name images"):
        export_checkpoint(made.checkpoint, tmp_path / "x", precision="int4")
    with pytest.raises(InputError, match="--calibration-images"):
        export_checkpoint(made.checkpoint, tmp_path / "x", precision="int8", calibrate=tmp_path, calibration_images=0)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    with pytest.raises(InputError, match="can be read"):
        export_checkpoint(made.checkpoint, tmp_path / "x", precision="int8", calibrate=bad)
