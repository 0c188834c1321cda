"""route on CUDA: two launches, no atomics, nothing read back; groups of one expert need none."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from .launch import check_on_device, check_shape, next_power_of_2, triton_why_not, unit_stride

MAX_PROGRAMS = 1024  # each reads the counts of all others; beyond this many a program takes several blocks of tokens
COUNTS_AT_ONCE = 16


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


def tokens_per_block(experts: int) -> int:
    """Tokens handled at once: at most 4096 numbers of the [tokens, experts] matrix, which live in registers."""
    return max(16, min(32, 4096 // next_power_of_2(experts)))


def route(logits: Tensor, level_offsets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `rsvlm_infer.ops.route.route`. With groups of one expert the level is the choice and the logits are not read.

    Raises:
        InputError: shapes, k or dtypes that do not fit, or tensors on another device.
    """
    check_shape("route", "logits", logits, (None, None))
    check_shape("route", "level_offsets", level_offsets, (None,))
    check_on_device("route", logits=logits, level_offsets=level_offsets)
    tokens, experts = logits.shape
    levels = level_offsets.numel() - 1
    if levels < 1 or experts % levels:
        raise InputError(f"logits of route must have a multiple of {levels} columns (levels), got {experts}; see num_experts")
    group = experts // levels
    if not 1 <= k <= group:
        raise InputError(f"k of route must be 1 to {group} (experts per level), got {k}; see experts.top_k")
    device = logits.device
    if group == 1:
        weights = torch.ones((tokens, 1), dtype=torch.float32, device=device)
        return level_offsets.to(torch.int32), torch.arange(tokens, dtype=torch.int32, device=device), weights
    weights = torch.empty((tokens, k), dtype=torch.float32, device=device)
    permutation = torch.empty(tokens * k, dtype=torch.int32, device=device)
    if tokens == 0:
        return torch.zeros(experts + 1, dtype=torch.int32, device=device), permutation, weights
    from .jit.route import place_kernel, select_kernel

    logits = unit_stride(logits)
    block, padded = tokens_per_block(experts), next_power_of_2(experts)
    blocks = -(-tokens // block)
    chunks = -(-blocks // MAX_PROGRAMS)
    programs = -(-blocks // chunks)
    expert_offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    choice = torch.empty((tokens, k), dtype=torch.int32, device=device)
    counts = torch.empty((programs, padded), dtype=torch.int32, device=device)
    select_kernel[(programs,)](
        logits,
        level_offsets,
        choice,
        weights,
        counts,
        tokens,
        chunks,
        logits.stride(0),
        K=k,
        K_SLOTS=next_power_of_2(k),
        EXPERTS=padded,
        LEVELS=levels,
        GROUP=group,
        BLOCK=block,
        num_warps=4,
    )
    place_kernel[(programs,)](
        choice,
        counts,
        expert_offsets,
        permutation,
        tokens,
        chunks,
        experts,
        K=k,
        EXPERTS=padded,
        PROGRAMS=COUNTS_AT_ONCE,
        BLOCK=block,
        num_warps=4,
    )
    return expert_offsets, permutation, weights
