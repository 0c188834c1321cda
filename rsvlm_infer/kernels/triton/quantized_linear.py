"""quantized_linear on CUDA, made for one to a few rows of x, where reading the weight is all the time there is.

Every row of x reads the weight again (from the L2 cache); for a prompt's worth of rows, decode the weight once and multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.quantized_linear import check_quantized_linear
from .launch import check_on_device, triton_why_not, unit_stride

BLOCK_N, BLOCK_K, WARPS = 16, 128, 4  # 16 bytes of codes per thread


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See `rsvlm_infer.ops.quantized_linear.quantized_linear`.

    Args:
        out: [..., O] contiguous in x's dtype, or None.

    Raises:
        InputError: shapes or dtypes that do not fit, or tensors on another device.
    """
    group = check_quantized_linear(x, codes, scales, bias)
    check_on_device("quantized_linear", x=x, codes=codes, scales=scales, bias=bias, out=out)
    shape = (*x.shape[:-1], codes.shape[0])
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise InputError(
            f"out of quantized_linear must be contiguous {x.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    if out.numel() == 0:
        return out
    from .jit.quantized_linear import quantized_linear_kernel

    packed = codes.dtype == torch.uint8
    inputs = unit_stride(x.reshape(-1, x.shape[-1]))
    codes, scales = codes.contiguous(), scales.contiguous()
    quantized_linear_kernel[(-(-codes.shape[0] // BLOCK_N), inputs.shape[0])](
        inputs,
        codes,
        scales,
        scales if bias is None else bias.contiguous(),
        out,
        codes.shape[0],
        codes.shape[1],
        scales.shape[1],
        group // 2 if packed else group,
        inputs.stride(0),
        PACKED=packed,
        HAS_BIAS=bias is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )
    return out
