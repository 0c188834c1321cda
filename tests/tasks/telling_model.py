"""A byte-level tokenizer and a fake backend that names the colour it sees, so that whole answers can be asserted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from rsvlm_infer.backends.base import Embeddings, ImageFeatures, Prompt
from rsvlm_infer.config import DrisConfig, RsvlmConfig
from rsvlm_infer.contract import tap_names
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.text.tokenizer import Tokenizer
from tests.engine.fake_backend import FakeBackend, FakeCache, fake_config

END, IMAGE, VOCAB = 0, 257, 258
COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}


def write_tokenizer(folder: Path) -> Path:
    """tokenizer.json with one token per byte: id 1 + byte, 0 ends, 257 is the image."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(characters.values()) == set(alphabet)
    vocabulary = {"<end>": END, "<image>": IMAGE} | {character: 1 + byte for byte, character in characters.items()}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<end>", "<image>"])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    return folder


def byte_ids(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def telling_config(**changes: Any) -> RsvlmConfig:
    language = dataclasses.replace(fake_config().language, vocab_size=VOCAB, max_positions=512)  # type: ignore[type-var]
    values: dict[str, Any] = {"language": language, "image_token_id": IMAGE, "eos_token_ids": (END,)}
    values["dris"] = DrisConfig(leaf_grids=(2, 4), leaf_thresholds=(0.2,), max_tiles=16, max_visual_tokens=128)
    return fake_config(**(values | changes))


def picture(colour: str, height: int = 28, width: int = 28) -> npt.NDArray[np.uint8]:
    return np.full((height, width, 3), COLOURS[colour], dtype=np.uint8)


@dataclass
class TellingBackend(FakeBackend):
    """Answers every prompt with `reply`, {colour} filled with the strongest channel of the image's base tile."""

    config: RsvlmConfig = field(default_factory=telling_config)
    reply: str = " A {colour} scene.\n"
    prompts: list[str] = field(default_factory=list)

    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[npt.NDArray[np.float32], FakeCache]:
        replies = []
        for sequence in sequences:
            text = [int(token) for token in sequence.token_ids if token != IMAGE]
            self.prompts.append(bytes(token - 1 for token in text if 1 <= token <= 256).decode())
            colour = list(COLOURS)[int(self.embed_image(sequence.images[0]).scene.argmax())]
            replies.append([*byte_ids(self.reply.format(colour=colour)), END])
        self.prefills.append(len(sequences))
        cache = FakeCache(replies, capacity)
        return self._logits(cache), cache

    def decode(self, cache: FakeCache, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        assert not cache.dead
        self.decodes.append(len(cache.rows))
        for row in cache.rows:
            del row[:1]
        return self._logits(cache)

    def keep(self, cache: FakeCache, rows: Sequence[int]) -> FakeCache:
        cache.dead = True
        return FakeCache([list(cache.rows[row]) for row in rows], cache.capacity)

    def _logits(self, cache: FakeCache) -> npt.NDArray[np.float32]:
        logits = np.zeros((len(cache.rows), VOCAB), dtype=np.float32)
        for i, row in enumerate(cache.rows):
            logits[i, row[0] if row else END] = 8.0
        return logits


@dataclass
class StagedTellingBackend(TellingBackend):
    """The same step by step: a tap holds the mean red, green and blue of each patch. `tiles_encoded` counts scenes."""

    tiles_encoded: int = 0

    def encode_tiles(self, scenes: Sequence[PackedScene]) -> list[dict[str, npt.NDArray[np.float32]]]:
        self.tiles_encoded += len(scenes)
        found = []
        for scene in scenes:
            colours = scene.patches.reshape(len(scene.patches), 3, -1).mean(axis=2)
            tap = np.pad(colours, ((0, 0), (0, self.config.vision.hidden_size - 3))).astype(np.float32)
            found.append(dict.fromkeys(tap_names(), tap))
        return found

    def align(self, taps: dict[str, npt.NDArray[np.float32]], scene: PackedScene) -> Embeddings:
        bounds, colours = scene.cu_seqlens, taps["tap_scene"][:, :3]
        tiles = np.stack([colours[start:stop].mean(axis=0) for start, stop in itertools.pairwise(bounds)])
        tiles = (tiles / np.linalg.norm(tiles, axis=1, keepdims=True)).astype(np.float32)
        return Embeddings(object=tiles[:, None, :], region=tiles, scene=tiles[0])

    def find_cues(self, embeddings: Embeddings | None, query: Any) -> tuple[None, tuple[str, ...]]:
        assert embeddings is not None
        return None, ("a cue",)

    def bridge(self, taps: dict[str, npt.NDArray[np.float32]], scene: PackedScene, cues: Any) -> npt.NDArray[np.float32]:
        return taps["tap_scene"][: scene.num_tokens]

    def features_of(self, tokens: npt.NDArray[np.float32]) -> ImageFeatures:
        return ImageFeatures(tokens, len(tokens))

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        if isinstance(features.handle, PackedScene):
            return super().embed_image(features)
        colours = features.handle[:, :3].mean(axis=0)
        return Embeddings(object=colours[None, None], region=colours[None], scene=colours)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(folder))
