"""Cached causal attention against softmax written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.ops.decode_attention import decode_attention


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
