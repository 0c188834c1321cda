"""CLIP's causal text encoder, the text side of alignment for checkpoints that have one. Knows no images, no tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TextEncoderConfig
from .vision_encoder import AttentionWeights, Mlp


class CausalAttention(AttentionWeights):
    """Multi-head causal attention over one dense batch."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, length, width = x.shape
        q, k, v = (part(x).view(batch, length, self.num_heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(attended.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class TextLayer(nn.Module):
    """Pre-norm causal block."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CausalAttention(config.hidden_size, config.num_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """Token ids -> one state per text, taken at the end-of-text token."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_table = nn.Parameter(torch.zeros(config.max_positions, config.hidden_size))
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, N] int, padded on the right (causality makes the padding invisible) -> [B, D]."""
        x = self.embed_tokens(token_ids) + self.position_table[: token_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        # Configs of 2021 say 2 and mean the highest id, which is end-of-text; argmax takes the first of equals.
        is_end = token_ids if self.config.eos_token_id == 2 else (token_ids == self.config.eos_token_id).int()
        end = is_end.argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), end]  # type: ignore[no-any-return]
