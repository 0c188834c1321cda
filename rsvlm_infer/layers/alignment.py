"""MS-VLAM: embeddings of a scene at object, region and scene level in the space of the text. Knows no text model and no score."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LEVELS, AlignmentConfig


class AlignmentHead(nn.Module):
    """LayerNorm, Linear, L2 norm."""

    def __init__(self, vision_size: int, embed_size: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size, eps=eps)
        self.proj = nn.Linear(vision_size, embed_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., Dv] -> [..., De], unit length."""
        return F.normalize(self.proj(self.norm(x)), dim=-1)


class Alignment(nn.Module):
    """The heads that a checkpoint has, one per level, and the text projection."""

    def __init__(self, config: AlignmentConfig, vision_size: int, text_size: int, eps: float) -> None:
        super().__init__()
        self.config = config
        heads = {level: AlignmentHead(vision_size, config.embed_size, config.head_bias, eps) for level in config.levels}
        self.object = heads.get(LEVELS[0])
        self.region = heads.get(LEVELS[1])
        self.scene = heads.get(LEVELS[2])
        self.text_proj = nn.Linear(text_size, config.embed_size, bias=config.head_bias)

    def forward(self, taps: list[Tensor], class_tokens: list[Tensor], cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of one scene whose first tile is the base tile.

        Args:
            taps: three [S, Dv]. class_tokens: three [T, Dv], or [0, Dv] without class tokens. cu_seqlens: [T + 1].

        Returns:
            object [T, k, De] (k = salient_patches or the shortest tile's length), region [T, De], scene [De]; an absent head
            gives an empty tensor.
        """
        bounds = cu_seqlens.tolist()
        spans = list(itertools.pairwise(bounds))
        empty = taps[0].new_zeros(0)
        objects = regions = scene = empty
        if self.object is not None:
            count = min([self.config.salient_patches, *(stop - start for start, stop in spans)])
            objects = self.object(torch.stack([most_salient(taps[0][start:stop], count) for start, stop in spans]))
        if self.region is not None:
            regions = self.region(torch.stack([taps[1][start:stop].mean(dim=0) for start, stop in spans]))
        if self.scene is not None:
            base = class_tokens[2][0] if self.config.pooling == "class" else taps[2][: bounds[1]].mean(dim=0)
            scene = self.scene(base)
        return objects, regions, scene

    def embed_text(self, states: Tensor) -> Tensor:
        """[B, D] text states -> [B, De], unit length."""
        return F.normalize(self.text_proj(states), dim=-1)


def most_salient(tile: Tensor, count: int) -> Tensor:
    """[n, Dv] -> [count, Dv]: the patches farthest from the tile's mean, which is what the tile mostly shows; ties to the first."""
    distance = (tile - tile.mean(dim=0)).square().sum(dim=-1)
    order = distance.sort(descending=True, stable=True).indices
    return tile[order[:count]]
