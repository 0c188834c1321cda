"""Vision width to language width, and the order of visual tokens. Knows no text and no attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ProjectorConfig
from .activations import ACTIVATIONS


class Projector(nn.Module):
    """Two-layer MLP over patches or over 2x2 groups of patches of one tile."""

    def __init__(self, config: ProjectorConfig, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.pixel_shuffle = config.pixel_shuffle
        width = vision_size * config.pixel_shuffle**2
        self.input_norm = nn.LayerNorm(vision_size) if config.input_norm else None
        self.fc1 = nn.Linear(width, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, language_size)
        self.activation = ACTIVATIONS[config.activation]
        self.box = nn.Linear(4, language_size, bias=False) if config.box_embedding else None
        if self.box is not None:
            nn.init.zeros_(self.box.weight)

    def forward(self, features: Tensor, grids: Tensor, boxes: Tensor | None) -> list[Tensor]:
        """Visual tokens of each tile.

        Args:
            features: [S, Dv] of T tiles, one after another.
            grids: [T, 2] int, rows and columns of patches; even with pixel_shuffle 2.
            boxes: [T, 4] normalised (cx, cy, w, h) of each tile in its scene; None = no box embedding.

        Returns:
            T tensors [gh·gw / pixel_shuffle², Dl], row-major inside a tile.
        """
        shapes = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.pixel_shuffle == 2:
            tiles = features.split_with_sizes([rows * columns for rows, columns in shapes])
            features = torch.cat([_merge_2x2(tile, *shape) for tile, shape in zip(tiles, shapes, strict=True)])  # [S/4, 4·Dv]
        tokens = self.fc2(self.activation(self.fc1(features)))  # [S', Dl]
        split = list(tokens.split_with_sizes([rows * columns // self.pixel_shuffle**2 for rows, columns in shapes]))
        if self.box is None or boxes is None:
            return split
        offsets = self.box(boxes.to(tokens.dtype))  # [T, Dl]
        return [tile + offset for tile, offset in zip(split, offsets, strict=True)]


def _merge_2x2(tile: Tensor, rows: int, columns: int) -> Tensor:
    """[rows·columns, D] -> [rows/2·columns/2, 4·D]; the four patches in row-major order."""
    blocks = tile.view(rows // 2, 2, columns // 2, 2, -1).permute(0, 2, 1, 3, 4)
    return blocks.reshape(rows * columns // 4, -1)


def assemble_anyres(
    tiles: list[Tensor], layout: tuple[int, int], grid: int, kept: tuple[int, int, int, int], newline: Tensor
) -> Tensor:
    """LLaVA-NeXT's order: base tile, then the unpadded canvas row by row with a newline token after each row.

    Args:
        tiles: base [g², Dl], then layout[0]·layout[1] tiles [g², Dl] in raster order.
        layout: rows and columns of tiles. grid: g, visual tokens per side of a tile.
        kept: row_start, row_stop, col_start, col_stop of the canvas tokens that show the scene and not the padding.
        newline: [Dl].

    Returns:
        [g² + rows·(columns + 1), Dl].
    """
    rows, columns = layout
    canvas = torch.stack(tiles[1:]).view(rows, columns, grid, grid, -1).transpose(1, 2).reshape(rows * grid, columns * grid, -1)
    row_start, row_stop, col_start, col_stop = kept
    canvas = canvas[row_start:row_stop, col_start:col_stop]
    ends = newline.to(canvas.dtype).expand(canvas.shape[0], 1, -1)
    return torch.cat((tiles[0], torch.cat((canvas, ends), dim=1).flatten(0, 1)))
