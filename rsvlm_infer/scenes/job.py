"""Owns a job: which windows of which scenes are asked, in which micro-batches, and what happens when one fails. Knows no model.

    open a scene → micro-batches of its windows → journal → when none is left, the scene's files

A killed job does the same again and finds its answers in the journal. Micro-batches are cut at fixed places of the grid, and a scene's
files are always written from the journal: the bytes do not depend on where it was killed, on how many workers answered or in which order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RsvlmError
from .folder import JOURNAL, folder_names, holds, stamp_of, write_report, write_scene
from .journal import AnswerKey, Journal, Limits, Pace, check_limits
from .record import GridWindow, PixelWindow, SceneHeader, WindowRecord
from .worker import Opened, Outcome, Task, Workers

ATTEMPTS = 3
SCHEMA = "rsvlm-job/1"

# writes the formats of one scene into its folder and says which files these are
WriteOutputs = Callable[[SceneHeader, Sequence[WindowRecord], Path, Sequence[str]], list[Path]]


class JobError(RsvlmError, RuntimeError):
    """A job cannot go on: what is wrong would fail for every scene."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do. scenes: paths or URLs. job_hash: sha256 of everything that decides the answers beside the scenes themselves.

    micro_batch: windows answered together. budget: visual tokens for a window, None = the checkpoint's own. formats: written beside
    records.jsonl for each scene.

    Raises:
        InputError: a micro-batch or budget below one.
    """

    scenes: tuple[str, ...]
    output: Path
    job_hash: str
    micro_batch: int = 4
    budget: int | None = None
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_limits(Limits(self.micro_batch, self.budget))


@dataclass(frozen=True)
class Quarantined:
    """A scene that cannot be opened (window None), or a window that failed `attempts` times."""

    source: str
    window: PixelWindow | None
    attempts: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass
class Progress:
    """How far a run is. Windows and pixels of scenes that were not opened yet are not known; `expected_px` supposes their mean.

    reused: windows whose answers were in the journal. computed_px, computed_m2: native pixels and ground of windows answered in this run;
    the ground is None when no scene says its gsd.
    """

    scenes: int
    scenes_done: int = 0
    scenes_known: int = 0
    windows: int = 0
    answered: int = 0
    reused: int = 0
    quarantined: int = 0
    known_px: int = 0
    done_px: int = 0
    computed_px: int = 0
    computed_m2: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def expected_px(self) -> float:
        return self.known_px * self.scenes / self.scenes_known if self.scenes_known else 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def mpix_per_s(self) -> float | None:
        """Of this run's own answers; None before the first."""
        return self.computed_px / self.seconds / 1e6 if self.computed_px else None

    @property
    def km2_per_s(self) -> float | None:
        return None if self.computed_m2 is None else self.computed_m2 / self.seconds / 1e6

    @property
    def eta_s(self) -> float | None:
        rate = self.mpix_per_s
        return None if rate is None else max(0.0, self.expected_px - self.done_px) / (rate * 1e6)


@dataclass(frozen=True)
class JobResult:
    """What a job came to. computed: windows answered in this run; answered: in all."""

    scenes: int
    windows: int
    answered: int
    computed: int
    quarantined: tuple[Quarantined, ...]
    lowered: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass
class _Scene:
    """A scene that is being worked on. waiting: windows without an answer that are not quarantined."""

    source: str
    stamp: str
    key: AnswerKey
    opened: Opened
    waiting: set[PixelWindow]


def run_job(
    job: Job,
    workers: Workers,
    *,
    write_outputs: WriteOutputs | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    retry: bool = False,
) -> JobResult:
    """Answers what the journal has no answer for, writes every scene's files and job.json, and gives the counts.

    write_outputs: writes `job.formats` of one scene into its folder. report: is called whenever something was done. retry: quarantined
    scenes and windows get new attempts, and limits that memory lowered are lifted.

    Raises:
        JournalError: another process works in this folder, or the journal is damaged. JobError: what fails would fail for every scene.
    """
    with Journal(job.output / JOURNAL) as journal:
        if retry:
            journal.forget_failures()
        return _Run(job, workers, journal, write_outputs, report).run()


