"""Owns one worker of a job: a loaded model, the scenes that it has open, and what became of each task. Knows no journal and no cluster.

A worker never raises for one scene or one window: what happened comes back as an `Outcome`. Only what would fail everywhere, such as a
missing library, stops the job.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import BackendError, CheckpointError, ConfigError, MissingDependencyError, RsvlmError
from ..hardware import peak_rss_bytes
from .journal import AnswerKey
from .record import GridWindow, SceneHeader, SceneRun, WindowRecord

Trouble = Literal["memory", "other", "everywhere"]

_EVERYWHERE = (BackendError, CheckpointError, ConfigError, MissingDependencyError)
_NO_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "bad allocation",
)


class SceneOpener(Protocol):
    """A loaded model that opens scenes. `budget` is its own number of visual tokens for a window, `least_budget` the smallest it takes."""

    budget: int
    least_budget: int

    def open(self, source: str, budget: int | None) -> SceneRun:
        """The scene with its windows decided; None takes the opener's own budget."""
        ...


@dataclass(frozen=True)
class Task:
    """Windows of one scene that are answered as one micro-batch; without windows, the scene is only opened.

    budget: visual tokens for each window, None = the opener's own. key: what the answers will be kept under.
    """

    source: str
    budget: int | None
    windows: tuple[GridWindow, ...] = ()
    key: AnswerKey | None = None


@dataclass(frozen=True)
class Opened:
    """What an opened scene said of itself, and what its opener said of budgets."""

    header: SceneHeader
    windows: tuple[GridWindow, ...]
    budget: int
    least_budget: int


@dataclass(frozen=True)
class Outcome:
    """What became of a task: `opened` or `records`, or else a trouble with its reason. seconds: of answering alone."""

    task: Task
    opened: Opened | None = None
    records: tuple[WindowRecord, ...] = ()
    seconds: float = 0.0
    trouble: Trouble | None = None
    reason: str = ""
    peak_rss_bytes: int = 0


class Workers(Protocol):
    """Where tasks are done. `capacity` tasks may be handed in before an outcome is taken."""

    capacity: int

    def submit(self, task: Task) -> None:
        """Takes a task."""
        ...

    def next(self) -> Outcome:
        """The outcome of one of the submitted tasks, in any order."""
        ...

    def close(self) -> None:
        """Frees models and scenes."""
        ...


class Worker:
    """Does tasks with one model. `keep` scenes stay open, the last used ones."""

    def __init__(self, opener: SceneOpener, keep: int = 1) -> None:
        self._opener = opener
        self._keep = keep
        self._open: dict[tuple[str, int | None], SceneRun] = {}

    def do(self, task: Task) -> Outcome:
        """The outcome; KeyboardInterrupt and SystemExit alone pass through."""
        try:
            run = self._run(task)
            if not task.windows:
                windows = tuple(run.windows)
                opened = Opened(run.header, windows, self._opener.budget, self._opener.least_budget)
                return Outcome(task, opened=opened, peak_rss_bytes=peak_rss_bytes())
            _check_same(task, run.header)
            started = time.perf_counter()
            records = tuple(run.answer(task.windows))
            seconds = time.perf_counter() - started
            _check_places(task.windows, records)
            return Outcome(task, records=records, seconds=seconds, peak_rss_bytes=peak_rss_bytes())
        except Exception as error:
            trouble, reason = trouble_of(error), reason_of(error)
        # outside of the handler: the traceback held the failed step's arrays
        if trouble == "memory":
            self._give_back()
        return Outcome(task, trouble=trouble, reason=reason, peak_rss_bytes=peak_rss_bytes())

    def close(self) -> None:
        """Closes the scenes that are open."""
        for run in self._open.values():
            run.close()
        self._open.clear()

    def _run(self, task: Task) -> SceneRun:
        place = (task.source, task.budget)
        run = self._open.pop(place, None)
        if run is None:
            while len(self._open) >= self._keep:
                self._open.pop(next(iter(self._open))).close()
            run = self._opener.open(task.source, task.budget)
        self._open[place] = run
        return run

    def _give_back(self) -> None:
        self.close()
        gc.collect()
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


class LocalWorkers:
    """One worker in this process."""

    capacity = 1

    def __init__(self, opener: SceneOpener) -> None:
        self._worker = Worker(opener)
        self._tasks: list[Task] = []

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def next(self) -> Outcome:
        return self._worker.do(self._tasks.pop(0))

    def close(self) -> None:
        self._worker.close()


def trouble_of(error: BaseException) -> Trouble:
    """Whether an error is about memory, about the job as a whole, or about one scene or window."""
    if any(_no_memory(each) for each in _chain(error)):
        return "memory"
    return "everywhere" if isinstance(error, _EVERYWHERE) else "other"


def reason_of(error: BaseException) -> str:
    """One line."""
    words = " ".join(str(error).split())
    if isinstance(error, RsvlmError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _no_memory(error: BaseException) -> bool:
    """MemoryError, which std::bad_alloc becomes too, and how torch and onnxruntime say the same."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY_WORDS)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came from, also where `from None` hides them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _check_same(task: Task, header: SceneHeader) -> None:
    """The scene and the model must be those that the job opened: a cluster's workers have their own files."""
    if task.key is None:
        return
    found = AnswerKey.of(header)
    for name, wanted, here in (
        ("the scene's content", task.key.content_hash, found.content_hash),
        ("the checkpoint", task.key.model_hash, found.model_hash),
        ("the prompt", task.key.prompt_hash, found.prompt_hash),
    ):
        if wanted != here:
            raise ConfigError(
                f"{name} of {task.source} must be the same for every worker, expected sha256 {wanted[:12]}…, got {here[:12]}…; "
                "let all machines see the same files, leave them alone while the job runs, and run again"
            )


def _check_places(windows: Sequence[GridWindow], records: Sequence[WindowRecord]) -> None:
    if [record.place for record in records] != list(windows):
        raise ConfigError(
            f"answer() must give one record for each of {len(windows)} windows, in their order; got {len(records)}"
        )
