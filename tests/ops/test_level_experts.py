"""Experts that no router chooses, against routing in groups of one; the native twin against the definition."""

from __future__ import annotations

import pytest
import torch

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.grouped_experts import grouped_experts as native_grouped
from rsvlm_infer.kernels.native.level_experts import level_experts as native
from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.level_experts import level_experts
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.route import route
from tests.native import limited_to, needs_native, per_instruction_set, threads
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
KINDS = ("glu_silu", "gelu_mlp", "affine")
WIDTH, HIDDEN = 48, 80
Weights = list[torch.Tensor | None]


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def _weights(kind: str, levels: int, dtype: torch.dtype = torch.float32) -> Weights:
    """w_gate, w_up, w_down, b_up, b_down."""
    affine = kind == "affine"
    parts = [
        _random(2, levels, HIDDEN, WIDTH) if kind == "glu_silu" else None,
        None if affine else _random(3, levels, HIDDEN, WIDTH),
        _random(4, levels, WIDTH, WIDTH if affine else HIDDEN),
        _random(5, levels, HIDDEN) if kind == "gelu_mlp" else None,
        None if kind == "glu_silu" else _random(6, levels, WIDTH),
    ]
    return [None if part is None else part.to(dtype) for part in parts]


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _routed(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    return route(_random(1, sum(lengths), len(lengths)), _offsets(lengths), 1)


@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[7, 64, 13], [0, 5, 0], [0, 0, 0], [1], [65, 1]])
def test_equals_routing_in_groups_of_one(kind: str, lengths: list[int], dtype: torch.dtype) -> None:
    x, weights = _random(0, sum(lengths), WIDTH).to(dtype), _weights(kind, len(lengths), dtype)
    actual = level_experts(x, _offsets(lengths), *weights)
    tolerance = 8 * EPSILONS[dtype]  # fp32 sums of 48 and 80 products; bfloat16 rounds hidden values that differ in a last bit
    torch.testing.assert_close(actual, grouped_experts(x, *_routed(lengths), *weights), atol=tolerance, rtol=tolerance)
    if lengths[0] > 1:  # the second level's expert, and no other, made the second level's rows
        other = [None if part is None else part.flip(0) for part in weights]
        assert not torch.equal(level_experts(x, _offsets(lengths), *other)[:1], actual[:1])


def test_gradients_reach_rows_and_weights() -> None:
    lengths = [3, 0, 4]
    x, weights = _random(0, 7, WIDTH).requires_grad_(), _weights("glu_silu", 3)
    leaves = [x, *(part.requires_grad_() for part in weights if part is not None)]
    actual = torch.autograd.grad(level_experts(x, _offsets(lengths), *weights).square().sum(), leaves)
    expected = torch.autograd.grad(grouped_experts(x, *_routed(lengths), *weights).square().sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", AWKWARD_LENGTHS)
def test_native_is_at_most_twice_as_wrong(isa: str, dtype: torch.dtype, kind: str, tokens: int) -> None:
    lengths = [tokens, 0, 2 * tokens]
    x, weights = _random(0, 3 * tokens, WIDTH).to(dtype), _weights(kind, 3, dtype)
    wide = [None if part is None else part.double() for part in weights]
    with limited_to(isa):
        actual = native(x, _offsets(lengths), *weights)
        assert_same_bits(actual, native_grouped(x, *_routed(lengths), *weights))
        with threads(2):
            assert_same_bits(native(x, _offsets(lengths), *weights), actual)
        assert_same_bits(native(x[-1:], _offsets([0, 0, 1]), *weights), actual[-1:])
    eager = level_experts(x, _offsets(lengths), *weights)
    assert_parity(actual, eager, level_experts(x.double(), _offsets(lengths), *wide), epsilon=EPSILONS[dtype])


@needs_native
def test_native_takes_no_row_and_says_what_it_cannot_take() -> None:
    x, weights = _random(0, 4, WIDTH), _weights("gelu_mlp", 2)
    assert native(x[:0], _offsets([0, 0]), *weights).shape == (0, WIDTH)
    for offsets, message in (
        (_offsets([4]), r"level_offsets must be \[L \+ 1\] = \[3\], got \[2\]"),
        (_offsets([4, 1]), "must rise from 0 to at most tokens"),
    ):
        with pytest.raises(InputError, match=message):
            native(x, offsets, *weights)
    with pytest.raises(InputError, match="x must be float32 or bfloat16"):
        native(x.half(), _offsets([2, 2]), *weights)
    assert resolve("level_experts", "native") is native
