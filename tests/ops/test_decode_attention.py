"""Cached causal attention against softmax written out in float64, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.decode_attention import decode_attention as native
from rsvlm_infer.ops.decode_attention import decode_attention
from rsvlm_infer.ops.registry import resolve
from tests.native import limited_to, needs_native, per_instruction_set, threads
from tests.parity import assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: np.ndarray) -> np.ndarray:
    q64, k64, v64 = (part.double().numpy() for part in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k64, v64 = k64.repeat(groups, axis=2), v64.repeat(groups, axis=2)
    scores = np.einsum("bnhd,bchd->bhnc", q64, k64) * q.shape[-1] ** -0.5
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhnc,bchd->bnhd", weights / weights.sum(axis=-1, keepdims=True), v64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (4, 1)])
def test_each_row_sees_its_own_past(heads: int, kv_heads: int) -> None:
    q, k, v = _random(0, 3, 1, heads, 16), _random(1, 3, 13, kv_heads, 16), _random(2, 3, 13, kv_heads, 16)
    positions = torch.tensor([[0], [5], [12]])
    seen = np.arange(13)[None, None] <= positions.numpy()[..., None]
    np.testing.assert_allclose(decode_attention(q, k, v, positions).numpy(), _written_out(q, k, v, seen), atol=2e-6)


def test_what_lies_beyond_a_row_does_not_matter() -> None:
    q, k, v = _random(0, 2, 1, 4, 8), _random(1, 2, 7, 2, 8), _random(2, 2, 7, 2, 8)
    positions = torch.tensor([[2], [4]])
    plain = decode_attention(q, k, v, positions)
    k[0, 3:], v[0, 3:], k[1, 5:], v[1, 5:] = 1e4, 1e4, -1e4, -1e4
    assert torch.equal(decode_attention(q, k, v, positions), plain)


def test_prefill_equals_steps() -> None:
    q, k, v = _random(0, 1, 6, 4, 8), _random(1, 1, 6, 2, 8), _random(2, 1, 6, 2, 8)
    positions = torch.arange(6)[None]
    whole = decode_attention(q, k, v, positions)
    for step in range(6):
        one = decode_attention(q[:, step : step + 1], k, v, positions[:, step : step + 1])
        torch.testing.assert_close(whole[:, step : step + 1], one, atol=1e-6, rtol=1e-6)


def test_an_explicit_mask_takes_the_place_of_causality() -> None:
    q, k, v = _random(0, 1, 4, 2, 8), _random(1, 1, 4, 2, 8), _random(2, 1, 4, 2, 8)
    mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]], dtype=torch.bool)
    actual = decode_attention(q, k, v, torch.zeros((1, 4), dtype=torch.long), mask)
    np.testing.assert_allclose(actual.numpy(), _written_out(q, k, v, mask.numpy()), atol=2e-6)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_a_token_that_may_see_nothing_gets_zeros(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (_random(i, 2, n, h, 16).to(dtype) for i, (n, h) in enumerate(((3, 4), (600, 2), (600, 2))))
    mask = torch.zeros((2, 3, 600), dtype=torch.bool)
    mask[0, 1, 599] = True  # in the last chunk of the cache; all other tokens see nothing
    expected = decode_attention(q, k, v, torch.zeros((2, 3), dtype=torch.long), mask)
    with limited_to(isa):
        actual = native(q, k, v, torch.zeros((2, 3), dtype=torch.long), mask)
    assert torch.equal(actual == 0, expected == 0)
    assert (actual != 0).any(dim=(2, 3)).tolist() == [[False, True, False], [False, False, False]]
    torch.testing.assert_close(actual[0, 1].view(2, 2, 16)[:, 0], v[0, 599])


def _twice_as_wrong(
    isa: str,
    dtype: torch.dtype,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *mask: torch.Tensor,
) -> None:
    low = [part.to(dtype) for part in (q, k, v)]
    with limited_to(isa):
        actual = native(*low, positions, *mask)
    assert actual.dtype is dtype
    expected = decode_attention(*(part.double() for part in low), positions, *mask)
    assert_parity(actual, decode_attention(*low, positions, *mask), expected, epsilon=EPSILONS[dtype])


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("head_dim", [7, 32, 64, 72, 80, 128])
@pytest.mark.parametrize("tokens", [1, 3, 8, 130])
def test_native_is_at_most_twice_as_wrong(isa: str, dtype: torch.dtype, head_dim: int, tokens: int) -> None:
    capacity = 530
    q, k, v = (_random(i, 3, n, h, head_dim) for i, (n, h) in enumerate(((tokens, 6), (capacity, 2), (capacity, 2))))
    positions = torch.tensor([[0], [255], [capacity - tokens]]) + torch.arange(tokens)
    _twice_as_wrong(isa, dtype, q, k, v, positions)


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 100),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_takes_any_shape(
    isa: str, dtype: torch.dtype, batch: int, tokens: int, kv_heads: int, group: int, head_dim: int, masked: bool, seed: int
) -> None:
    batch, capacity = batch + 8, 70  # enough rows that eager's error is not that of a few lucky ones
    q, k, v = (
        _random(seed + i, batch, n, h, head_dim)
        for i, (n, h) in enumerate(((tokens, kv_heads * group), *[(capacity, kv_heads)] * 2))
    )
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, capacity, (batch, tokens), generator=generator)
    mask = torch.rand((batch, tokens, capacity), generator=generator) < 0.3
    mask[..., 0] = True
    _twice_as_wrong(isa, dtype, q, k, v, positions, *([mask] if masked else []))


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_native_gives_the_same_bits_always(isa: str, dtype: torch.dtype, tokens: int) -> None:
    q, k, v = (_random(i, 3, n, h, 64).to(dtype) for i, (n, h) in enumerate(((tokens, 9), (700, 3), (700, 3))))
    positions = torch.tensor([[3], [300], [499]]) + torch.arange(tokens)
    with limited_to(isa):
        together = native(q, k, v, positions)
        for run in range(20):
            with threads(1 + run % 3):
                assert_same_bits(native(q, k, v, positions), together)
        for row in range(3):
            assert_same_bits(
                native(q[row : row + 1], k[row : row + 1], v[row : row + 1], positions[row : row + 1]), together[row : row + 1]
            )
        # what lies beyond a row's positions does not matter, nor does the capacity; views of a larger cache are read in place
        larger = [torch.full((2, 3, 900, 3, 64), torch.nan, dtype=dtype) for _ in range(2)]
        for cache, part in zip(larger, (k, v), strict=True):
            cache[1, :, :700] = part
        assert_same_bits(native(q, larger[0][1], larger[1][1], positions), together)


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 5, 2, 8)
    for arguments, message in (
        ((q, k, k, torch.tensor([[5]])), "positions must be in 0..4, the entries of the cache, got 5"),
        ((q, k, k, torch.tensor([[-1]])), "positions must be in 0..4"),
        ((q[:, :, :3], k, k, torch.tensor([[0]])), "query heads must be a multiple of key-value heads"),
        ((q, k, k, torch.tensor([0])), r"positions must be \[B, N\]"),
        ((q, k, k, torch.tensor([[0]]), torch.ones(1, 1, 5)), "mask must be bool"),
        ((q.half(), k.half(), k.half(), torch.tensor([[0]])), "q must be float32 or bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            native(*arguments)
    assert native(q[:, :0], k, k, torch.zeros((1, 0), dtype=torch.long)).shape == (1, 0, 4, 8)
    assert resolve("decode_attention", "native") is native
