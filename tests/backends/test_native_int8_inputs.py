"""Products in integers of the native backend against their definition, `round_inputs` and `weight_matmul`; and who asks for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.errors import CheckpointError
from tests.native import needs_native, per_instruction_set, threads

pytest.importorskip("torch", reason="packages are made with torch, and eager is the reference")

import torch

from rsvlm_export.native import export_native
from rsvlm_infer.backends import Prompt
from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.models.native_package import NativePackage
from rsvlm_infer.ops.weight_matmul import PackedWeight, pack_weight, round_inputs, weight_matmul
from tests.backends.native_packages import CONFIG, packed_scene, write_package
from tests.native import limited_to
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

pytestmark = needs_native
WIDE = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, hidden_size=64, intermediate_size=96),
    language=dataclasses.replace(CONFIG.language, hidden_size=64, intermediate_size=96, head_dim=16),
)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _laid_out(packed: PackedWeight) -> tuple[str, int, int, np.ndarray]:
    from rsvlm_infer import _C

    shape: dict[str, Any] = {"kind": packed.kind, "rows": packed.shape[0], "columns": packed.shape[1], "wide_scales": False}
    layout = np.empty(_C.weight_layout_bytes(**shape), np.uint8)
    assert packed.scales is not None
    _C.lay_out_weight(**shape, codes=packed.codes.data_ptr(), scales=packed.scales.data_ptr(), layout=layout.ctypes.data)
    return packed.kind, packed.shape[0], packed.shape[1], layout


def _few(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """Through the head of a language model without layers: the product of steps."""
    from rsvlm_infer import _C

    rows, columns = packed.shape
    names = ("intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps")
    settings = {"vocab_size": rows, "hidden_size": columns, **dict(zip(names, (32, 0, 1, 1, 2, 1e-5), strict=True))}
    decoder = _C.NativeDecoder(
        weights={
            "language_model.embed_tokens": _laid_out(packed),
            "language_model.norm.weight": ("", columns, 0, np.ones(columns, np.float32).view(np.uint8)),
        },
        settings=settings,
        frequencies=np.ones(1, np.float32),
        cache="float32",
        int8_inputs=["language_model."],
    )
    return torch.from_numpy(decoder.logits(states=x.numpy()))


def _many(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """Through the patch embedding of an encoder without blocks: the product of prompts and images."""
    from rsvlm_infer import _C
    from rsvlm_infer.backends.native import _scene_settings

    rows, columns = packed.shape
    settings = _scene_settings(CONFIG) | dict.fromkeys(
        ("embed", "augmentation_heads", "experts", "projector", "class_token"), 0.0
    )
    settings |= {"vision_hidden": rows, "patch_values": columns}
    settings |= {name: 0 for name in settings if name.startswith("tap_")}
    model = _C.NativeSceneModel(
        weights={"vision_encoder.patch_embed": _laid_out(packed)}, settings=settings, int8_inputs=["vision_encoder."]
    )
    places = np.zeros((len(x), rows), np.float32)
    return torch.from_numpy(model.encode(patches=x.numpy(), positions=[places], bounds=[0, len(x)])[0])


@per_instruction_set
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("product", [_few, _many])
@pytest.mark.parametrize("rows", [*AWKWARD_LENGTHS, 100])
def test_a_product_is_that_of_the_rounded_inputs(isa: str, kind: Any, product: Any, rows: int) -> None:
    packed, generator = pack_weight(_random(0, rows, 192), kind), torch.Generator().manual_seed(rows)
    for tokens in (1, 2, 3, 4, 5, 8, 13, 245):
        x = _random(tokens, tokens, 192) * torch.logspace(-3, 3, 192)[torch.randperm(192, generator=generator)]
        x[0, 32:64] = 0
        with limited_to(isa):
            actual = product(packed, x)
        rounded = round_inputs(x)
        assert_parity(actual, weight_matmul(rounded, packed), weight_matmul(rounded.double(), packed), epsilon=2.0**-23)


@per_instruction_set
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_and_many_rows_have_the_same_bits(isa: str, kind: Any) -> None:
    packed, x = pack_weight(_random(0, 70, 96), kind), _random(1, 250, 96)
    with limited_to(isa):
        whole = _many(packed, x)
        for first, stop in ((0, 1), (3, 5), (100, 108), (239, 250)):
            assert_same_bits(_few(packed, x[first:stop]), whole[first:stop])
            assert_same_bits(_many(packed, x[first:stop]), whole[first:stop])
        with threads(3):
            assert_same_bits(_many(packed, x), whole)


@per_instruction_set
@pytest.mark.parametrize("product", [_few, _many])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_no_number_stays_in_its_row(isa: str, product: Any, kind: Any) -> None:
    packed, x = pack_weight(_random(0, 40, 64), kind), _random(1, 5, 64)
    x[1, 3], x[3, 63] = torch.nan, -torch.inf
    x[4] = 1e-42
    with limited_to(isa):
        actual = product(packed, x)
    assert actual.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert actual.isfinite().all(dim=1).tolist() == [True, False, True, False, True]
    assert (actual[4] == 0).all()


def test_the_manifest_says_which_matrices_round_their_inputs(tmp_path: Path) -> None:
    checkpoint, folder = write_package(tmp_path, WIDE, "int8")
    package = NativePackage.open(folder)
    assert package.int8_inputs == ["language_model.", "vision_encoder.blocks."]
    assert package.weights["vision_encoder.blocks.0.attention.qkv"][0] == "int8"
    assert package.weights["projector.fc1"][0] == "bf16"
    assert NativePackage.open(write_package(tmp_path, WIDE, "bf16")[1]).int8_inputs == []
    language = export_native(checkpoint, tmp_path / "language", "int8", int8_inputs=["language_model."])
    assert NativePackage.open(language).weights["vision_encoder.blocks.0.attention.qkv"][0] == "bf16"

    scene, prompt = packed_scene(WIDE, 60, 60), [Prompt(np.arange(3, 40, dtype=np.int32))]
    exact = NativeBackend.load(write_package(tmp_path, WIDE, "fp32")[1])
    found, embedded = {}, []
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, inputs in (("integers", manifest["int8_inputs"]), ("floats", [])):
        (folder / "manifest.json").write_text(json.dumps(manifest | {"int8_inputs": inputs}))
        backend = NativeBackend.load(folder)
        found[name] = [backend.encode([scene])[0].handle.tokens, backend.prefill(prompt, 50)[0]]
        embedded.append(backend.embed_text([prompt[0].token_ids]))
    np.testing.assert_array_equal(*embedded)  # texts are embedded from inputs in floats either way
    expected = [exact.encode([scene])[0].handle.tokens, exact.prefill(prompt, 50)[0]]
    for integers, floats, right in zip(found["integers"], found["floats"], expected, strict=True):
        assert not np.array_equal(integers, floats)
        assert np.abs(integers - right).max() < 0.1 * np.abs(right).max()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"int8_inputs": "all"}))
    with pytest.raises(CheckpointError, match="int8_inputs must be a list of beginnings of names, got 'all'"):
        NativePackage.open(folder)