class _Run:
    def __init__(
        self,
        job: Job,
        workers: Workers,
        journal: Journal,
        write_outputs: WriteOutputs | None,
        report: Callable[[Progress], None],
    ) -> None:
        self._job, self._workers, self._journal = job, workers, journal
        self._write_outputs, self._report = write_outputs, report
        self._folders = folder_names(job.scenes)
        self._sources = iter(job.scenes)
        self._scenes: dict[str, _Scene] = {}
        self._queue: deque[tuple[str, tuple[GridWindow, ...]]] = deque()  # without windows: to be opened
        self._opening: dict[str, str] = {}  # stamps, taken before the file is read
        self._open_attempts: dict[str, int] = {}
        self._summaries: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, Quarantined] = {}
        self._computed = 0
        self._progress = Progress(len(job.scenes))
        lowered = journal.lowered(job.job_hash)
        self._limits = lowered[-1][0] if lowered else Limits(job.micro_batch, job.budget)

    def run(self) -> JobResult:
        in_flight = 0
        while True:
            while in_flight < self._workers.capacity and (task := self._next_task()) is not None:
                self._workers.submit(task)
                in_flight += 1
            self._report(self._progress)
            if not in_flight:
                break
            outcome = self._workers.next()
            in_flight -= 1
            self._settle(outcome)
        return self._close()

    def _next_task(self) -> Task | None:
        if not self._queue:
            source = next(self._unfinished(), None)
            if source is None:
                return None
            self._opening[source] = stamp_of(source)
            self._queue.append((source, ()))
        source, windows = self._queue.popleft()
        if (
            not windows
        ):  # with the budget that was asked for, also when memory lowered it: what answers are kept under stays the same
            return Task(source, self._job.budget)
        now, later = windows[: self._limits.micro_batch], windows[self._limits.micro_batch :]
        if later:
            self._queue.appendleft((source, later))
        return Task(source, self._limits.budget, now, self._scenes[source].key)

    def _unfinished(self) -> Iterator[str]:
        """Scenes whose files are not all there, with what is known of the others."""
        for source in self._sources:
            stamp = stamp_of(source)
            if stamp and (reason := self._journal.refusal(source, stamp)) is not None:
                self._refuse(Quarantined(source, None, 1, reason))
                continue
            summary = self._journal.finished(source, stamp, self._finish_hash()) if stamp else None
            if summary is not None and holds(self._job.output / self._folders[source], summary["files"]):
                self._scene_known(summary["windows"], summary["pixels"])
                self._progress.reused += summary["answered"]
                self._scene_done(source, summary)
                self._progress.answered += summary["answered"]
                self._progress.done_px += summary["pixels"]
                continue
            yield source

    def _finish_hash(self) -> str:
        return " ".join((self._job.job_hash, *self._job.formats))

    def _settle(self, outcome: Outcome) -> None:
        task = outcome.task
        if outcome.trouble == "everywhere":
            raise JobError(outcome.reason)
        if not task.windows:
            self._settle_opening(outcome)
            return
        scene = self._scenes[task.source]
        if outcome.trouble is None:
            self._keep(scene, outcome)
        elif outcome.trouble == "memory" and self._lower(scene, task):
            self._queue.appendleft((task.source, task.windows))
        elif len(task.windows) > 1:
            self._queue.extendleft((task.source, (window,)) for window in reversed(task.windows))
        elif self._journal.fail(scene.key, task.windows[0], outcome.reason).attempts < ATTEMPTS:
            self._queue.append((task.source, task.windows))  # behind the scene's other windows: what failed may pass
        else:
            self._drop(scene, task.windows[0])
        if not scene.waiting:
            self._finish(scene)

    def _settle_opening(self, outcome: Outcome) -> None:
        source, opened = outcome.task.source, outcome.opened
        if opened is not None:
            self._begin(source, opened)
            return
        attempts = self._open_attempts[source] = self._open_attempts.get(source, 0) + 1
        if outcome.trouble == "memory" and attempts < ATTEMPTS:
            self._queue.append((source, ()))
            return
        stamp = self._opening.pop(source)
        if stamp and outcome.trouble != "memory":  # a damaged file stays so until it changes; free memory comes and goes
            self._journal.refuse(source, stamp, outcome.reason)
        self._refuse(Quarantined(source, None, attempts, outcome.reason))

    def _begin(self, source: str, opened: Opened) -> None:
        """Queues what the journal has no answer for. Micro-batches begin at multiples of the asked size, also after a kill."""
        key = AnswerKey.of(opened.header)
        answers, failures = self._journal.answers(key), self._journal.failures(key)
        scene = _Scene(source, self._opening.pop(source), key, opened, {each.window for each in opened.windows})
        if len(scene.waiting) != len(opened.windows):
            raise ConfigError(f"windows of {source} must differ from each other, got {len(opened.windows)} with repetitions")
        self._scenes[source] = scene
        self._scene_known(len(opened.windows), _pixels(opened.windows))
        for window in opened.windows:
            if window.window in answers:
                scene.waiting.discard(window.window)
                self._progress.reused += 1
                self._progress.answered += 1
                self._progress.done_px += _pixels([window])
            elif window.window in failures and failures[window.window].attempts >= ATTEMPTS:
                self._drop(scene, window)
        size, step = self._job.micro_batch, self._limits.micro_batch
        for first in range(0, len(opened.windows), size):
            block = opened.windows[first : first + size]
            for start in range(0, len(block), step):
                left = tuple(window for window in block[start : start + step] if window.window in scene.waiting)
                alone = [window for window in left if window.window in failures]
                together = tuple(window for window in left if window.window not in failures)
                self._queue.extend([(source, part) for part in (together, *((window,) for window in alone)) if part])
        if not scene.waiting:
            self._finish(scene)

    def _keep(self, scene: _Scene, outcome: Outcome) -> None:
        task, asked = outcome.task, self._job.budget or scene.opened.budget
        records: Sequence[WindowRecord] = outcome.records
        if task.budget is not None and task.budget != asked:
            words = f"out of memory: answered with at most {task.budget} visual tokens instead of {asked}"
            records = [replace(record, warnings=(*record.warnings, words)) for record in records]
        pace = Pace.of(records, outcome.seconds, outcome.peak_rss_bytes)
        self._journal.add(scene.key, records, budget=task.budget, job_hash=self._job.job_hash, pace=pace)
        pixels, gsd = _pixels(task.windows), scene.opened.header.gsd_native_m
        self._computed += len(records)
        self._progress.answered += len(records)
        self._progress.computed_px += pixels
        self._progress.done_px += pixels
        if gsd is not None:
            self._progress.computed_m2 = (self._progress.computed_m2 or 0.0) + pixels * gsd * gsd
        scene.waiting.difference_update(window.window for window in task.windows)

    def _drop(self, scene: _Scene, window: GridWindow) -> None:
        scene.waiting.discard(window.window)
        self._progress.quarantined += 1
        self._progress.done_px += _pixels([window])

    def _lower(self, scene: _Scene, task: Task) -> bool:
        """Less at a time: half the micro-batch, and when it is one, half the budget. False when neither can be halved."""
        limits, size = self._limits, len(task.windows)
        budget = task.budget or self._job.budget or scene.opened.budget
        if size > 1:
            wanted = Limits(size // 2, limits.budget)
            if wanted.micro_batch >= limits.micro_batch:
                return True  # another worker's task has lowered it already
            words = f"out of memory with {size} windows at a time; {wanted.micro_batch} from now on"
        elif limits.budget is not None and limits.budget < budget:
            return True
        elif budget // 2 >= scene.opened.least_budget:
            wanted = Limits(1, budget // 2)
            words = f"out of memory with {budget} visual tokens for a window; {wanted.budget} from now on"
        else:
            return False
        self._journal.lower(self._job.job_hash, wanted, words)
        self._limits = wanted
        return True

    def _finish(self, scene: _Scene) -> None:
        """Writes a scene's files from the journal."""
        answers, failures = self._journal.answers(scene.key), self._journal.failures(scene.key)
        places = {window.window: window for window in scene.opened.windows}
        records = [replace(answers[window], place=place) for window, place in places.items() if window in answers]
        dropped = [
            Quarantined(scene.source, window, failures[window].attempts, failures[window].reason)
            for window in places
            if window not in answers
        ]
        folder = self._job.output / self._folders[scene.source]
        for name in self._journal.files_of(
            scene.source
        ):  # a format that is no longer asked for would go on telling old answers
            (folder / name).unlink(missing_ok=True)
        written = write_scene(folder, scene.opened.header, records)
        if self._job.formats and self._write_outputs is not None:
            written += self._write_outputs(scene.opened.header, records, folder, self._job.formats)
        summary = {
            "source": scene.source,
            "folder": folder.name,
            "content_hash": scene.opened.header.content_hash,
            "windows": len(places),
            "answered": len(records),
            "pixels": _pixels(list(places.values())),
            "quarantined": [each.to_dict() for each in dropped],
            "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in written},
        }
        self._journal.finish(scene.source, scene.stamp, self._finish_hash(), summary)
        del self._scenes[scene.source]
        self._scene_done(scene.source, summary)

    def _refuse(self, quarantined: Quarantined) -> None:
        self._refused[quarantined.source] = quarantined
        self._progress.quarantined += 1
        self._progress.scenes -= 1

    def _scene_known(self, windows: int, pixels: int) -> None:
        self._progress.scenes_known += 1
        self._progress.windows += windows
        self._progress.known_px += pixels

    def _scene_done(self, source: str, summary: dict[str, Any]) -> None:
        self._summaries[source] = summary
        self._progress.scenes_done += 1

    def _close(self) -> JobResult:
        """job.json, in the order in which the scenes were named."""
        quarantined: list[Quarantined] = []
        for source in self._job.scenes:
            if source in self._refused:
                quarantined.append(self._refused[source])
            for values in self._summaries.get(source, {}).get("quarantined", ()):
                quarantined.append(Quarantined(**{**values, "window": PixelWindow(**values["window"])}))
        summaries = [self._summaries[source] for source in self._job.scenes if source in self._summaries]
        counted = [{name: value for name, value in each.items() if name not in ("quarantined", "files")} for each in summaries]
        write_report(
            self._job.output,
            {"schema": SCHEMA, "scenes": counted, "quarantined": [each.to_dict() for each in quarantined]},
        )
        return JobResult(
            scenes=len(self._job.scenes),
            windows=sum(each["windows"] for each in summaries),
            answered=sum(each["answered"] for each in summaries),
            computed=self._computed,
            quarantined=tuple(quarantined),
            lowered=tuple(reason for _, reason in self._journal.lowered(self._job.job_hash)),
        )


def _pixels(windows: Sequence[GridWindow]) -> int:
    return sum(window.core.height * window.core.width for window in windows)
