"""The definition of tile attention against softmax(q·k)·v written out tile by tile in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from tests.parity import AWKWARD_LENGTHS, assert_same_bits


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
