"""Attention inside each tile of a packed sequence: definition and oracle. Knows no weights and no tile geometry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_tile_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Softmax attention, block-diagonal over tiles, not causal.

    Args:
        q: [S, H, D] packed queries.
        k, v: [Sk, H, D] packed keys and values; Sk = S when `cu_seqlens_k` is None.
        cu_seqlens: [T + 1] int, exclusive prefix sums of the tiles' lengths, cu_seqlens[T] = S.
        cu_seqlens_k: [T + 1] int, the same for keys (cross-attention); None = self-attention.
        scale: factor on q·k; None = D ** -0.5.

    Returns:
        [S, H, D] in q's dtype. A tile without keys gives zeros.
    """
    bounds_q = cu_seqlens.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    out = torch.zeros_like(q)
    for start, stop, start_k, stop_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        if stop > start and stop_k > start_k:
            # [1, H, n, D]: one dense attention per tile, so no tile can see another and no padding exists
            tile = F.scaled_dot_product_attention(
                q[start:stop].transpose(0, 1)[None],
                k[start_k:stop_k].transpose(0, 1)[None],
                v[start_k:stop_k].transpose(0, 1)[None],
                scale=scale,
            )
            out[start:stop] = tile[0].transpose(0, 1)
    return out
