"""The definition of tile attention against softmax(q·k)·v written out in float64 numpy, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.varlen_tile_attention import varlen_tile_attention as native
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from tests.native import limited_to, needs_native, per_instruction_set, threads
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits, to_float64

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def _written_out(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bounds: list[int], bounds_k: list[int], scale: float
) -> np.ndarray:
    out = np.zeros_like(q)
    for tile in range(len(bounds) - 1):
        rows, keys = slice(bounds[tile], bounds[tile + 1]), slice(bounds_k[tile], bounds_k[tile + 1])
        if bounds_k[tile + 1] == bounds_k[tile]:
            continue
        scores = np.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[rows] = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v[keys])
    return out


def _packed(lengths: list[int], heads: int, head_dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((int(cu_seqlens[-1]), heads, head_dim), generator=generator), cu_seqlens


@pytest.mark.parametrize("head_dim", [8, 64, 72, 80])
@pytest.mark.parametrize("lengths", [[1], [13, 1, 64], list(AWKWARD_LENGTHS), [5, 0, 7]])
def test_equals_softmax_written_out(lengths: list[int], head_dim: int) -> None:
    (q, cu_seqlens), (k, _), (v, _) = (_packed(lengths, 3, head_dim, seed) for seed in range(3))
    expected = _written_out(
        *(part.double().numpy() for part in (q, k, v)), cu_seqlens.tolist(), cu_seqlens.tolist(), head_dim**-0.5
    )
    np.testing.assert_allclose(varlen_tile_attention(q, k, v, cu_seqlens).numpy(), expected, atol=2e-6)


def test_cross_attention_has_its_own_keys_and_scale() -> None:
    q, cu_seqlens = _packed([4, 9, 3], 2, 16, 0)
    (k, cu_seqlens_k), (v, _) = _packed([7, 0, 2], 2, 16, 1), _packed([7, 0, 2], 2, 16, 2)
    out = varlen_tile_attention(q, k, v, cu_seqlens, cu_seqlens_k, scale=0.5)
    expected = _written_out(*(part.double().numpy() for part in (q, k, v)), cu_seqlens.tolist(), cu_seqlens_k.tolist(), 0.5)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)
    assert (out[4:13] == 0).all()  # a tile without keys


def test_a_tile_is_the_same_alone_and_among_others() -> None:
    q, cu_seqlens = _packed([13, 64, 5], 2, 32, 3)
    together = varlen_tile_attention(q, q, q, cu_seqlens)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = q[start:stop]
        assert_same_bits(together[start:stop], varlen_tile_attention(part, part, part, torch.tensor([0, stop - start])))


def test_permuted_tiles_give_permuted_results() -> None:
    lengths, order = [13, 4, 31], [2, 0, 1]
    q, cu_seqlens = _packed(lengths, 2, 16, 4)
    tiles = list(q.split(lengths))
    permuted = torch.cat([tiles[place] for place in order])
    bounds = torch.tensor([0, *np.cumsum([lengths[place] for place in order])])
    plain = list(varlen_tile_attention(q, q, q, cu_seqlens).split(lengths))
    assert_same_bits(varlen_tile_attention(permuted, permuted, permuted, bounds), torch.cat([plain[place] for place in order]))


def test_strided_views_are_read_right() -> None:
    fused, cu_seqlens = _packed([9, 6], 6, 16, 5)
    q, k, v = fused[:, :2], fused[:, 2:4], fused[:, 4:]
    expected = varlen_tile_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens)
    torch.testing.assert_close(varlen_tile_attention(q, k, v, cu_seqlens), expected, atol=1e-6, rtol=1e-6)


def _both(
    isa: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *bounds: torch.Tensor,
    dtype: torch.dtype,
    scale: float | None = None,
) -> None:
    """The native twin under the two-times rule; float64 is the reference, so that eager's own float32 error counts."""
    low = [part.to(dtype) for part in (q, k, v)]
    with limited_to(isa):
        actual = native(*low, *bounds, scale=scale)
    assert actual.dtype is dtype
    expected = varlen_tile_attention(*(part.double() for part in low), *bounds, scale=scale)
    assert_parity(actual, varlen_tile_attention(*low, *bounds, scale=scale), expected, epsilon=EPSILONS[dtype])


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("head_dim", [7, 32, 64, 72, 80, 128])
def test_native_is_at_most_twice_as_wrong(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    lengths = [*AWKWARD_LENGTHS, 0, 130]
    (q, cu_seqlens), (k, _), (v, _) = (_packed(lengths, 3, head_dim, seed) for seed in range(3))
    _both(isa, q, k, v, cu_seqlens, dtype=dtype)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 130),
    scale=st.sampled_from([None, 0.2, -0.1, 0.0]),
)
def test_native_cross_attention_of_any_shape(
    isa: str, dtype: torch.dtype, lengths: list[tuple[int, int]], heads: int, head_dim: int, scale: float | None
) -> None:
    lengths = [*lengths, (40, 90)]  # a full tile, so that eager's error is never that of a few lucky rows
    q, cu_seqlens = _packed([rows for rows, _ in lengths], heads, head_dim, 0)
    (k, cu_seqlens_k), (v, _) = (_packed([keys for _, keys in lengths], heads, head_dim, seed) for seed in (1, 2))
    _both(isa, q, k, v, cu_seqlens, cu_seqlens_k, dtype=dtype, scale=scale)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_gives_the_same_bits_always(isa: str, dtype: torch.dtype) -> None:
    lengths = [13, 200, 1, 64]
    q, k, v = (_packed(lengths, 2, 72, seed)[0].to(dtype) for seed in range(3))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    with limited_to(isa):
        together = native(q, k, v, cu_seqlens)
        for _ in range(20):
            assert_same_bits(native(q, k, v, cu_seqlens), together)
        for count in (1, 2, 5):  # more threads split a tile's queries
            with threads(count):
                assert_same_bits(native(q, k, v, cu_seqlens), together)
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            alone = native(q[start:stop], k[start:stop], v[start:stop], torch.tensor([0, stop - start]))
            assert_same_bits(alone, together[start:stop])
        # a query does not notice the other queries of its tile
        one = native(q[50:51], k[13:213], v[13:213], torch.tensor([0, 1]), torch.tensor([0, 200]))
        assert_same_bits(one, together[50:51])


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_reads_strided_views(isa: str, dtype: torch.dtype) -> None:
    fused, cu_seqlens = _packed([9, 70], 6, 32, 5)
    fused = fused.to(dtype)
    q, k, v = fused[:, :2], fused[:, 2:4], fused[:, 4:]
    with limited_to(isa):
        expected = native(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens)
        assert_same_bits(native(q, k, v, cu_seqlens), expected)
        spread = torch.zeros((*q.shape[:2], 64), dtype=dtype)[..., ::2].copy_(q)  # the head dimension itself is strided
        assert_same_bits(native(spread, k, v, cu_seqlens), expected)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_nan_and_infinity_go_where_softmax_sends_them(isa: str, dtype: torch.dtype) -> None:
    lengths = [5, 100]
    q, k, v = (_packed(lengths, 1, 32, seed)[0].to(dtype) for seed in range(3))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    q[2, 0, 0] = float("nan")  # one row of tile 0
    k[40, 0, :] = 0
    k[40, 0, 3] = float("inf")  # every row of tile 1, or those with a positive q
    v[70, 0, 5] = float("nan")  # one column of tile 1
    # not torch's SDPA: it gives zeros for a row whose scores are all NaN, as if its keys were masked
    bounds = cu_seqlens.tolist()
    with np.errstate(invalid="ignore"):
        expected = _written_out(*(part.double().numpy() for part in (q, k, v)), bounds, bounds, 32**-0.5)
    with limited_to(isa):
        actual = native(q, k, v, cu_seqlens)
    assert np.array_equal(np.isnan(to_float64(actual)), np.isnan(expected))
    assert 0 < np.isnan(expected).sum() < expected.size
    # keys that cannot be seen at all, then keys that can: the first block must not poison the rest
    k = torch.full((130, 1, 32), -float("inf"), dtype=dtype)
    k[100:] = 1
    ones = torch.ones((1, 1, 32), dtype=dtype)
    with limited_to(isa):
        out = native(ones, k, torch.ones((130, 1, 32), dtype=dtype), torch.tensor([0, 1]), torch.tensor([0, 130]))
    assert (out == 1).all()


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    q, cu_seqlens = _packed([4, 3], 2, 16, 0)
    for arguments, message in (
        ((q.half(), q.half(), q.half(), cu_seqlens), "q must be float32 or bfloat16"),
        ((q, q.bfloat16(), q, cu_seqlens), "k must be float32 or bfloat16 like its neighbours"),
        ((q, q[:, :1], q, cu_seqlens), r"k must be \[Sk, H, D\] = \['any', 2, 16\], got \[7, 1, 16\]"),
        ((q, q, q, torch.tensor([0, 9])), r"cu_seqlens must rise from 0 to at most 7 rows, got \[0, 9\]"),
        ((q, q, q, torch.tensor([0, 5, 4])), "cu_seqlens must rise"),
        ((q, q[:3], q[:3], cu_seqlens), "keys must have the tiles of queries"),
        ((q.clone().requires_grad_(), q, q, cu_seqlens), "q must not require a gradient"),
    ):
        with pytest.raises(InputError, match=message):
            native(*arguments)
    assert native(q, q, q, torch.tensor([0, 2]))[2:].eq(0).all()  # rows of no tile
    assert native(q[:0], q[:0], q[:0], torch.tensor([0])).shape == (0, 2, 16)
    assert resolve("varlen_tile_attention", "native") is native


@needs_native
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    from rsvlm_infer import _C

    with pytest.raises(ValueError, match=r"isa must be one of auto, portable.*got 'sse9'"):
        _C.limit_isa(isa="sse9")
