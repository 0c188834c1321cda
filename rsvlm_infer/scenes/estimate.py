"""Owns what a job will take, told before it runs: windows, tokens, memory, time, and where each number comes from. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .folder import JOURNAL
from .job import Job, JobError, Quarantined
from .journal import AnswerKey, Journal, Pace
from .record import GridWindow
from .worker import Opened, Task, Worker

NOTHING_MEASURED = "nothing was measured: no window is left"


@dataclass(frozen=True)
class Estimate:
    """What a job will take.

    windows: of all scenes that can be opened. answered: of these, in the journal. pixels, skipped_px: native pixels that records answer
    for, and of empty or uniform windows. area_m2: ground of the windows, None when a scene does not say its gsd. *_tokens: expected for
    the windows that are left, by the mean of those measured; at_most_visual_tokens: by the budget. seconds: with one worker.
    peak_rss_bytes: of a worker with its model. What rests on a measurement is None without one. measured: where the pace comes from.
    """

    scenes: int
    windows: int
    answered: int
    pixels: int
    skipped_px: int
    area_m2: float | None
    visual_tokens: int | None
    at_most_visual_tokens: int
    prompt_tokens: int | None
    new_tokens: int | None
    seconds: float | None
    peak_rss_bytes: int | None
    measured: str
    quarantined: tuple[Quarantined, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def estimate_job(job: Job, worker: Worker, advance: Callable[[], None] = lambda: None) -> Estimate:
    """Opens every scene, and measures a micro-batch of the largest one where the journal knows no pace. advance: called for each scene.

    Raises:
        JournalError: the folder is in use. JobError: what fails would fail for every scene.
    """
    opened: dict[str, Opened] = {}
    quarantined: list[Quarantined] = []
    for source in job.scenes:
        outcome = worker.do(Task(source, job.budget))
        if outcome.trouble == "everywhere":
            raise JobError(outcome.reason)
        if outcome.opened is None:
            quarantined.append(Quarantined(source, None, 1, outcome.reason))
        else:
            opened[source] = outcome.opened
        advance()
    left, pace = _journaled(job, opened)
    number = sum(map(len, left.values()))
    measured = f"{pace.windows} windows in the journal"
    if not pace.windows and number:
        pace, measured = _measure(job, worker, left)
    each = number / pace.windows if pace.windows else None
    headers = [each.header for each in opened.values()]
    areas = [
        _pixels(each.windows) * each.header.gsd_native_m**2 for each in opened.values() if each.header.gsd_native_m is not None
    ]
    return Estimate(
        scenes=len(job.scenes),
        windows=sum(len(each.windows) for each in opened.values()),
        answered=sum(len(each.windows) for each in opened.values()) - number,
        pixels=sum(_pixels(each.windows) for each in opened.values()),
        skipped_px=sum(header.empty_px + header.uniform_px for header in headers),
        area_m2=sum(areas) if len(areas) == len(opened) else None,
        visual_tokens=None if each is None else round(pace.num_visual_tokens * each),
        at_most_visual_tokens=sum(len(windows) * (job.budget or opened[source].budget) for source, windows in left.items()),
        prompt_tokens=None if each is None else round(pace.num_prompt_tokens * each),
        new_tokens=None if each is None else round(pace.num_new_tokens * each),
        seconds=None if each is None else pace.seconds * each,
        peak_rss_bytes=pace.peak_rss_bytes or None,
        measured=measured if pace.windows else NOTHING_MEASURED,
        quarantined=tuple(quarantined),
    )


def _journaled(job: Job, opened: dict[str, Opened]) -> tuple[dict[str, list[GridWindow]], Pace]:
    """The windows that the journal has no answer for, and the job's pace so far. Without a journal, none is made."""
    if not (job.output / JOURNAL).exists():
        return {source: list(each.windows) for source, each in opened.items()}, Pace()
    left = {}
    with Journal(job.output / JOURNAL) as journal:
        for source, each in opened.items():
            answers = journal.answers(AnswerKey.of(each.header))
            left[source] = [window for window in each.windows if window.window not in answers]
        return left, journal.pace(job.job_hash)


def _measure(job: Job, worker: Worker, left: dict[str, list[GridWindow]]) -> tuple[Pace, str]:
    """One micro-batch from the middle of the scene with the most windows, after one window alone that warms up."""
    source, windows = max(left.items(), key=lambda item: len(item[1]))
    middle = max(0, (len(windows) - job.micro_batch) // 2)
    sample = tuple(windows[middle : middle + job.micro_batch])
    for part in (sample[:1], sample):
        outcome = worker.do(Task(source, job.budget, part))
        if outcome.trouble is not None:
            raise JobError(
                f"window {part[0].index} of {source} cannot be answered ({outcome.reason}), so nothing can be measured; leave out that "
                "scene, or run the job, which goes on without what fails"
            )
    return Pace.of(
        outcome.records, outcome.seconds, outcome.peak_rss_bytes
    ), f"{len(sample)} windows of {source}, answered just now"


def _pixels(windows: tuple[GridWindow, ...]) -> int:
    return sum(window.core.height * window.core.width for window in windows)
