"""grouped_experts through rsvlm_infer._C: weights are read where they lie, activations stay transposed between the products.

float32, and bfloat16 with float32 sums; slots are rounded to bfloat16 once before they are combined, as eager does. Owns no arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from .tensors import check_floats, check_shape


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def grouped_experts(
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    weights: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """See `rsvlm_infer.ops.grouped_experts.grouped_experts`.

    Raises:
        InputError: shapes that do not fit each other, indices out of range, or a dtype or device not supported.
    """
    from rsvlm_infer import _C

    dtype = check_floats(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_up=b_up, b_down=b_down)
    check_shape("x", x, (None, None), "[N, D]")
    tokens, width = x.shape
    check_shape("w_down", w_down, (None, width, None), "[E, D, F]")
    experts, _, hidden = w_down.shape
    for name, matrix in (("w_gate", w_gate), ("w_up", w_up)):
        if matrix is not None:
            check_shape(name, matrix, (experts, hidden, width), "[E, F, D]")
    for name, bias, size in (("b_up", b_up, hidden), ("b_down", b_down, width)):
        if bias is not None:
            check_shape(name, bias, (experts, size), "[E, F]" if name == "b_up" else "[E, D]")
    if w_up is None and (w_gate is not None or b_up is not None or hidden != width):
        raise InputError(
            f"affine experts must have w_down [E, D, D] alone, got w_down {list(w_down.shape)}, "
            f"w_gate {'absent' if w_gate is None else 'present'}, b_up {'absent' if b_up is None else 'present'}; pass w_up"
        )
    check_shape("weights", weights, (tokens, None), "[N, k]")
    check_shape("permutation", permutation, (weights.numel(),), "[N·k]")
    check_shape("expert_offsets", expert_offsets, (experts + 1,), "[E + 1]")
    # copies only of what is not yet as `route` and the layers hand it over
    offsets, order = expert_offsets.int().contiguous(), permutation.int().contiguous()
    factors = weights.detach().float().contiguous()
    held = [None if part is None else part.contiguous() for part in (x, w_gate, w_up, w_down, b_up, b_down)]
    x_ptr, gate_ptr, up_ptr, down_ptr, b_up_ptr, b_down_ptr = (0 if part is None else part.data_ptr() for part in held)
    out = torch.empty((tokens, width), dtype=x.dtype)
    try:
        _C.grouped_experts(
            x=x_ptr,
            expert_offsets=offsets.data_ptr(),
            permutation=order.data_ptr(),
            weights=factors.data_ptr(),
            w_gate=gate_ptr,
            w_up=up_ptr,
            w_down=down_ptr,
            b_up=b_up_ptr,
            b_down=b_down_ptr,
            out=out.data_ptr(),
            tokens=tokens,
            width=width,
            hidden=hidden,
            experts=experts,
            k=weights.shape[1],
            dtype=dtype,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return out
