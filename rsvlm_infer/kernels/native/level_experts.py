"""level_experts through rsvlm_infer._C: the kernel of grouped_experts with every row in its place. Owns no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hardware import native_why_not
from .grouped_experts import grouped_experts
from .tensors import check_shape


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def level_experts(
    x: Tensor,
    level_offsets: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """See `rsvlm_infer.ops.level_experts.level_experts`.

    Raises:
        InputError: as `grouped_experts`.
    """
    check_shape("x", x, (None, None), "[N, D]")
    check_shape("level_offsets", level_offsets, (w_down.shape[0] + 1,), "[L + 1]")
    rows = torch.arange(x.shape[0], dtype=torch.int32)
    return grouped_experts(x, level_offsets, rows, torch.ones((x.shape[0], 1)), w_gate, w_up, w_down, b_up, b_down)
