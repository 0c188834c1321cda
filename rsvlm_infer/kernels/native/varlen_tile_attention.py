"""varlen_tile_attention through rsvlm_infer._C: no padding, no loop in Python, tiles of any length in one call.

float32, and bfloat16 with float32 sums (by the bf16 dot product where the CPU has it). Owns no arithmetic.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from .tensors import check_floats, check_shape, innermost_contiguous


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def varlen_tile_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """See `rsvlm_infer.ops.varlen_tile_attention.varlen_tile_attention`.

    Raises:
        InputError: shapes that do not fit, bounds that do not rise from 0 to the rows, or a dtype or device not supported.
    """
    from rsvlm_infer import _C

    dtype = check_floats(q=q, k=k, v=v)
    check_shape("q", q, (None, None, None), "[S, H, D]")
    _, heads, head_dim = q.shape
    check_shape("k", k, (None, heads, head_dim), "[Sk, H, D]")
    check_shape("v", v, tuple(k.shape), "[Sk, H, D]")
    bounds = _bounds("cu_seqlens", cu_seqlens, q.shape[0])
    key_bounds = bounds if cu_seqlens_k is None else _bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(bounds) != len(key_bounds) or key_bounds[-1] > k.shape[0]:
        raise InputError(
            f"keys must have the tiles of queries, got {len(bounds) - 1} and {len(key_bounds) - 1} tiles and {k.shape[0]} keys; "
            "pass cu_seqlens_k for cross-attention"
        )
    # rows behind the last tile stay zero, as in eager
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if bounds[-1] < q.shape[0]:
        out[bounds[-1] :] = 0
    if out.numel() == 0:
        return out
    q, k, v = innermost_contiguous(q), innermost_contiguous(k), innermost_contiguous(v)
    _C.varlen_tile_attention(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        q_strides=q.stride()[:2],
        k_strides=k.stride()[:2],
        v_strides=v.stride()[:2],
        cu_seqlens=bounds,
        cu_seqlens_k=key_bounds,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    return out


def _bounds(name: str, cu_seqlens: Tensor, rows: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] > rows or any(start > stop for start, stop in itertools.pairwise(bounds)):
        raise InputError(
            f"{name} must rise from 0 to at most {rows} rows, got {bounds[:8]}; pass exclusive prefix sums of lengths"
        )
    return bounds
