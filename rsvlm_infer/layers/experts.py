"""Semantic experts: a mixture of experts whose groups belong to levels. Knows no cues, no tiles, no language."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LEVELS, ExpertsConfig
from ..ops.registry import resolve


class LevelRouter(nn.Module):
    """One level's norm, router and gate; the gate starts at 0, so an untrained module changes nothing."""

    def __init__(self, vision_size: int, group_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size)
        self.router = nn.Linear(vision_size, group_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))


class Experts(nn.Module):
    """Y = F_2 + Σ_l tanh(a_l) · MoE_l(LN H_l)."""

    def __init__(self, config: ExpertsConfig, vision_size: int, implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.route = resolve("route", implementation)
        self.grouped_experts = resolve("grouped_experts", implementation)
        self.level_experts = resolve("level_experts", implementation)
        experts, hidden = config.num_experts, config.intermediate_size
        self.levels = nn.ModuleList(LevelRouter(vision_size, experts // len(LEVELS)) for _ in LEVELS)
        glu, affine = config.kind == "glu_silu", config.kind == "affine"
        self.w_gate = _weights(experts, hidden, vision_size) if glu else None
        self.w_up = None if affine else _weights(experts, hidden, vision_size)
        self.w_down = _weights(experts, vision_size, vision_size if affine else hidden)
        self.b_up = nn.Parameter(torch.zeros(experts, hidden)) if config.kind == "gelu_mlp" else None
        self.b_down = None if glu else nn.Parameter(torch.zeros(experts, vision_size))

    def forward(self, base: Tensor, features: list[Tensor]) -> Tensor:
        """base F_2 [S, Dv], three H_l [S, Dv] -> Y [S, Dv]."""
        tokens, group = base.shape[0], self.config.num_experts // len(LEVELS)
        levels = [level for level in self.levels if isinstance(level, LevelRouter)]
        normed = [level.norm(x) for level, x in zip(levels, features, strict=True)]
        stacked = torch.cat(normed)  # [3·S, Dv]
        level_offsets = torch.arange(len(LEVELS) + 1, dtype=torch.int32, device=base.device) * tokens
        weights = (self.w_gate, self.w_up, self.w_down, self.b_up, self.b_down)
        if group == 1:  # the level is the choice: its weight is 1 whatever the router says
            mixed = self.level_experts(stacked, level_offsets, *weights)
        else:
            logits = self._logits(levels, normed)  # [3·S, E]
            mixed = self.grouped_experts(stacked, *self.route(logits, level_offsets, self.config.top_k), *weights)
        out = base
        for level, part in zip(levels, mixed.view(len(LEVELS), tokens, mixed.shape[-1]), strict=True):
            out = out + torch.tanh(level.gate) * part
        return out

    def _logits(self, levels: list[LevelRouter], normed: list[Tensor]) -> Tensor:
        """Three LN H_l [S, Dv] -> [3·S, E]; a level's rows have numbers only in the columns of its group."""
        tokens, group = normed[0].shape[0], self.config.num_experts // len(LEVELS)
        logits = normed[0].new_zeros((len(levels) * tokens, self.config.num_experts), dtype=torch.float32)
        for index, (level, x) in enumerate(zip(levels, normed, strict=True)):
            rows = slice(index * tokens, (index + 1) * tokens)
            # fp32: near-ties between experts must not flip with the model's precision
            logits[rows, index * group : (index + 1) * group] = x.float() @ level.router.weight.float().T
        return logits


def _weights(experts: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(experts, rows, columns) * columns**-0.5)
