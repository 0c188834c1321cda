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

from ..errors import BackendError, InputError
from ..knowledge.store import KnowledgeBase
from ..layers.language_model import KvCache, LanguageModel
from ..layers.packed_linear import pack_linears
from ..models.load import load_checkpoint
from ..ops.registry import OPS
from ..ops.registry import why_not as op_why_not
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from .eager import EagerBackend

_log = logging.getLogger(__name__)


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


@once
def triton_ops() -> frozenset[str]:
    """Ops whose Triton twin can run here. On this backend the others run eager; every distinct reason is logged once, with its ops.

    Layers come to the same choice through `auto`, which never takes "native" for tensors on a CUDA device.
    """
    able: set[str] = set()
    eager: dict[str, list[str]] = {}
    for op, names in OPS.items():
        if "triton" not in names:
            continue
        reason = op_why_not(op, "triton")
        if reason is None:
            able.add(op)
        else:
            eager.setdefault(reason, []).append(op)
    for reason, ops in eager.items():
        _log.warning("cuda backend: Triton kernels of %s cannot run here (%s), using eager", ", ".join(ops), reason)
    return frozenset(able)


class CudaBackend(EagerBackend):
    """`Backend` on one CUDA device."""

    name = "cuda"

    @classmethod
    def load(cls, path: Path, precision: str) -> CudaBackend:
        """From a checkpoint folder, onto the current CUDA device.

        "int8" and "int4" store the matrices of the language model's layers so, one scale per 32 columns; everything else, word
        embeddings and the vision side too, is bfloat16, and so are all activations.

        Raises:
            InputError: "int8" or "int4" for a language model whose widths are no multiples of 32.
        """
        triton_ops()  # says once what falls back
        packed = precision in ("int8", "int4")
        loaded = load_checkpoint(path, dtype="bfloat16" if packed else precision, implementation="auto")
        knowledge = None if loaded.knowledge_folder is None else KnowledgeBase.load(loaded.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(loaded.embedder)
        model = loaded.model.to("cuda")
        if packed and model.language_model is not None:
            pack_linears(model.language_model.layers, "int8" if precision == "int8" else "int4", "auto")
        return cls(model, precision, knowledge)

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
            InputError: the cache has no room for that many tokens. BackendError: a best logit that is not a finite number.
        """
        step = self._step(cache, steps)
        step.tokens.copy_(self._tensor(np.asarray(token_ids, dtype=np.int64))[:, None])
        chosen = torch.empty((len(token_ids), steps), dtype=torch.int32, device=self.device)
        for index in range(steps):
            step.advance()
            step.tokens.copy_(step.best)
            chosen[:, index] = step.chosen
        cache.lengths = cache.lengths + steps
        result: npt.NDArray[np.int32] = chosen.cpu().numpy()
        if (result < 0).any():
            raise BackendError(
                "logits must be finite, got a best one that is not; the weights or this precision overflow: try float32"
            )
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
        self.chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        self.add_norm, self.append = _fused_ops()
        self._steps = 0
        self._graph: Any = None

    def advance(self) -> None:
        """`tokens` at `positions` -> `logits`, their argmax `best`, and `chosen`: `best`, or -1 where that logit is not finite.

        Positions move on by one.
        """
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
        finite = torch.isfinite(self.logits.gather(1, self.best))  # argmax finds NaN first
        self.chosen.copy_(torch.where(finite, self.best, -1)[:, 0])
        self.positions.add_(1)


def _fused_ops() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """(x + residual then rms_norm, rope then append to the cache), each fused in Triton where its op can run there."""
    add_norm, append = _add_norm, _append
    if "rms_norm" in triton_ops():
        from ..kernels.triton.rms_norm import add_rms_norm as add_norm
    if "rope" in triton_ops():
        from ..kernels.triton.rope import rope_append as append
    return add_norm, append


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = residual + x
    return rms_norm(summed, weight, eps), summed


def _append(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, theta: float) -> Tensor:
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[rows, positions] = rope(k, positions, theta)
    v_cache[rows, positions] = v
    return rope(q, positions, theta)
