"""Packed weights: what rounding costs, the definition in float64, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.weight_matmul import lay_out_weights
from rsvlm_infer.kernels.native.weight_matmul import weight_matmul as native
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.weight_matmul import (
    PackedWeight,
    dequantise,
    join_weights,
    pack_weight,
    round_inputs,
    weight_matmul,
    without_codes,
)
from tests.native import limited_to, needs_native, per_instruction_set, threads
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
KINDS = ("bf16", "int8", "int4")


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_by_hand() -> None:
    weight = torch.zeros((2, 32))
    weight[0, :4] = torch.tensor([7.0, -7.0, 3.4, -0.6])
    packed = pack_weight(weight, "int4")
    assert packed.shape == (2, 32)
    assert packed.scales is not None
    assert packed.scales.tolist() == [[1.0], [0.0]]
    assert packed.codes[0, :3].tolist() == [15 | (1 << 4), 11 | (7 << 4), 8 | (8 << 4)]
    assert dequantise(packed)[0, :5].tolist() == [7.0, -7.0, 3.0, -1.0, 0.0]
    assert (dequantise(packed)[1] == 0).all()
    eight = pack_weight(weight * 127 / 7, "int8")
    assert eight.codes[0, :4].tolist() == [127, -127, 62, -11]


@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_rounding_is_at_most_half_a_step(kind: str, steps: int, scale_dtype: torch.dtype) -> None:
    weight = _random(0, 13, 96) * torch.logspace(-3, 1, 13)[:, None]
    error = (dequantise(pack_weight(weight, kind, scale_dtype=scale_dtype)) - weight).abs().view(13, 3, 32)
    largest = weight.abs().view(13, 3, 32).amax(dim=2, keepdim=True)
    # the scale itself is rounded too: 2**-11 of it, `steps` times
    assert (error <= largest / steps * (0.5 + steps * 2.0**-11) * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_dequantised_product_in_float64(kind: str) -> None:
    packed, x = pack_weight(_random(0, 7, 64), kind), _random(1, 2, 3, 64)
    expected = np.einsum("bni,oi->bno", x.double().numpy(), dequantise(packed).double().numpy())
    np.testing.assert_allclose(weight_matmul(x, packed).numpy(), expected, atol=1e-5)
    assert weight_matmul(x.bfloat16(), packed).dtype is torch.bfloat16


def test_rounded_inputs_by_hand() -> None:
    x = torch.zeros((3, 64))
    x[0, :4] = torch.tensor([127.0, -126.6, 0.5, 1.5])  # halves go to the even code
    x[0, 32:35] = torch.tensor([-2.54, 0.013, 0.001])
    x[1, 5], x[1, 40], x[2, 0] = 1e-40, 3.0, torch.inf
    rounded = round_inputs(x)
    assert rounded[0, :5].tolist() == [127.0, -127.0, 0.0, 2.0, 0.0]
    torch.testing.assert_close(rounded[0, 32:35], torch.tensor([-2.54, 0.02, 0.0]))
    assert (rounded[1, :32] == 0).all()
    assert rounded[1, 40] == 3.0
    assert rounded[2, :32].isnan().all()
    assert (rounded[2, 32:] == 0).all()
    with pytest.raises(InputError, match="In a multiple of 32"):
        round_inputs(torch.zeros(3, 40))


def test_what_cannot_be_packed() -> None:
    for arguments, message in (
        ((torch.zeros(2, 33), "int4"), "In a multiple of 32 for int4, got 33"),
        ((torch.zeros(2), "int8"), r"weight must be \[Out, In\] without empty sides, got \[2\]"),
        ((torch.zeros(0, 32), "bf16"), r"got \[0, 32\]"),
        ((torch.full((1, 32), torch.nan), "int8"), "weight must be finite"),
        ((torch.full((1, 32), 1e9), "int4"), "use scale_dtype=torch.float32"),
        ((torch.zeros(1, 32), "int3"), "kind must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            pack_weight(*arguments)
    with pytest.raises(InputError, match=r"x must be \[..., 32\] for this weight, got \[1, 33\]"):
        weight_matmul(torch.zeros(1, 33), pack_weight(torch.zeros(1, 32), "int4"))


@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_give_the_parts_products_side_by_side(kind: str) -> None:
    parts = [pack_weight(_random(seed, rows, 96), kind) for seed, rows in enumerate((5, 32, 70))]
    x = _random(9, 2, 3, 96).double()
    joined = join_weights(parts)
    assert joined.shape == (107, 96)
    assert_same_bits(dequantise(joined), torch.cat([dequantise(part) for part in parts]))
    apart = torch.cat([weight_matmul(x, part) for part in parts], dim=-1)
    torch.testing.assert_close(weight_matmul(x, joined), apart, atol=1e-12, rtol=0)


def test_what_cannot_be_joined() -> None:
    eight, four = pack_weight(torch.ones(1, 64), "int8"), pack_weight(torch.ones(1, 64), "int4")
    for parts, message in (
        ([], "at least one packed weight"),
        ([eight, four], "one kind, In, scale dtype and device"),
        ([eight, pack_weight(torch.ones(1, 32), "int8")], "int8 of In 32"),
        ([eight, pack_weight(torch.ones(1, 64), "int8", scale_dtype=torch.float32)], "scales torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            join_weights(parts)


def _twice_as_wrong(isa: str, tokens: int, dtype: torch.dtype, packed: PackedWeight) -> None:
    """`tokens` rows per call; 48 rows are judged together, so that eager's error is never that of one lucky row."""
    x = _random(1, 48, packed.shape[1]).to(dtype)
    with limited_to(isa):
        actual = torch.cat([native(part, packed) for part in x.split(tokens)])
    assert actual.dtype is x.dtype
    expected = weight_matmul(x.double(), packed)
    assert_parity(actual, weight_matmul(x, packed), expected, epsilon=EPSILONS[x.dtype])


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", AWKWARD_LENGTHS)
def test_native_is_at_most_twice_as_wrong(isa: str, dtype: torch.dtype, kind: str, rows: int) -> None:
    packed = pack_weight(_random(0, rows, 576), kind)
    for tokens in (1, 2, 3, 8, 13):
        _twice_as_wrong(isa, tokens, dtype, packed)


