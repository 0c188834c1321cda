"""A numpy model whose logits can be worked out by hand: a row's next token depends on nothing but its own prompt and tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rsvlm_infer.backends.base import Embeddings, ImageFeatures, Prompt, Query
from rsvlm_infer.config import (
    AlignmentConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    VisionConfig,
)
from rsvlm_infer.imagery.pack import PackedScene

VOCAB = 32
EOS = 0
IMAGE = 31


def fake_config(**changes: Any) -> RsvlmConfig:
    """A small but complete config: 28-px tiles of 2 x 2 patches, 32 words, 128 positions."""
    values: dict[str, Any] = {
        "vision": VisionConfig(
            family="clip",
            hidden_size=8,
            intermediate_size=16,
            num_layers=2,
            num_heads=2,
            patch_size=14,
            position_grid=2,
            taps=(1, 1, 2),
            activation="gelu",
            interpolation="bicubic",
            layer_norm_eps=1e-5,
            class_token=True,
            pre_norm=True,
            patch_bias=False,
            layer_scale=False,
        ),
        "preprocess": PreprocessConfig(tile_px=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "language": LanguageConfig(
            family="llama",
            vocab_size=VOCAB,
            hidden_size=8,
            intermediate_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_positions=128,
            qkv_bias=False,
            tie_embeddings=True,
        ),
        "projector": ProjectorConfig(hidden_size=8),
        "alignment": AlignmentConfig(embed_size=3, weights=(1.0, 0.0, 0.0), logit_scale=10.0),
        "image_token_id": IMAGE,
        "eos_token_ids": (EOS,),
    }
    return RsvlmConfig(**(values | changes))


@dataclass
class FakeCache:
    """The tokens that each row has seen."""

    rows: list[list[int]]
    capacity: int
    dead: bool = False


@dataclass
class FakeBackend:
    """Next token = last token + 1 modulo 8, so every row walks ... 6 7 0 and stops at EOS; scripts replace that walk.

    scripts: first prompt token -> the logits of each step, for tests that need probabilities.
    """

    config: RsvlmConfig = field(default_factory=fake_config)
    scripts: dict[int, list[list[float]]] = field(default_factory=dict)
    name: str = "fake"
    precision: str = "float32"
    prefills: list[int] = field(default_factory=list)  # rows of each call
    decodes: list[int] = field(default_factory=list)
    queries: list[Query | None] = field(default_factory=list)
    encoded: list[PackedScene] = field(default_factory=list)

    def encode(self, scenes: Sequence[PackedScene], queries: Sequence[Query | None] | None = None) -> list[ImageFeatures]:
        self.queries += list(queries or [None] * len(scenes))
        self.encoded += list(scenes)
        return [ImageFeatures(scene, scene.num_tokens, ("a cue",), encode_ms=2.0, augment_ms=1.0) for scene in scenes]

    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[npt.NDArray[np.float32], FakeCache]:
        self.prefills.append(len(sequences))
        cache = FakeCache([[int(token) for token in sequence.token_ids] for sequence in sequences], capacity)
        self.start = [len(row) for row in cache.rows]
        return self._logits(cache), cache

    def decode(self, cache: FakeCache, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        assert not cache.dead, "a cache must not be used after keep"
        assert token_ids.dtype == np.int32
        assert len(token_ids) == len(cache.rows)
        self.decodes.append(len(cache.rows))
        for row, token in zip(cache.rows, token_ids, strict=True):
            row.append(int(token))
            assert len(row) <= cache.capacity
        return self._logits(cache)

    def keep(self, cache: FakeCache, rows: Sequence[int]) -> FakeCache:
        cache.dead = True
        self.start = [self.start[row] for row in rows]
        return FakeCache([list(cache.rows[row]) for row in rows], cache.capacity)

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        """The mean red, green and blue of the tiles as sent to the encoder."""
        scene: PackedScene = features.handle
        bounds = scene.cu_seqlens
        colours = scene.patches.reshape(len(scene.patches), 3, -1).mean(axis=2)  # [S, 3]
        tiles = np.stack([colours[start:stop].mean(axis=0) for start, stop in itertools.pairwise(bounds)])
        tiles = (tiles / np.linalg.norm(tiles, axis=1, keepdims=True)).astype(np.float32)
        return Embeddings(object=tiles[:, None, :], region=tiles, scene=tiles[0])

    def embed_text(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """The last token modulo 3 names a colour."""
        return np.eye(3, dtype=np.float32)[[int(ids[-1]) % 3 for ids in token_ids]]

    def _logits(self, cache: FakeCache) -> npt.NDArray[np.float32]:
        logits = np.zeros((len(cache.rows), VOCAB), dtype=np.float32)
        for i, row in enumerate(cache.rows):
            script = self.scripts.get(row[0])
            if script is None:
                logits[i, (row[-1] + 1) % 8] = 5.0
            else:
                logits[i] = script[len(row) - self.start[i]]
        return logits


@dataclass
class GreedyFakeBackend(FakeBackend):
    """The same model, which can also choose tokens itself."""

    chosen: list[int] = field(default_factory=list)  # rows of each call

    def decode_greedy(self, cache: FakeCache, token_ids: npt.NDArray[np.int32], steps: int) -> npt.NDArray[np.int32]:
        ids = []
        for _ in range(steps):
            token_ids = super().decode(cache, token_ids).argmax(axis=1).astype(np.int32)
            self.decodes.pop()
            self.chosen.append(len(cache.rows))
            ids.append(token_ids)
        return np.stack(ids, axis=1)
