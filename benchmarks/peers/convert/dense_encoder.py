"""A Dinov2 folder of Hugging Face's as a dense batch of equal tiles, in the form that exporters take: positions are an input, because
interpolating them in the graph would cost the peers time that a cache saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm block with LayerScale; q, k and v are one product."""

    def __init__(self, state: dict[str, Tensor], heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        width = state["norm1.weight"].shape[0]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, state["mlp.fc1.bias"].shape[0]), nn.Linear(state["mlp.fc1.bias"].shape[0], width)
        own = {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2", "o": "attention.output.dense"}
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            for ours, theirs in own.items():
                getattr(self.get_submodule(ours), kind).data = state[f"{theirs}.{kind}"]
            getattr(self.qkv, kind).data = torch.cat([state[f"{name}.{kind}"] for name in attention])
        for scale, module in (("1", self.o), ("2", self.fc2)):  # LayerScale folded in: a product less for everybody's runtime
            factor = state[f"layer_scale{scale}.lambda1"]
            module.weight.data, module.bias.data = module.weight * factor[:, None], module.bias * factor

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[T, N, D], bool [T, 1, 1, N] -> [T, N, D]."""
        tiles, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(tiles, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).reshape(tiles, length, width))
        expanded: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return expanded


class DenseEncoder(nn.Module):
    """Patches of equal tiles -> the last block's states, class token left out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        embed = "embeddings.patch_embeddings.projection"
        weight = state[f"{embed}.weight"]
        self.patch_embed = nn.Linear(weight[0].numel(), weight.shape[0])
        self.patch_embed.weight.data, self.patch_embed.bias.data = weight.flatten(1), state[f"{embed}.bias"]
        self.class_token = nn.Parameter(state["embeddings.cls_token"] + state["embeddings.position_embeddings"][:, :1])
        self.blocks = nn.ModuleList()
        for layer in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self.blocks.append(Block(own, config["num_attention_heads"], config["layer_norm_eps"]))
        self.requires_grad_(False)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [T, N, P], positions [1, N, D] -> [T, N, D]."""
        return self._run(patches, positions, None)

    def _run(self, patches: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = self.patch_embed(patches) + positions
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x, mask)
        patches_only: Tensor = x[:, 1:]
        return patches_only


class PaddedEncoder(DenseEncoder):
    """The same for tiles of several lengths, padded to the longest."""

    def forward(self, patches: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """patches [T, N, P], positions [T, N, D], lengths [T] -> [T, N, D]; what lies behind a tile's length is nothing."""
        seen = torch.arange(patches.shape[1] + 1, device=patches.device)[None] <= lengths[:, None]  # the class token too
        return self._run(patches, positions, seen[:, None, None])


def examples(encoder: DenseEncoder) -> tuple[tuple[Tensor, ...], tuple[dict[int, str], ...]]:
    """Inputs to trace with, and the names of their dynamic axes."""
    values, width = encoder.patch_embed.in_features, encoder.patch_embed.out_features
    padded = isinstance(encoder, PaddedEncoder)
    inputs = (torch.randn(3, 16, values), torch.randn(3 if padded else 1, 16, width))
    axes: tuple[dict[int, str], ...] = ({0: "tiles", 1: "length"}, {0: "tiles", 1: "length"} if padded else {1: "length"})
    if padded:
        return (*inputs, torch.tensor([16, 5, 9])), (*axes, {0: "tiles"})
    return inputs, axes