@per_instruction_set
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(1, 100),
    groups=st.integers(1, 5),
    odd=st.integers(0, 31),
    kind=st.sampled_from(KINDS),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    dtype=st.sampled_from(list(EPSILONS)),
)
def test_native_takes_any_shape(
    isa: str, tokens: int, rows: int, groups: int, odd: int, kind: str, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    columns = 32 * groups - (odd if kind == "bf16" else 0)
    packed = pack_weight(_random(0, rows, columns), kind, scale_dtype=scale_dtype)
    _twice_as_wrong(isa, tokens, dtype, packed)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_gives_the_same_bits_always(isa: str, dtype: torch.dtype, kind: str) -> None:
    packed, x = pack_weight(_random(0, 700, 576), kind), _random(1, 11, 576).to(dtype)
    with limited_to(isa):
        together = native(x, packed)
        for run in range(20):
            with threads(1 + run % 3):
                assert_same_bits(native(x, packed), together)
        for token in range(11):
            assert_same_bits(native(x[token : token + 1], packed), together[token : token + 1])
        wide = torch.zeros((11, 2 * 576), dtype=dtype)
        wide[:, ::2] = x
        assert_same_bits(native(wide[:, ::2], packed), together)
        assert_same_bits(native(x[:10].view(2, 5, 576), packed).flatten(0, 1), together[:10])
        assert_same_bits(native(x[0], packed), together[0])
        assert native(x[:0], packed).shape == (0, 700)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_gives_joined_weights_the_bits_of_their_parts(isa: str, dtype: torch.dtype, kind: str) -> None:
    parts, x = [pack_weight(_random(seed, rows, 576), kind) for seed, rows in enumerate((576, 192, 13))], _random(9, 3, 576)
    x = x.to(dtype)
    with limited_to(isa):
        for run in range(20):
            with threads(1 + run % 3):
                products = native(x, join_weights(parts)).split_with_sizes([576, 192, 13], -1)
            for product, part in zip(products, parts, strict=True):
                assert_same_bits(product.contiguous(), native(x, part))


@needs_native
def test_a_laid_out_weight_can_give_up_its_codes() -> None:
    weights, x = [pack_weight(_random(seed, 700, 576), kind) for seed, kind in enumerate(KINDS)], _random(9, 2, 576)
    expected = [native(x, packed) for packed in weights]
    with pytest.raises(InputError, match="packed must have a layout before its codes can go"):
        without_codes(pack_weight(torch.ones(1, 32), "int4"))
    places = [weight.memory.data_ptr() for weight in lay_out_weights(weights)]
    assert [place % 64 for place in places] == [0, 0, 0]
    light = [without_codes(packed) for packed in weights]
    del weights
    for packed, same in zip(light, expected, strict=True):
        assert packed.shape == (700, 576)
        assert_same_bits(native(x, packed), same)
        for refuses in (
            lambda p=packed: weight_matmul(x, p),
            lambda p=packed: join_weights([p]),
            lambda p=packed: lay_out_weights([p]),
        ):
            with pytest.raises(InputError, match=r"packed must have its codes, got layouts of \['native'\] alone"):
                refuses()
    with pytest.raises(InputError, match=r"x must be \[..., 576\] for this weight, got \[1, 32\]"):
        native(_random(1, 1, 32), light[0])


@per_instruction_set
@pytest.mark.parametrize("kind", KINDS)
def test_native_reads_every_code_and_scale_right(isa: str, kind: str) -> None:
    """One column at a time: the product is the weight itself, so every code and every kind of float16 scale shows."""
    weight = torch.arange(-7.0, 8.0).repeat(5)[:64].repeat(3, 1) * torch.tensor([1e-6, 1.0, 8000.0])[:, None]
    packed = pack_weight(weight, kind)  # the first row's scales are float16 denormals
    with limited_to(isa):
        assert_same_bits(native(torch.eye(64), packed), dequantise(packed).T.contiguous())


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_keeps_nan_and_infinity_in_their_row(isa: str, dtype: torch.dtype) -> None:
    packed, x = pack_weight(_random(0, 40, 64), "int4"), _random(1, 3, 64).to(dtype)
    x[1, 5] = torch.nan
    x[2, 7] = torch.inf
    with limited_to(isa):
        actual = native(x, packed)
    expected = weight_matmul(x, packed)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    packed = pack_weight(_random(0, 4, 64), "int8")
    with pytest.raises(InputError, match="x must be float32 or bfloat16"):
        native(_random(1, 2, 64).half(), packed)
    with pytest.raises(InputError, match="x must not require a gradient"):
        native(_random(1, 2, 64).requires_grad_(), packed)
    with pytest.raises(InputError, match=r"x must be \[..., 64\] for this weight, got \[2, 32\]"):
        native(_random(1, 2, 32), packed)
    assert resolve("weight_matmul", "native") is native
