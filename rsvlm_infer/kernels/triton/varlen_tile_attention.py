"""varlen_tile_attention on CUDA: a schedule launch, then one attention launch over query blocks, longest tile first.

Knows no tile length on the host: grids come from the numbers of rows and tiles, so nothing is read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError
from .configs import attention_config
from .launch import check_on_device, check_shape, chip_family, next_power_of_2, triton_why_not, unit_stride

LARGEST_HEAD = 128
_LOG2_E = math.log2(math.e)
SCHEDULE_TILES, SCHEDULE_CHUNK = 32, 64  # tiles per schedule program, tiles compared at once


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def split_head(head_dim: int) -> tuple[int, int]:
    """(wide, narrow): powers of two that cover `head_dim`, narrow 0 when one power is as cheap.

    72 and 80 become 64 + 16 columns instead of 128. A matrix instruction wants at least 16 columns.
    """
    whole = max(16, next_power_of_2(head_dim))
    wide = whole // 2
    if wide < 16 or head_dim == whole:
        return whole, 0
    narrow = max(16, next_power_of_2(head_dim - wide))
    return (whole, 0) if wide + narrow >= whole else (wide, narrow)


def tile_schedule(cu_seqlens: Tensor, cu_seqlens_k: Tensor, rows: int, block_m: int) -> Tensor:
    """The work list of the attention launch, made on the device.

    Args:
        cu_seqlens, cu_seqlens_k: [T + 1] int. rows: S, the host's upper bound on cu_seqlens[T]. block_m: query rows per block.

    Returns:
        int32 [W, 4] (first query row, end of the tile's queries, first key row, number of keys), tiles with most keys first;
        W is an upper bound, spare places hold an empty range.
    """
    from .jit.varlen_tile_attention import schedule_kernel

    tiles = cu_seqlens.numel() - 1
    work = (rows + min(tiles, rows) * (block_m - 1)) // block_m
    schedule = torch.empty((work, 4), dtype=torch.int32, device=cu_seqlens.device)
    schedule_kernel[(-(-tiles // SCHEDULE_TILES),)](
        cu_seqlens,
        cu_seqlens_k,
        schedule,
        tiles,
        work,
        BLOCK_M=block_m,
        TILES=SCHEDULE_TILES,
        CHUNK=SCHEDULE_CHUNK,
        num_warps=4,
    )
    return schedule


def varlen_tile_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """See `rsvlm_infer.ops.varlen_tile_attention.varlen_tile_attention`. D at most 128.

    Raises:
        InputError: shapes that do not fit, a dtype that is no float16, bfloat16 or float32, or tensors on another device.
    """
    return _attention(q, k, v, cu_seqlens, cu_seqlens_k, None, None, scale)


def varlen_tile_attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Self-attention on the output of one fused projection, its bias added inside.

    Args:
        qkv: [S, 3, H, D], without bias. cu_seqlens: [T + 1] int. bias: [3, H, D] or None. scale: None = D ** -0.5.

    Returns:
        [S, H, D], as `varlen_tile_attention` on q + bias[0], k + bias[1], v + bias[2].

    Raises:
        InputError: as `varlen_tile_attention`.
    """
    check_shape("varlen_tile_attention_qkv", "qkv", qkv, (None, 3, None, None))
    check_shape("varlen_tile_attention_qkv", "bias", bias, qkv.shape[1:])
    q, k, v = qkv.unbind(1)
    if bias is None:
        return _attention(q, k, v, cu_seqlens, None, None, None, scale)
    # The bias of k adds the same number to all scores of a row, which a softmax does not see: it is not needed at all.
    return _attention(q, k, v, cu_seqlens, None, bias[0].contiguous(), bias[2].contiguous(), scale)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    op = "varlen_tile_attention"
    check_shape(op, "q", q, (None, None, None))
    rows, heads, head_dim = q.shape
    check_shape(op, "k", k, (None if cu_seqlens_k is not None else rows, heads, head_dim))
    check_shape(op, "v", v, k.shape)
    check_shape(op, "cu_seqlens", cu_seqlens, (None,))
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape)
    check_on_device(op, q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, bias=q_bias)
    if not 1 <= head_dim <= LARGEST_HEAD:
        raise InputError(f"q of {op} must have 1 to {LARGEST_HEAD} columns per head, got {head_dim}; use 'eager'")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v of {op} must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; convert them first")
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if rows == 0 or cu_seqlens.numel() < 2:
        return out.zero_()
    from .jit.varlen_tile_attention import attention_kernel

    factor = head_dim**-0.5 if scale is None else scale
    if factor <= 0:  # the kernel takes the maximum before it scales; a rare case, so the sign moves into the queries
        sign = -1.0 if factor < 0 else 0.0
        q, q_bias = q * sign, None if q_bias is None else q_bias * sign
        factor = -factor if factor < 0 else 1.0
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    wide, narrow = split_head(head_dim)
    config = attention_config(chip_family(q.device), q.dtype, wide + narrow)
    schedule = tile_schedule(cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, rows, config.block_m)
    unit = 8 if all(part.stride(1) % 8 == 0 for part in (q, k, v, out)) else 1
    attention_kernel[(schedule.shape[0] * heads,)](
        q,
        k,
        v,
        out,
        q if q_bias is None else q_bias,
        v if v_bias is None else v_bias,
        schedule,
        q.stride(0),
        q.stride(1) // unit,
        k.stride(0),
        k.stride(1) // unit,
        v.stride(0),
        v.stride(1) // unit,
        out.stride(0),
        out.stride(1) // unit,
        heads,
        factor * _LOG2_E,
        HEAD_DIM=head_dim,
        WIDE=wide,
        NARROW=narrow,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_BIAS=v_bias is not None,
        EXACT=q.dtype == torch.float32,
        UNIT=unit,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
