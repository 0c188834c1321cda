"""The Llama / Qwen2 decoder with an explicit KV cache. Knows token ids and embeddings, no images, no text, no sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LanguageConfig
from ..ops.registry import resolve


@dataclass
class KvCache:
    """Keys and values [layers, B, capacity, Hkv, D], position code applied, and each row's length [B]."""

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, config: LanguageConfig, batch: int, capacity: int, like: Tensor) -> KvCache:
        """A zeroed cache in the dtype and on the device of `like`; zeros keep masked rows finite."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), torch.zeros(batch, dtype=torch.long, device=like.device))

    def keep(self, rows: Tensor) -> KvCache:
        """A copy of the named rows, in that order."""
        return KvCache(self.keys[:, rows], self.values[:, rows], self.lengths[rows])


class RmsNorm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, hidden_size: int, eps: float, implementation: str = "eager") -> None:
        super().__init__()
        self.rms_norm = resolve("rms_norm", implementation)
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]


class CachedAttention(nn.Module):
    """Causal grouped-query attention; writes its keys and values to the cache before it reads them."""

    def __init__(self, config: LanguageConfig, implementation: str) -> None:
        super().__init__()
        self.config = config
        self.rope = resolve("rope", implementation)
        self.decode_attention = resolve("decode_attention", implementation)
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, keys: Tensor | None, values: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, N, Dl], [B, N] and one layer's cache [B, C, Hkv, D] (None = no cache, positions 0..N-1) -> [B, N, Dl]."""
        batch, new, _ = x.shape
        config = self.config
        q = self.rope(self.q(x).view(batch, new, config.num_heads, config.head_dim), positions, config.rope_theta)
        k = self.rope(self.k(x).view(batch, new, config.num_kv_heads, config.head_dim), positions, config.rope_theta)
        v = self.v(x).view(batch, new, config.num_kv_heads, config.head_dim)
        if keys is not None and values is not None:
            rows = torch.arange(batch, device=x.device)[:, None]
            keys[rows, positions] = k
            values[rows, positions] = v
            k, v = keys, values
        return self.o(self.decode_attention(q, k, v, positions, mask).flatten(2))  # type: ignore[no-any-return]


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., Dl] -> [..., Dl]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: LanguageConfig, implementation: str) -> None:
        super().__init__()
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, implementation)
        self.attention = CachedAttention(config, implementation)
        self.post_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, implementation)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, positions: Tensor, keys: Tensor | None, values: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """[B, N, Dl] -> [B, N, Dl]."""
        x = x + self.attention(self.input_norm(x), positions, keys, values, mask)
        return x + self.mlp(self.post_norm(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Embeddings in, hidden states out; `logits` is separate so that only the rows that are needed pay for the vocabulary."""

    def __init__(self, config: LanguageConfig, implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, implementation) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, implementation)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, inputs_embeds: Tensor, positions: Tensor, cache: KvCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Causal pass.

        Args:
            inputs_embeds: [B, N, Dl].
            positions: [B, N] int, the place of each token in its own row; also its slot in the cache.
            cache: written at `positions`; None = a row sees only the N tokens given, at positions 0..N-1.
            mask: [B, N, N] bool without a cache, True = may be seen; None = causal. With a mask, positions only set the rotation.

        Returns:
            [B, N, Dl], final norm applied.
        """
        x = inputs_embeds
        stop = 0 if cache is None else int(positions.max()) + 1  # slots beyond hold nothing that a token may see
        for i, layer in enumerate(self.layers):
            keys = None if cache is None else cache.keys[i, :, :stop]  # a view: writes reach the cache
            values = None if cache is None else cache.values[i, :, :stop]
            x = layer(x, positions, keys, values, mask)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., Dl] -> [..., vocab]."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)  # type: ignore[no-any-return]
