"""decode_attention on CUDA: one launch for prefill and short caches; for one new token and a long cache a split and a join."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError
from .configs import DECODE_SPLIT, decode_config, prefill_config
from .launch import check_on_device, check_shape, chip_family, next_power_of_2, triton_why_not, unit_stride

LARGEST_HEAD = 128
_LOG2_E = math.log2(math.e)


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, mask: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `rsvlm_infer.ops.decode_attention.decode_attention`. D at most 128; a token that may see nothing gives zeros.

    The grid depends on shapes alone, so a CUDA graph that captured a call stays right while positions grow; the workspace of a split
    comes from torch's allocator, which serves a capture from the graph's own pool.

    Args:
        out: [B, N, Hq, D] contiguous, or None.

    Raises:
        InputError: shapes that do not fit, a dtype that is no float16, bfloat16 or float32, or tensors on another device.
    """
    op = "decode_attention"
    check_shape(op, "q", q, (None, None, None, None))
    batch, new, heads, head_dim = q.shape
    check_shape(op, "k_cache", k_cache, (batch, None, None, head_dim))
    check_shape(op, "v_cache", v_cache, k_cache.shape)
    capacity, kv_heads = k_cache.shape[1:3]
    check_shape(op, "positions", positions, (batch, new))
    check_shape(op, "mask", mask, (batch, new, capacity))
    check_on_device(op, q=q, k_cache=k_cache, v_cache=v_cache, positions=positions, mask=mask, out=out)
    if not 1 <= head_dim <= LARGEST_HEAD:
        raise InputError(f"q of {op} must have 1 to {LARGEST_HEAD} columns per head, got {head_dim}; use 'eager'")
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(f"q of {op} must have a multiple of the cache's {kv_heads} heads, got {heads}; see num_kv_heads")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise InputError(f"the cache of {op} must have q's dtype {q.dtype}, got {k_cache.dtype} and {v_cache.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask of {op} must be bool, got {mask.dtype}; True = may be seen")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise InputError(f"out of {op} must be contiguous {q.dtype} {list(q.shape)}, got {out.dtype} {list(out.shape)}")
    if q.numel() == 0:
        return out
    from .jit.decode_attention import cache_attention_kernel, join_kernel

    q, k_cache, v_cache = unit_stride(q), unit_stride(k_cache), unit_stride(v_cache)
    flags = q if mask is None else unit_stride(mask).view(torch.uint8)
    family, group, columns = chip_family(q.device), heads // kv_heads, max(16, next_power_of_2(head_dim))
    config = decode_config(family, q.dtype) if new == 1 else prefill_config(family, q.dtype)
    # Borders between ranges are fixed places in the cache: empty ranges add exact zeros, so capacity does not move a bit.
    splits = -(-capacity // DECODE_SPLIT) if new == 1 and capacity > DECODE_SPLIT else 1
    rows = batch * new * heads
    parts, peaks, masses = out, out, out
    if splits > 1:
        parts = torch.empty((splits, rows, head_dim), dtype=torch.float32, device=q.device)
        peaks, masses = torch.empty((2, splits, rows), dtype=torch.float32, device=q.device).unbind(0)
    cache_attention_kernel[(-(-new * group // config.block_m), batch * kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        parts,
        peaks,
        masses,
        positions.contiguous(),
        flags,
        batch,
        new,
        capacity,
        kv_heads,
        group,
        head_dim**-0.5 * _LOG2_E,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        0 if mask is None else flags.stride(0),
        0 if mask is None else flags.stride(1),
        HEAD_DIM=head_dim,
        COLUMNS=columns,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT_LENGTH=DECODE_SPLIT if splits > 1 else 0,
        MASKED=mask is not None,
        EXACT=q.dtype == torch.float32,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        join_kernel[(rows,)](parts, peaks, masses, out, splits, rows, HEAD_DIM=head_dim, COLUMNS=columns, num_warps=1)
    return out
