"""Which experts each token uses: definition and oracle. Knows no expert weights and no levels beyond their row ranges."""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits: Tensor, level_offsets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of each token inside its level's group of experts, sorted by expert. No capacity, no token is dropped.

    Args:
        logits: [N, E] router logits; rows level_offsets[l]..level_offsets[l+1] belong to level l, which owns the
            experts l·E/L .. (l+1)·E/L. Columns outside the group are ignored.
        level_offsets: [L + 1] int, exclusive prefix sums of the levels' row counts; level_offsets[L] = N.
        k: experts per token, 1..E/L.

    Returns:
        expert_offsets [E + 1] int32: expert e owns permutation[expert_offsets[e]:expert_offsets[e+1]];
        permutation [N·k] int32: entries token·k + slot, grouped by expert, ascending inside an expert;
        weights [N, k] fp32: softmax over the selected logits, slots from the largest logit down, ties to the lowest expert id.
    """
    tokens, experts = logits.shape
    levels = level_offsets.numel() - 1
    group = experts // levels
    rows = torch.arange(tokens, device=logits.device)
    level = torch.searchsorted(level_offsets[1:].to(rows.dtype), rows, right=True)  # [N]
    first = (level * group)[:, None]  # [N, 1] first expert of the token's group
    inside = torch.gather(logits.float(), 1, first + torch.arange(group, device=logits.device))  # [N, E/L]
    # A stable descending sort keeps equal logits in expert order; torch.topk promises nothing about ties.
    ranked, order = inside.sort(dim=1, descending=True, stable=True)
    weights = ranked[:, :k].softmax(dim=1)
    chosen = (first + order[:, :k]).flatten()  # [N·k]
    permutation = torch.argsort(chosen, stable=True).to(torch.int32)
    counts = torch.bincount(chosen, minlength=experts)
    expert_offsets = torch.zeros(experts + 1, dtype=torch.int32, device=logits.device)
    expert_offsets[1:] = counts.cumsum(0)
    return expert_offsets, permutation, weights
