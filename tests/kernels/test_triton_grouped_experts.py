"""Grouped experts in Triton against the eager definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.triton.grouped_experts import grouped_experts
from rsvlm_infer.kernels.triton.level_experts import level_experts
from rsvlm_infer.ops.grouped_experts import grouped_experts as eager
from rsvlm_infer.ops.level_experts import level_experts as eager_level
from rsvlm_infer.ops.route import route
from tests.kernels.triton_cases import DTYPES, EPSILON, prefix_sums, random_tensor
from tests.parity import assert_parity, assert_same_bits

KINDS = ("glu_silu", "gelu_mlp", "affine")
Weights = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _weights(kind: str, experts: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Weights:
    def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
        return (random_tensor(seed, experts, rows, columns) * columns**-0.5).to(device, dtype)

    def bias(seed: int, rows: int) -> torch.Tensor:
        return random_tensor(seed, experts, rows, dtype=dtype, device=device)

    if kind == "glu_silu":
        return matrix(2, hidden, width), matrix(3, hidden, width), matrix(4, width, hidden), None, None
    if kind == "gelu_mlp":
        return None, matrix(3, hidden, width), matrix(4, width, hidden), bias(5, hidden), bias(6, width)
    return None, None, matrix(4, width, width), None, bias(6, width)


def _check(x: torch.Tensor, routed: tuple[torch.Tensor, ...], weights: Weights) -> torch.Tensor:
    actual = grouped_experts(x, *routed, *weights)
    wide = [None if part is None else part.double() for part in weights]
    reference = eager(x.double(), *routed, *wide)
    assert actual.dtype == x.dtype
    assert_parity(actual, eager(x, *routed, *weights), reference, epsilon=EPSILON[x.dtype])
    return actual


def _routed(tokens: list[int], experts: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return route(random_tensor(1, sum(tokens), experts, device=device), prefix_sums(tokens, device), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "width", "hidden"),
    [
        ([5, 0, 12], 6, 2, 48, 80),  # empty experts, widths that no block divides
        ([1, 0, 0], 12, 2, 64, 32),  # one token
        ([40], 1, 1, 32, 64),  # E = 1
        ([9, 65], 4, 2, 32, 96),  # k = E of the group
        ([7, 64, 13], 3, 1, 64, 64),  # groups of one
    ],
)
def test_awkward_routings(
    tokens: list[int], experts: int, k: int, width: int, hidden: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = random_tensor(0, sum(tokens), width, dtype=dtype, device=device)
    _check(x, _routed(tokens, experts, k, device), _weights(kind, experts, width, hidden, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_level_experts_need_no_routing(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    tokens, offsets = [33, 0, 13], prefix_sums([33, 0, 13], device)
    x, weights = random_tensor(0, 46, 48, dtype=dtype, device=device), _weights(kind, 3, 48, 40, dtype, device)
    actual = level_experts(x, offsets, *weights)
    assert_same_bits(actual, _check(x, _routed(tokens, 3, 1, device), weights))
    wide = [None if part is None else part.double() for part in weights]
    assert_parity(actual, eager_level(x, offsets, *weights), eager_level(x.double(), offsets, *wide), epsilon=EPSILON[dtype])
    # the first row of its level: numpy, which multiplies in the interpreter, may sum in another order at another row of a block
    assert_same_bits(level_experts(x[33:34], prefix_sums([0, 0, 1], device), *weights), actual[33:34])
    assert level_experts(x[:0], prefix_sums([0, 0, 0], device), *weights).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_among_others_and_again(dtype: torch.dtype, device: torch.device) -> None:
    x, logits = random_tensor(0, 70, 48, dtype=dtype, device=device), random_tensor(1, 70, 6, device=device)
    weights = _weights("glu_silu", 6, 48, 40, dtype, device)
    routed = route(logits, prefix_sums([30, 40], device), 2)
    together = grouped_experts(x, *routed, *weights)
    alone = grouped_experts(x[31:32], *route(logits[31:32], prefix_sums([0, 1], device), 2), *weights)
    assert_same_bits(alone, together[31:32])
    assert_same_bits(grouped_experts(x, *routed, *weights), together)


def test_rows_with_a_stride_and_no_row(device: torch.device) -> None:
    wide, routed = random_tensor(0, 17, 96, device=device), _routed([17], 2, 1, device)
    weights = _weights("glu_silu", 2, 48, 32, torch.float32, device)
    assert_same_bits(
        grouped_experts(wide[:, :48], *routed, *weights), grouped_experts(wide[:, :48].contiguous(), *routed, *weights)
    )
    none = route(torch.zeros((0, 2), device=device), prefix_sums([0], device), 1)
    assert grouped_experts(wide[:0, :48], *none, *weights).shape == (0, 48)


@given(
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    group=st.integers(1, 4),
    k=st.integers(1, 4),
    width=st.integers(1, 70),
    hidden=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    half=st.booleans(),
)
@settings(max_examples=20)
def test_drawn_shapes(
    device: torch.device, tokens: list[int], group: int, k: int, width: int, hidden: int, kind: str, half: bool
) -> None:
    dtype, experts = torch.float16 if half else torch.float32, group * len(tokens)
    x = random_tensor(0, sum(tokens), width, dtype=dtype, device=device)
    _check(x, _routed(tokens, experts, min(k, group), device), _weights(kind, experts, width, hidden, dtype, device))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, routed = torch.zeros(4, 32, device=device), _routed([4], 2, 1, device)
    gate, up, down, *_ = _weights("glu_silu", 2, 32, 16, torch.float32, device)
    with pytest.raises(InputError, match=r"w_up of grouped_experts must have shape \[2, 16, 32\]"):
        grouped_experts(x, *routed, gate, down, down)
    with pytest.raises(InputError, match="must be given with w_gate"):
        grouped_experts(x, *routed, torch.zeros(2, 32, 32, device=device), None, torch.zeros(2, 32, 32, device=device))
    with pytest.raises(InputError, match="of grouped_experts must have x's dtype"):
        grouped_experts(x, *routed, gate, up, down.half())
    with pytest.raises(InputError, match="of level_experts must have x's dtype"):
        level_experts(x, prefix_sums([4, 0], device), gate, up, down.half())
    with pytest.raises(InputError, match=r"level_offsets of level_experts must have shape \[3\], got \[2\]"):
        level_experts(x, prefix_sums([4], device), gate, up, down)
