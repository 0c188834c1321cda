"""route through rsvlm_infer._C: selection by insertion and a counting sort. Owns no arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from .tensors import check_shape


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def route(logits: Tensor, level_offsets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `rsvlm_infer.ops.route.route`; logits of any float dtype are read as float32, as there.

    Raises:
        InputError: shapes that do not fit, k outside of 1..E/L, offsets that do not rise from 0 to N, or another device.
    """
    from rsvlm_infer import _C

    check_shape("logits", logits, (None, None), "[N, E]")
    if logits.device.type != "cpu":
        raise InputError(
            f"logits must be on the CPU for the native implementation, got {logits.device}; move it or use 'eager'"
        )
    logits = logits.detach().float().contiguous()
    tokens, experts = logits.shape
    expert_offsets = torch.empty(experts + 1, dtype=torch.int32)
    permutation = torch.empty(tokens * max(k, 0), dtype=torch.int32)
    weights = torch.empty((tokens, max(k, 0)), dtype=torch.float32)
    try:
        _C.route(
            logits=logits.data_ptr(),
            tokens=tokens,
            experts=experts,
            level_offsets=level_offsets.tolist(),
            k=k,
            expert_offsets=expert_offsets.data_ptr(),
            permutation=permutation.data_ptr(),
            weights=weights.data_ptr(),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return expert_offsets, permutation, weights
