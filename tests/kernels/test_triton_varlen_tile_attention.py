"""Tile attention in Triton against the eager definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.triton.varlen_tile_attention import (
    split_head,
    tile_schedule,
    varlen_tile_attention,
    varlen_tile_attention_qkv,
)
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention as eager
from tests.kernels.triton_cases import DTYPES, EPSILON, prefix_sums, random_tensor
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

LENGTHS = [[1], [13, 1, 64], list(AWKWARD_LENGTHS), [5, 0, 7], [0, 33, 0]]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    cu_k: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    out = varlen_tile_attention(q, k, v, cu, cu_k, scale=scale)
    reference = eager(q.double(), k.double(), v.double(), cu, cu_k, scale=scale)
    assert out.dtype == q.dtype
    assert_parity(out, eager(q, k, v, cu, cu_k, scale=scale), reference, epsilon=EPSILON[q.dtype])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128])
def test_awkward_lengths(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    cu = prefix_sums(list(AWKWARD_LENGTHS), device)
    _check(*(random_tensor(seed, int(cu[-1]), 2, head_dim, dtype=dtype, device=device) for seed in range(3)), cu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_few_many_and_empty_tiles(lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
    cu = prefix_sums(lengths, device)
    _check(*(random_tensor(seed, int(cu[-1]), 3, 40, dtype=dtype, device=device) for seed in range(3)), cu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.5, -0.5, 0.0])
def test_cross_attention_and_scale(scale: float | None, dtype: torch.dtype, device: torch.device) -> None:
    cu, cu_k = prefix_sums([4, 9, 3, 40], device), prefix_sums([7, 0, 2, 65], device).long()
    q = random_tensor(0, int(cu[-1]), 2, 32, dtype=dtype, device=device)
    k, v = (random_tensor(seed, int(cu_k[-1]), 2, 32, dtype=dtype, device=device) for seed in (1, 2))
    out = _check(q, k, v, cu, cu_k, scale)
    assert (out[4:13] == 0).all()  # a tile without keys


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_key_at_all(dtype: torch.dtype, device: torch.device) -> None:
    q, k = torch.ones(5, 2, 32, dtype=dtype, device=device), torch.ones(0, 2, 32, dtype=dtype, device=device)
    out = varlen_tile_attention(q, k, k, prefix_sums([2, 3], device), prefix_sums([0, 0], device))
    assert (out == 0).all()


def test_no_row(device: torch.device) -> None:
    q = torch.zeros(0, 2, 32, device=device)
    assert varlen_tile_attention(q, q, q, prefix_sums([0, 0], device)).shape == (0, 2, 32)
    assert varlen_tile_attention(q, q, q, prefix_sums([], device)).shape == (0, 2, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_fused_projection_with_bias(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    cu = prefix_sums([13, 0, 65], device)
    qkv = random_tensor(0, int(cu[-1]), 3, 2, head_dim, dtype=dtype, device=device)
    bias = random_tensor(1, 3, 2, head_dim, dtype=dtype, device=device)
    reference = eager(*(qkv.double() + bias.double()).unbind(1), cu)
    plain = eager(*(qkv + bias).unbind(1), cu)
    assert_parity(varlen_tile_attention_qkv(qkv, cu, bias), plain, reference, epsilon=EPSILON[dtype])
    # strided views of one tensor, without a copy
    assert_same_bits(
        varlen_tile_attention_qkv(qkv, cu), varlen_tile_attention(*(part.contiguous() for part in qkv.unbind(1)), cu)
    )


def test_columns_with_a_stride_are_read_right(device: torch.device) -> None:
    cu = prefix_sums([9, 6], device)
    q = random_tensor(0, 15, 2, 64, device=device)[:, :, ::2]
    assert_same_bits(varlen_tile_attention(q, q, q, cu), varlen_tile_attention(*[q.contiguous()] * 3, cu))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_has_the_same_bits_alone_among_others_and_again(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [13, 64, 5, 65]
    cu = prefix_sums(lengths, device)
    q, k, v = (random_tensor(seed, int(cu[-1]), 2, 72, dtype=dtype, device=device) for seed in range(3))
    together = varlen_tile_attention(q, k, v, cu)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        assert_same_bits(together[rows], varlen_tile_attention(q[rows], k[rows], v[rows], prefix_sums([length], device)))
        start += length
    for _ in range(2):
        assert_same_bits(varlen_tile_attention(q, k, v, cu), together)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    cu = prefix_sums([577, 16, 64, 256, 576] * 8, device)
    q = random_tensor(0, int(cu[-1]), 6, 64, dtype=dtype, device=device)
    first = varlen_tile_attention(q, q, q, cu)
    for _ in range(20):
        assert_same_bits(varlen_tile_attention(q, q, q, cu), first)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    keys=st.none() | st.lists(st.integers(0, 40), min_size=5, max_size=5),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 128),
    half=st.booleans(),
)
@settings(max_examples=30)
def test_drawn_shapes(
    device: torch.device, lengths: list[int], keys: list[int] | None, heads: int, head_dim: int, half: bool
) -> None:
    dtype = torch.float16 if half else torch.float32
    cu = prefix_sums(lengths, device)
    cu_k = None if keys is None else prefix_sums(keys[: len(lengths)], device)
    q = random_tensor(0, int(cu[-1]), heads, head_dim, dtype=dtype, device=device)
    k, v = (
        random_tensor(seed, int((cu if cu_k is None else cu_k)[-1]), heads, head_dim, dtype=dtype, device=device)
        for seed in (1, 2)
    )
    _check(q, k, v, cu, cu_k)


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=150))
@settings(max_examples=30)
def test_the_schedule_holds_every_block_once_longest_first(device: torch.device, lengths: list[int]) -> None:
    block, cu = 32, prefix_sums(lengths, device)
    schedule = tile_schedule(cu, cu, sum(lengths), block).cpu()
    work = schedule[schedule[:, 0] < schedule[:, 1]].tolist()
    assert schedule[len(work) :, :2].eq(0).all()  # spare places come last
    bounds = cu.tolist()
    order = sorted(range(len(lengths)), key=lambda tile: (-lengths[tile], tile))
    assert work == [
        [first, bounds[tile + 1], bounds[tile], lengths[tile]]
        for tile in order
        for first in range(bounds[tile], bounds[tile + 1], block)
    ]


def test_the_split_covers_the_head_and_saves_columns() -> None:
    assert [split_head(width) for width in (8, 16, 32, 64, 72, 80, 96, 100, 120, 128)] == [
        (16, 0),
        (16, 0),
        (32, 0),
        (64, 0),
        (64, 16),
        (64, 16),
        (64, 32),
        (128, 0),
        (128, 0),
        (128, 0),
    ]
    for width in range(1, 129):
        wide, narrow = split_head(width)
        assert wide + narrow >= width
        assert {wide, narrow} <= {0, 16, 32, 64, 128}


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    q, cu = torch.zeros(4, 2, 32, device=device), prefix_sums([4], device)
    with pytest.raises(InputError, match=r"k of varlen_tile_attention must have shape \[4, 2, 32\]"):
        varlen_tile_attention(q, q[:3], q[:3], cu)
    with pytest.raises(InputError, match="1 to 128 columns per head, got 160"):
        varlen_tile_attention(*[torch.zeros(4, 2, 160, device=device)] * 3, cu)
    with pytest.raises(InputError, match=r"q of varlen_tile_attention must be one of .*got torch.float64"):
        varlen_tile_attention(q.double(), q.double(), q.double(), cu)
    with pytest.raises(InputError, match="must have one dtype"):
        varlen_tile_attention(q, q.half(), q, cu)
    with pytest.raises(InputError, match="must be on"):
        varlen_tile_attention(q, q, q, cu.to("meta"))
