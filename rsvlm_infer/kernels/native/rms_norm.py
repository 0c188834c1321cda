"""rms_norm through rsvlm_infer._C: one pass for the statistics, one for the product. Owns no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hardware import native_why_not
from .tensors import check_floats, check_shape


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rsvlm_infer.ops.rms_norm.rms_norm`; x and weight have one dtype, float32 or bfloat16.

    Raises:
        InputError: shapes that do not fit, or a dtype or device not supported.
    """
    from rsvlm_infer import _C

    dtype = check_floats(x=x, weight=weight)
    width = x.shape[-1]
    check_shape("weight", weight, (width,), "[D]")
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _C.rms_norm(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            rows=x.numel() // width,
            width=width,
            eps=eps,
            dtype=dtype,
            out=out.data_ptr(),
        )
    return out
