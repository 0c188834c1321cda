"""Semantic augmentation: visual features look at retrieved cues and at the query. Knows no knowledge base and no search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LEVELS, AugmentationConfig
from ..ops.registry import resolve


class LevelAugmentation(nn.Module):
    """Gated cross-attention of one level; the gate starts at 0, so an untrained module changes nothing."""

    def __init__(self, vision_size: int, num_heads: int, implementation: str) -> None:
        super().__init__()
        self.varlen_tile_attention = resolve("varlen_tile_attention", implementation)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(vision_size)
        self.q = nn.Linear(vision_size, vision_size)
        self.k = nn.Linear(vision_size, vision_size)
        self.v = nn.Linear(vision_size, vision_size)
        self.o = nn.Linear(vision_size, vision_size, bias=False)  # no bias: a scene without cues and query stays as it is
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, context: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        """features [S, Dv], context [C, Dv], scene borders [B + 1] of both -> [S, Dv]."""
        q = self.q(self.norm(features)).view(features.shape[0], self.num_heads, -1)
        heads = (
            context.shape[0],
            self.num_heads,
            q.shape[-1],
        )  # in full: a scene without cues and query has no rows to infer from
        k, v = self.k(context).view(heads), self.v(context).view(heads)
        attended = self.varlen_tile_attention(q, k, v, cu_seqlens, cu_seqlens_k)  # [S, H, D]
        return features + torch.tanh(self.gate) * self.o(attended.flatten(1))  # type: ignore[no-any-return]


class Augmentation(nn.Module):
    """H_l = F_l + tanh(g_l) · CrossAttn_l(LN F_l ; [cues_l ; query]) for the three levels."""

    def __init__(
        self, config: AugmentationConfig, vision_size: int, embed_size: int, language_size: int, implementation: str = "eager"
    ) -> None:
        super().__init__()
        self.cue_proj = nn.Linear(embed_size, vision_size)
        self.query_proj = nn.Linear(language_size, vision_size)
        self.levels = nn.ModuleList(LevelAugmentation(vision_size, config.num_heads, implementation) for _ in LEVELS)

    def forward(self, taps: list[Tensor], cues: list[list[Tensor]], queries: list[Tensor], cu_scenes: Tensor) -> list[Tensor]:
        """Augments B scenes at once.

        Args:
            taps: three [S, Dv]. cues: per scene three [K, De] (K may be 0). queries: per scene [Q, Dl] (Q may be 0).
            cu_scenes: [B + 1] int, patch borders of the scenes.

        Returns:
            Three [S, Dv].
        """
        projected = [self.query_proj(query) for query in queries]
        out = []
        for index, level in enumerate(self.levels):
            context = [
                torch.cat((self.cue_proj(cues[scene][index]), projected[scene])) for scene in range(len(queries))
            ]  # B x [K + Q, Dv]
            lengths = torch.tensor([0, *(len(part) for part in context)], device=cu_scenes.device)
            out.append(level(taps[index], torch.cat(context), cu_scenes, lengths.cumsum(0).to(cu_scenes.dtype)))
        return out
