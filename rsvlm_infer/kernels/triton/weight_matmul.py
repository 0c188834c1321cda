"""weight_matmul on CUDA, made for one to a few rows of x, where reading the weight is all the time there is.

Every row of x reads the weight again (from the L2 cache); for a prompt's worth of rows, dequantise once and multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.weight_matmul import GROUP, PackedWeight, check_weight_matmul
from .launch import check_on_device, triton_why_not, unit_stride

BLOCK_N, BLOCK_K, WARPS = 8, 128, 4


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def weight_matmul(x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
    """See `rsvlm_infer.ops.weight_matmul.weight_matmul`.

    Args:
        out: [..., Out] contiguous in x's dtype, or None.

    Raises:
        InputError: widths or dtypes that do not fit, or tensors on another device.
    """
    check_weight_matmul(x, packed)
    check_on_device("weight_matmul", x=x, codes=packed.codes, scales=packed.scales, out=out)
    rows, columns = packed.shape
    shape = (*x.shape[:-1], rows)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise InputError(f"out of weight_matmul must be contiguous {x.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if out.numel() == 0:
        return out
    from .jit.weight_matmul import weight_matmul_kernel

    halves = packed.kind == "int4"
    inputs = unit_stride(x.reshape(-1, columns))
    codes = packed.codes.contiguous()
    weight_matmul_kernel[(-(-rows // BLOCK_N), inputs.shape[0])](
        inputs,
        codes,
        codes if packed.scales is None else packed.scales.contiguous(),
        out,
        rows,
        codes.shape[1],
        inputs.stride(0),
        GROUP=GROUP // 2 if halves else GROUP,
        HALVES=halves,
        SCALED=packed.scales is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )
    return out
