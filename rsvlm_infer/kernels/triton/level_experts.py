"""level_experts on CUDA: the launches of grouped_experts without a permutation and without weights; nothing is routed before."""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_experts import launch_experts
from .launch import check_on_device, check_shape, triton_why_not


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def level_experts(
    x: Tensor,
    level_offsets: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """See `rsvlm_infer.ops.level_experts.level_experts`. Rows beyond level_offsets[L] are not written.

    Raises:
        InputError: shapes or dtypes that do not fit, or tensors on another device.
    """
    op = "level_experts"
    check_shape(op, "x", x, (None, None))
    check_shape(op, "level_offsets", level_offsets, (w_down.shape[0] + 1,))
    check_on_device(op, x=x, level_offsets=level_offsets)
    return launch_experts(op, x, level_offsets.to(torch.int32), None, None, w_gate, w_up, w_down, b_up, b_down)
