"""Attention of new tokens over a KV cache with grouped query heads: definition and oracle. Knows no projection and no position code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of N new tokens per row; N = 1 is the decode step, N > 1 a prefill.

    Args:
        q: [B, N, Hq, D] queries, position code applied.
        k_cache, v_cache: [B, C, Hkv, D], row b holds valid entries at 0..positions[b, n] for every n; Hq a multiple of Hkv.
        positions: [B, N] int, the place of each new token; a token sees the cache entries 0..positions[b, n].
        mask: [B, N, C] bool, True = may be seen; takes the place of the rule above. None = causal by `positions`.

    Returns:
        [B, N, Hq, D] in q's dtype.
    """
    batch, new, heads, head_dim = q.shape
    capacity, kv_heads = k_cache.shape[1], k_cache.shape[2]
    seen = torch.arange(capacity, device=q.device)[None, None] <= positions[..., None] if mask is None else mask  # [B, N, C]
    groups = heads // kv_heads
    keys = k_cache.transpose(1, 2).repeat_interleave(groups, dim=1)  # [B, Hq, C, D]
    values = v_cache.transpose(1, 2).repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen[:, None])
    return out.transpose(1, 2).reshape(batch, new, heads, head_dim)
