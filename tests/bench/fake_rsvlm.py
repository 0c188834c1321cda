"""A model with RSVLM's public calls and no weights: answers, times and logits are known in advance.

bfloat16 says another last word about images whose name holds "odd"; float16 cannot be loaded; "crash" ends the process.
Its embedding of an image is that of the first word of its name, or of "river" when the name holds "odd".
Every call that reads an image notes its tiling in `FakeRSVLM.tilings`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from rsvlm_infer.backends.base import Embeddings
from rsvlm_infer.config import AlignmentConfig
from rsvlm_infer.errors import BackendError
from rsvlm_infer.tasks.result import Answer, Classification, Timings, TokenCounts

VOCABULARY = ["a", "green", "field", "near", "the", "river", "road"]
VOCAB = len(VOCABULARY)


class FakeBackend:
    """Logits that depend on the image's name only; bfloat16 adds 0.5 to the first."""

    name = "eager"

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def prefill(self, sequences: Sequence[str], capacity: int) -> tuple[np.ndarray, None]:
        logits = np.stack([np.roll(np.arange(VOCAB, dtype=np.float32), len(name)) for name in sequences])
        logits[:, 0] += 0.5 * (self.precision == "bfloat16")
        return logits, None


class FakeRSVLM:
    """Ten visual tokens an image or its budget, 1000 x 2000 pixels each."""

    tilings: ClassVar[list[tuple[str, str | None]]] = []  # (call, tiling) of every image read, over all models

    def __init__(self, backend: Any, tokenizer: Any) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(alignment=AlignmentConfig(embed_size=4))

    @classmethod
    def from_pretrained(cls, path: str | Path, backend: str = "auto", precision: str = "auto") -> FakeRSVLM:
        if precision == "float16":
            raise BackendError("precision float16 is not for this fake; use float32")
        if precision == "crash":
            os._exit(9)
        return cls(FakeBackend(precision), None)

    def caption(
        self, image: Path, *, max_new_tokens: int, tiling: str | None = None, max_visual_tokens: int | None = None
    ) -> Answer:
        self.tilings.append(("caption", tiling))
        return self._answers([image], max_new_tokens, max_visual_tokens)[0]

    def caption_many(
        self,
        images: Iterable[Path],
        *,
        batch_size: int,
        strict: bool,
        max_new_tokens: int,
        tiling: str | None = None,
        max_visual_tokens: int | None = None,
    ) -> Iterator[Answer]:
        images = list(images)
        self.tilings.append(("caption_many", tiling))
        for first in range(0, len(images), batch_size):
            yield from self._answers(images[first : first + batch_size], max_new_tokens, max_visual_tokens)

    def ask(
        self,
        image: Path,
        question: str,
        *,
        choices: Sequence[str] | None,
        max_new_tokens: int,
        tiling: str | None = None,
        max_visual_tokens: int | None = None,
    ) -> Answer:
        self.tilings.append(("ask", tiling))
        return Answer(source=str(image), text=choices[0] if choices else "3")

    def classify(
        self, image: Path, labels: Sequence[str], *, tiling: str | None = None, max_visual_tokens: int | None = None
    ) -> Classification:
        self.tilings.append(("classify", tiling))
        named = [label for label in labels if label.split()[0] in image.name]
        return Classification(source=str(image), label=(named or list(labels))[0])

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._embedding(text) for text in texts])

    def embed_levels(self, image: Path, *, tiling: str | None = None, max_visual_tokens: int | None = None) -> Embeddings:
        self.tilings.append(("embed_levels", tiling))
        empty = np.zeros(0, dtype=np.float32)
        return Embeddings(empty, empty, self._embedding("river" if "odd" in image.name else image.stem))

    @staticmethod
    def _embedding(text: str) -> np.ndarray:
        words = ("forest", "river", "beach", "road")
        hot = [float(word in text.lower()) for word in words]
        return np.array(hot if any(hot) else [0.5] * 4, dtype=np.float32)

    def _answers(self, images: Sequence[Path], max_new_tokens: int, budget: int | None) -> list[Answer]:
        self.backend.prefill([image.name for image in images], 64)
        return [self._answer(image, max_new_tokens, min(10, budget or 10)) for image in images]

    def _answer(self, image: Path, max_new_tokens: int, visual: int) -> Answer:
        ids = [0, 1, 2, 3, 4, 5][:max_new_tokens]
        if self.backend.precision == "bfloat16" and "odd" in image.name:
            ids[-1] = 6
        decode_ms = 5.0 * (len(ids) - 1)
        return Answer(
            source=str(image),
            plan=SimpleNamespace(scene_height=1000, scene_width=2000),  # type: ignore[arg-type]
            timings=Timings(1.0, 2.0, 3.0, 4.0, 0.0, 6.0, decode_ms, 16.0, 5.0 if len(ids) > 1 else 0.0),
            text=" ".join(VOCABULARY[i] for i in ids),
            token_ids=tuple(ids),
            tokens=TokenCounts(prompt=5, visual=visual, generated=len(ids)),
        )
