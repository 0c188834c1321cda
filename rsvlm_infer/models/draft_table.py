"""What a model tends to say next: n-grams of its own answers, counted once and kept as a small file. Knows token ids, no text.

A guess from it costs a look-up; the model still decides every token, so a table changes the speed of an answer and never the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, InputError
from .checkpoint import open_weights

START = -1  # stands before the first token of every answer, so that beginnings have contexts of their own
LONGEST_CONTEXT = 8  # of a file; more would be whole captions
MAX_BYTES = 16 << 20  # of a file, which is read into memory whole
_CHANCES = 255  # a chance is kept as one byte

Context = tuple[int, ...]


class DraftTable:
    """The likeliest next token after the last tokens of an answer, and how likely it is."""

    def __init__(self, entries: dict[Context, tuple[int, float]]) -> None:
        """entries: the last tokens of an answer, `START` before its first -> (next token, chance in 0..1)."""
        self._entries = entries
        self.longest = max(map(len, entries), default=0)

    def __len__(self) -> int:
        return len(self._entries)

    def follow(self, answer: Sequence[int]) -> tuple[int, float] | None:
        """The likeliest token after an answer (`START` first) by its longest known ending, and its chance; None when none is known."""
        for length in range(min(self.longest, len(answer)), 0, -1):
            found = self._entries.get(tuple(answer[-length:]))
            if found is not None:
                return found
        return None

    @classmethod
    def from_answers(cls, answers: Iterable[Sequence[int]], longest: int) -> DraftTable:
        """Counts what follows the last 1 to `longest` tokens in answers, end tokens included where an answer ended by itself.

        A chance is the share of the likeliest follower with one more sight of something else: what was seen once is no certainty.

        Raises:
            InputError: `longest` is out of its range.
        """
        if not 1 <= longest <= LONGEST_CONTEXT:
            raise InputError(f"longest must be in 1..{LONGEST_CONTEXT} tokens, got {longest}; choose another one")
        followers: dict[Context, Counter[int]] = {}
        for answer in answers:
            tokens = [START, *map(int, answer)]
            for place in range(2, len(tokens)):  # the first token comes from the prompt's logits: nothing is there to guess it
                for length in range(1, min(longest, place) + 1):
                    followers.setdefault(tuple(tokens[place - length : place]), Counter())[tokens[place]] += 1
        entries = {}
        for context, counts in followers.items():
            token, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
            entries[context] = (token, round(_CHANCES * count / (counts.total() + 1)) / _CHANCES)
        return cls(entries)

    def save(self, path: Path) -> None:
        """Writes safetensors: for each length n `context.n` int32 [K, n], `token.n` int32 [K] and `chance.n` uint8 [K]."""
        from safetensors.numpy import save_file

        arrays: dict[str, npt.NDArray[Any]] = {}
        for length in range(1, self.longest + 1):
            chosen = sorted((context, entry) for context, entry in self._entries.items() if len(context) == length)
            contexts = np.array([context for context, _ in chosen], np.int32).reshape(len(chosen), length)
            arrays[f"context.{length}"] = contexts
            arrays[f"token.{length}"] = np.array([token for _, (token, _) in chosen], np.int32)
            arrays[f"chance.{length}"] = np.array([round(chance * _CHANCES) for _, (_, chance) in chosen], np.uint8)
        temporary = path.with_name(f".{path.name}.new")
        save_file(arrays, temporary)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> DraftTable:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: no such table, or one whose tokens are not those of a vocabulary of `vocab_size`.
        """
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise _problem(path, f"it has {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        with open_weights(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safetensors file is no dict
        longest = len(arrays) // 3
        names = {f"{part}.{length}" for part in ("context", "token", "chance") for length in range(1, longest + 1)}
        if set(arrays) != names or not 1 <= longest <= LONGEST_CONTEXT:
            raise _problem(path, f"it must hold context.n, token.n and chance.n for n from 1, got {sorted(arrays)[:12]}")
        entries: dict[Context, tuple[int, float]] = {}
        for length in range(1, longest + 1):
            contexts, tokens, chances = (arrays[f"{part}.{length}"] for part in ("context", "token", "chance"))
            rows = len(tokens)
            shapes = (contexts.shape, tokens.shape, chances.shape)
            dtypes = (contexts.dtype, tokens.dtype, chances.dtype)
            if shapes != ((rows, length), (rows,), (rows,)) or dtypes != (np.int32, np.int32, np.uint8):
                raise _problem(
                    path, f"contexts of {length} tokens must be int32, int32 and uint8 of one length, got {shapes}, {dtypes}"
                )
            if rows and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                raise _problem(path, f"tokens must be in 0..{vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
            pairs = zip(tokens.tolist(), (chances / _CHANCES).tolist(), strict=True)
            entries |= zip(map(tuple, contexts.tolist()), pairs, strict=True)
        return cls(entries)


def _problem(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"draft table {path}: {reason}; restore it from its source, or remove it: answers stay the same")
