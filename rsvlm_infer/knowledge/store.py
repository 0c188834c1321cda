"""The semantic knowledge base: short texts about the Earth's surface, each of one level, with their embeddings.

Owns its two files, entries.jsonl and embeddings.safetensors, and one exact search per level. Knows no model and no torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..config import LEVELS
from ..errors import CheckpointError, InputError
from ..ops.registry import resolve

ENTRIES = "entries.jsonl"
EMBEDDINGS = "embeddings.safetensors"
MAX_ENTRIES_BYTES = 256 << 20
_NORM_TOLERANCE = 1e-2  # float16 keeps a unit vector's length to about 1e-3


class KnowledgeBase:
    """M entries: texts, levels int8 [M] (0 object, 1 region, 2 scene), embeddings float16 [M, De] of unit length. Never changed.

    embedder: digest of the checkpoint that made the embeddings; None = not recorded, then nothing is checked.

    Raises:
        InputError: lengths that differ, a level that does not exist, a blank text, or embeddings that are not of unit length.
    """

    def __init__(
        self,
        texts: Sequence[str],
        levels: NDArray[np.integer[Any]],
        embeddings: NDArray[np.floating[Any]],
        embedder: str | None = None,
    ) -> None:
        if embeddings.ndim != 2 or not len(texts) == len(levels) == len(embeddings):
            raise InputError(
                f"texts, levels and embeddings [M, De] must have one length, got {len(texts)}, {len(levels)} and "
                f"{list(embeddings.shape)}; give each text a level and an embedding"
            )
        unknown = sorted({int(level) for level in levels} - set(range(len(LEVELS))))
        if unknown:
            raise InputError(f"levels must be in 0..{len(LEVELS) - 1} for {LEVELS}, got {unknown}; correct them")
        blank = [index for index, text in enumerate(texts) if not text.strip()]
        if blank:
            raise InputError(f"texts must not be blank, got blank ones at {blank[:5]}; remove them")
        norms = np.linalg.norm(embeddings.astype(np.float32), axis=1)
        if not (np.abs(norms - 1.0) <= _NORM_TOLERANCE).all():  # written so that NaN fails too
            worst = int(np.nanargmax(np.abs(norms - 1.0))) if np.isfinite(norms).any() else 0
            raise InputError(f"embeddings must have length 1, entry {worst} has {norms[worst]:.4g}; L2-normalise them")
        self.embedder = embedder
        self.texts = tuple(texts)
        self.levels = levels.astype(np.int8)
        self.embeddings = np.ascontiguousarray(embeddings, dtype=np.float16)
        # ascending rows, so that the lowest row of a level is also the lowest of the base when scores tie
        self._rows = [np.flatnonzero(self.levels == level) for level in range(len(LEVELS))]
        self._entries = [self.embeddings[rows] for rows in self._rows]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def embed_size(self) -> int:
        return int(self.embeddings.shape[1])

    def require_embedder(self, embedder: str) -> None:
        """Refuses a checkpoint other than the one that embedded the entries: their cosines would mean nothing.

        Raises:
            CheckpointError: the recorded digest differs.
        """
        if self.embedder is not None and self.embedder != embedder:
            raise CheckpointError(
                f"knowledge base was embedded by checkpoint {self.embedder[:12]}, it cannot be used with checkpoint "
                f"{embedder[:12]}; build it again with this checkpoint: rsvlm kb build"
            )

    def search(
        self, level: int, visual: NDArray[np.float32], query: NDArray[np.float32] | None, k: int, beta: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[str, ...]]:
        """The k best entries of one level for a scene's embeddings [V, De] and a query's [De]; see `ops.cue_search`.

        Returns:
            Scores float32 [k], ids int64 [k] (rows of `embeddings`) and texts; fewer when the level has fewer. Ties by id.

        Raises:
            InputError: a level that does not exist, or arguments that do not fit.
        """
        if not 0 <= level < len(LEVELS):
            raise InputError(f"level must be in 0..{len(LEVELS) - 1} for {LEVELS}, got {level}; choose one of them")
        scores, rows = resolve("cue_search")(visual, query, self._entries[level], k, beta)
        ids: NDArray[np.int64] = self._rows[level][rows].astype(np.int64)
        return scores, ids, tuple(self.texts[index] for index in ids)

    def save(self, folder: Path) -> None:
        """Writes the two files beside the folder and swaps them in whole; an existing folder is replaced."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            lines = (
                json.dumps({"level": LEVELS[level], "text": text}, ensure_ascii=False)
                for text, level in zip(self.texts, self.levels, strict=True)
            )
            (new / ENTRIES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            metadata = None if self.embedder is None else {"embedder": self.embedder}
            save_file({"embeddings": self.embeddings}, new / EMBEDDINGS, metadata)
            (new / EMBEDDINGS).chmod(new.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
            if folder.exists():
                folder.replace(old)
            try:
                new.replace(folder)
            except OSError:
                if old.exists():
                    old.replace(folder)
                raise

    @classmethod
    def load(cls, folder: Path) -> KnowledgeBase:
        """From a folder that `save` wrote.

        Raises:
            CheckpointError: a file is absent, damaged or too large, or the two do not fit together.
        """
        folder = Path(folder)
        try:
            if (folder / ENTRIES).stat().st_size > MAX_ENTRIES_BYTES:
                raise ValueError(f"it is larger than {MAX_ENTRIES_BYTES >> 20} MiB")
            lines = (folder / ENTRIES).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 in a text
            entries = [json.loads(line) for line in lines if line.strip()]
            texts = [str(entry["text"]) for entry in entries]
            levels = np.array([LEVELS.index(entry["level"]) for entry in entries], dtype=np.int8)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(folder / ENTRIES, error) from None
        try:
            with safe_open(folder / EMBEDDINGS, framework="numpy") as file:
                embeddings = file.get_tensor("embeddings")
                embedder = (file.metadata() or {}).get("embedder")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(folder / EMBEDDINGS, error) from None
        try:
            return cls(texts, levels, embeddings, embedder)
        except InputError as error:
            raise CheckpointError(f"knowledge base {folder}: {error}; or restore the folder from its source") from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{file} must be a readable part of a knowledge base, it is not ({type(error).__name__}: {reason}); restore it"
    )
