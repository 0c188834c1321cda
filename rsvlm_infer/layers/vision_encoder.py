"""The ViT over packed patches of many tiles: CLIP, SigLIP and DINOv2. Knows no scene, no level heads, no language."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VisionConfig
from ..ops.registry import resolve
from .activations import ACTIVATIONS


class AttentionWeights(nn.Module):
    """The four projections of multi-head attention; what may see what is the child's business."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)


class TileAttention(AttentionWeights):
    """Multi-head attention that never crosses a tile border."""

    def __init__(self, hidden_size: int, num_heads: int, implementation: str) -> None:
        super().__init__(hidden_size, num_heads)
        self.varlen_tile_attention = resolve("varlen_tile_attention", implementation)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[S, Dv], [T + 1] -> [S, Dv]."""
        heads = (x.shape[0], self.num_heads, -1)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)  # [S, H, D]
        return self.o(self.varlen_tile_attention(q, k, v, cu_seqlens).flatten(1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two Linear layers around an activation."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """Pre-norm transformer block; `scale1` and `scale2` exist only with LayerScale."""

    def __init__(self, config: VisionConfig, implementation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TileAttention(config.hidden_size, config.num_heads, implementation)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)
        self.scale1 = nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[S, Dv], [T + 1] -> [S, Dv]."""
        attended = self.attention(self.norm1(x), cu_seqlens)
        x = x + (attended if self.scale1 is None else attended * self.scale1)
        expanded = self.mlp(self.norm2(x))
        return x + (expanded if self.scale2 is None else expanded * self.scale2)  # type: ignore[no-any-return]


class VisionEncoder(nn.Module):
    """Packed patches -> hidden states at the taps. Blocks after the last tap are never executed and never loaded."""

    def __init__(self, config: VisionConfig, implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size)) if config.class_token else None
        positions = config.position_grid**2 + int(config.class_token)
        self.position_table = nn.Parameter(torch.zeros(positions, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(VisionBlock(config, implementation) for _ in range(max(config.taps)))
        self._positions: dict[tuple[object, ...], Tensor] = {}  # see _grid_positions, inference only

    def forward(self, patches: Tensor, cu_seqlens: Tensor, grids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Encodes T tiles at once.

        Args:
            patches: [S, 3·p²] normalised pixels, channel-major inside a patch, tiles one after another.
            cu_seqlens: [T + 1] int, exclusive prefix sums of patches per tile.
            grids: [T, 2] int, rows and columns of patches of each tile.

        Returns:
            Three hidden states [S, Dv] (levels object, region, scene), and their class tokens [T, Dv]
            (empty [0, Dv] when the family has none).
        """
        shapes = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))  # [S, Dv]
        x = x + torch.cat([self._grid_positions(*shape) for shape in shapes])
        lengths = cu_seqlens.diff()
        patch_rows = None
        if self.class_token is not None:
            x, cu_seqlens, patch_rows = self._insert_class_tokens(x, cu_seqlens, lengths)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], cu_seqlens))
        taps = [states[tap] for tap in self.config.taps]
        if patch_rows is None:
            return taps, [x.new_zeros((0, x.shape[1])) for _ in taps]
        class_rows = cu_seqlens[:-1].long()
        return [tap[patch_rows] for tap in taps], [tap[class_rows] for tap in taps]

    def _insert_class_tokens(self, x: Tensor, cu_seqlens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[S, Dv] -> [S + T, Dv] with one class token before each tile, its cu_seqlens, and the rows of the patches."""
        assert self.class_token is not None
        tiles = lengths.numel()
        with_class = cu_seqlens + torch.arange(tiles + 1, dtype=cu_seqlens.dtype, device=x.device)
        tile_of_patch = torch.repeat_interleave(torch.arange(tiles, device=x.device), lengths.long())  # [S]
        patch_rows = torch.arange(x.shape[0], device=x.device) + tile_of_patch + 1
        joined = x.new_empty((x.shape[0] + tiles, x.shape[1]))
        joined[patch_rows] = x
        joined[with_class[:-1].long()] = self.class_token + self.position_table[0]
        return joined, with_class, patch_rows

    def _grid_positions(self, rows: int, columns: int) -> Tensor:
        """[rows·columns, Dv]: the trained table, interpolated once per distinct grid while weights are frozen."""
        table = self.position_table[1:] if self.class_token is not None else self.position_table
        side = self.config.position_grid
        if (rows, columns) == (side, side):
            return table
        frozen = not torch.is_grad_enabled() or not table.requires_grad
        # The version counter moves with every in-place update, so a trained or reloaded table never meets a stale entry.
        key = (rows, columns, self.position_table._version, self.position_table.data_ptr(), table.dtype)
        if frozen and key in self._positions:
            return self._positions[key]
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(square, size=(rows, columns), mode=self.config.interpolation, align_corners=False)
        positions = resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)
        if frozen:
            self._positions[key] = positions
        return positions
