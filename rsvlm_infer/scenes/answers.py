"""Owns the lazy walk over the windows of one run. Knows no model and no output."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from ..engine.checks import check_integer
from ..errors import InputError
from .record import GridWindow, SceneHeader, SceneRun, WindowRecord
from .windows import batches

DEFAULT_BATCH = 4


class SceneAnswers(Iterator[WindowRecord]):
    """Records in the order of the windows, computed as they are asked for. The file closes with the last one, or by `close`.

    header: what holds for the whole scene. windows: what will be answered.
    """

    def __init__(self, run: SceneRun, batch_size: int = DEFAULT_BATCH) -> None:
        """batch_size: windows that go through the model together.

        Raises:
            InputError: a batch size below 1.
        """
        check_integer("batch_size", batch_size)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}; raise it")
        self.header: SceneHeader = run.header
        self.windows: Sequence[GridWindow] = run.windows
        self._run = run
        self._records = self._answer(batch_size)

    def __next__(self) -> WindowRecord:
        return next(self._records)

    def __len__(self) -> int:
        return len(self.windows)

    def close(self) -> None:
        """Frees what is held open; no record comes after it."""
        self._records.close()
        self._run.close()

    def __enter__(self) -> SceneAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, batch_size: int) -> Generator[WindowRecord, None, None]:
        try:
            for group in batches(self.windows, batch_size):
                yield from self._run.answer(group)
        finally:
            self._run.close()
