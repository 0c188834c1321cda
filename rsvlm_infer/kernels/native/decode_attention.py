"""decode_attention through rsvlm_infer._C: a split over the cache for few tokens, blocks of queries for prompts.

Query heads of a group share each key and value they read; nothing is repeated or padded. Owns no arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from .tensors import check_floats, check_shape, innermost_contiguous


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `rsvlm_infer.ops.decode_attention.decode_attention`.

    Raises:
        InputError: shapes that do not fit, positions outside of the cache, or a dtype or device not supported.
    """
    from rsvlm_infer import _C

    dtype = check_floats(q=q, k_cache=k_cache, v_cache=v_cache)
    check_shape("q", q, (None, None, None, None), "[B, N, Hq, D]")
    batch, tokens, heads, head_dim = q.shape
    check_shape("k_cache", k_cache, (batch, None, None, head_dim), "[B, C, Hkv, D]")
    check_shape("v_cache", v_cache, tuple(k_cache.shape), "[B, C, Hkv, D]")
    check_shape("positions", positions, (batch, tokens), "[B, N]")
    capacity, kv_heads = k_cache.shape[1:3]
    if mask is not None:
        check_shape("mask", mask, (batch, tokens, capacity), "[B, N, C]")
        if mask.dtype is not torch.bool:
            raise InputError(f"mask must be bool, got {mask.dtype}; pass True where a token may be seen")
        mask = mask.contiguous()
        positions = positions.clamp(0, max(capacity - 1, 0))  # the mask takes their place
    places = positions.long().contiguous()
    q, k_cache, v_cache = innermost_contiguous(q), innermost_contiguous(k_cache), innermost_contiguous(v_cache)
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype)
    if out.numel() == 0:
        return out
    try:
        _C.decode_attention(
            q=q.data_ptr(),
            k=k_cache.data_ptr(),
            v=v_cache.data_ptr(),
            positions=places.data_ptr(),
            mask=0 if mask is None else mask.data_ptr(),
            out=out.data_ptr(),
            q_strides=q.stride()[:3],
            k_strides=k_cache.stride()[:3],
            v_strides=v_cache.stride()[:3],
            batch=batch,
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            capacity=capacity,
            head_dim=head_dim,
            dtype=dtype,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return out
