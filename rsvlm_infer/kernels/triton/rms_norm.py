"""rms_norm on CUDA, alone or behind the addition of a residual, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from .launch import check_on_device, check_shape, next_power_of_2, triton_why_not, unit_stride

LARGEST_WIDTH = 16384  # one row lives in the registers of one program


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def warps_of(width: int) -> int:
    """Warps per row: at most 32 numbers per thread."""
    return max(1, min(16, next_power_of_2(width) // 1024))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rsvlm_infer.ops.rms_norm.rms_norm`. D at most 16384.

    Raises:
        InputError: shapes that do not fit, a dtype that is no float16, bfloat16 or float32, or tensors on another device.
    """
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What stands between two halves of a decoder layer: `summed = x + residual; normed = rms_norm(summed, weight, eps)`.

    Args:
        x, residual: [..., D]. weight: [D]. eps: added to the mean square.

    Returns:
        normed, summed: [..., D] in x's dtype.

    Raises:
        InputError: as `rms_norm`.
    """
    check_shape("add_rms_norm", "residual", residual, x.shape)
    if residual.dtype != x.dtype:
        raise InputError(f"residual of add_rms_norm must have x's dtype {x.dtype}, got {residual.dtype}; convert it first")
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_on_device("rms_norm", x=x, weight=weight, residual=residual)
    width = x.shape[-1] if x.ndim else 0
    check_shape("rms_norm", "weight", weight, (width,))
    if not 1 <= width <= LARGEST_WIDTH:
        raise InputError(f"x of rms_norm must have 1 to {LARGEST_WIDTH} columns, got {width}; use 'eager'")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = out if residual is None else torch.empty_like(out)
    if x.numel() == 0:
        return out, summed
    from .jit.rms_norm import rms_norm_kernel

    rows = unit_stride(x.reshape(-1, width))
    others = rows if residual is None else unit_stride(residual.reshape(-1, width))
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        others,
        weight.contiguous(),
        out,
        summed,
        width,
        rows.stride(0),
        others.stride(0),
        eps,
        ADD=residual is not None,
        BLOCK=next_power_of_2(width),
        num_warps=warps_of(width),
    )
    return out, summed
