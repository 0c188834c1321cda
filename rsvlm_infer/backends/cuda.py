"""The CUDA backend: the eager backend's work on one GPU with Triton ops, and decode steps replayed as a CUDA graph.

Knows no text and no raster. No GPU has run it yet: its arithmetic is tested on the CPU, its graphs are not tested at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.triton.launch import triton_why_not
from ..knowledge.store import KnowledgeBase
from ..layers.language_model import KvCache, LanguageModel
from ..models.load import load_checkpoint
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from .eager import EagerBackend

_log = logging.getLogger(__name__)


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


@once
def implementation() -> str:
    """Of all ops that have a Triton twin: "triton", or "eager" with the reason logged once. Never "native", which is for the CPU."""
    reason = triton_why_not()
    if reason is None:
        return "triton"
    _log.warning("cuda backend: Triton kernels cannot run here (%s), using eager ops", reason)
    return "eager"


class CudaBackend(EagerBackend):
    """`Backend` on one CUDA device."""

    name = "cuda"

    @classmethod
    def load(cls, path: Path, precision: str) -> CudaBackend:
        """From a checkpoint folder, onto the current CUDA device."""
        loaded = load_checkpoint(path, dtype=precision, implementation=implementation())
        knowledge = None if loaded.knowledge_folder is None else KnowledgeBase.load(loaded.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(loaded.embedder)
        return cls(loaded.model.to("cuda"), precision, knowledge)

    @torch.inference_mode()
    def prefill(self, sequences: Any, capacity: int) -> tuple[npt.NDArray[np.float32], KvCache]:
        """See `Backend.prefill`."""
        logits, cache = super().prefill(sequences, capacity)
        return logits, SteppedCache.of(cache)

    def keep(self, cache: KvCache, rows: Any) -> KvCache:
        """See `Backend.keep`. Another number of rows is another graph."""
        return SteppedCache.of(super().keep(cache, rows))

    @torch.inference_mode()
    def decode(self, cache: KvCache, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """One token per row -> logits [B, V]; see `Backend.decode`."""
        step = self._step(cache, 1)
        step.tokens.copy_(self._tensor(np.asarray(token_ids, dtype=np.int64))[:, None])
        step.advance()
        cache.lengths = cache.lengths + 1
        logits: npt.NDArray[np.float32] = step.logits.float().cpu().numpy()
        return logits

    @torch.inference_mode()
    def decode_greedy(self, cache: KvCache, token_ids: npt.NDArray[np.int32], steps: int) -> npt.NDArray[np.int32]:
        """The `steps` most likely tokens of every row after `token_ids`, chosen on the device and read back once.

        Returns:
            int32 [B, steps]; ties to the lowest id. A row does not stop at an end token: the caller cuts.

        Raises:
            InputError: the cache has no room for that many tokens.
        """
        step = self._step(cache, steps)
        step.tokens.copy_(self._tensor(np.asarray(token_ids, dtype=np.int64))[:, None])
        chosen = torch.empty((len(token_ids), steps), dtype=torch.int32, device=self.device)
        for index in range(steps):
            step.advance()
            step.tokens.copy_(step.best)
            chosen[:, index] = step.best[:, 0]
        cache.lengths = cache.lengths + steps
        result: npt.NDArray[np.int32] = chosen.cpu().numpy()
        return result

    def _step(self, cache: KvCache, steps: int) -> DecodeStep:
        if not isinstance(cache, SteppedCache):
            raise InputError("cache must come from this backend's prefill or keep; prefill again")
        if cache.longest + steps > cache.keys.shape[2]:
            raise InputError(f"the cache holds {cache.keys.shape[2]} tokens a row and is full; prefill with a larger capacity")
        if cache.step is None:
            cache.step = DecodeStep(self._language(), cache)
        cache.longest += steps
        return cache.step


@dataclass
class SteppedCache(KvCache):
    """A cache with the step that reads and writes it; `longest` is the host's copy of the largest length."""

    longest: int = 0
    step: DecodeStep | None = None

    @classmethod
    def of(cls, cache: KvCache) -> SteppedCache:
        """The same tensors, no step yet."""
        return cls(cache.keys, cache.values, cache.lengths, int(cache.lengths.max()) if cache.lengths.numel() else 0)


class DecodeStep:
    """One token per row through the language model, in place: fixed buffers in, fixed buffers out, nothing read by the host.

    On a CUDA device the second step is captured and later ones are replays: the first warms up what is made once (compiled kernels,
    the frequencies of rope). The grid of every kernel depends on the cache's capacity, not on lengths, so a replay stays right.
    """

    def __init__(self, language: LanguageModel, cache: KvCache) -> None:
        self.language, self.keys, self.values = language, cache.keys, cache.values
        rows, device = cache.keys.shape[1], cache.keys.device
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = cache.lengths[:, None].clone()
        self.logits = torch.empty((rows, language.config.vocab_size), dtype=cache.keys.dtype, device=device)
        self.best = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.add_norm, self.append = _fused_ops()
        self._steps = 0
        self._graph: Any = None

    def advance(self) -> None:
        """`tokens` at `positions` -> `logits`, `best`; positions move on by one."""
        if self._graph is None and self._steps == 1 and self.tokens.is_cuda:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._compute()
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        self._steps += 1

    def _compute(self) -> None:
        language, config = self.language, self.language.config
        rows, hidden = self.tokens.shape[0], language.embed_tokens(self.tokens)  # [B, 1, Dl]
        layers: list[Any] = list(language.layers)
        normed = layers[0].input_norm(hidden)
        for index, layer in enumerate(layers):
            attention = layer.attention
            q = attention.q(normed).view(rows, 1, config.num_heads, config.head_dim)
            k = attention.k(normed).view(rows, 1, config.num_kv_heads, config.head_dim)
            v = attention.v(normed).view(rows, 1, config.num_kv_heads, config.head_dim)
            keys, values = self.keys[index], self.values[index]
            q = self.append(q, k, v, keys, values, self.positions, config.rope_theta)
            attended = attention.o(attention.decode_attention(q, keys, values, self.positions).flatten(2))
            normed, hidden = self.add_norm(attended, hidden, layer.post_norm.weight, config.rms_norm_eps)
            following = layers[index + 1].input_norm if index + 1 < len(layers) else language.norm
            normed, hidden = self.add_norm(layer.mlp(normed), hidden, following.weight, config.rms_norm_eps)
        self.logits.copy_(language.logits(normed[:, 0]))
        self.best.copy_(self.logits.argmax(dim=-1, keepdim=True))
        self.positions.add_(1)


def _fused_ops() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """(x + residual then rms_norm, rope then append to the cache), fused in Triton where it can run."""
    if implementation() == "triton":
        from ..kernels.triton.rms_norm import add_rms_norm
        from ..kernels.triton.rope import rope_append

        return add_rms_norm, rope_append
    return _add_norm, _append


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = residual + x
    return rms_norm(summed, weight, eps), summed


def _append(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, theta: float) -> Tensor:
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[rows, positions] = rope(k, positions, theta)
    v_cache[rows, positions] = v
    return rope(q, positions, theta)
