"""Owns the command `rsvlm run` and how a job looks on a terminal. Knows no model and no journal."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..hardware import usable_cores
from ..scenes.cluster import RayWorkers
from ..scenes.estimate import Estimate, estimate_job
from ..scenes.job import Job, JobResult, Progress, Quarantined, WriteOutputs, run_job
from ..scenes.job_file import JobFile, read_job_file
from ..scenes.outputs import Overview, write_outputs
from ..scenes.outputs.write import check_formats, require_libraries
from ..scenes.record import SceneHeader
from ..scenes.settings import RunSettings
from ..scenes.worker import LocalWorkers, Worker, Workers
from . import options as opt
from .console import EXIT_ERROR, EXIT_OK, EXIT_PARTLY, terminal
from .opener import ModelOpener, job_hash, load_opener

LINE_EVERY_S = 60.0  # where there is no bar, as in the log of a batch system


class EngineChoice(StrEnum):
    local = "local"
    ray = "ray"


DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what it would take: windows, tokens, memory, time. Opens the scenes, writes nothing."),
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="Try again what was quarantined, and forget that memory was short.", rich_help_panel="Job"),
]


def run(
    job: Annotated[
        Path, typer.Argument(metavar="JOB.toml", help="What to ask of which scenes; see docs/jobs.md.", show_default=False)
    ],
    dry_run: DryRun = False,
    retry: Retry = False,
    output_format: opt.OutputFormat = opt.Format.text,
    engine: Annotated[
        EngineChoice | None, typer.Option("--engine", help="Instead of the file's.", rich_help_panel="Job")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Models that run at once (ray).", rich_help_panel="Job")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", help="A running cluster, or auto; default is one on this machine.", rich_help_panel="Job"
        ),
    ] = None,
) -> int:
    """Ask whole scenes as a job file says. Killed at any moment, the same command goes on. Code 3: some scenes or windows gave nothing."""
    file = read_job_file(job)
    if engine is EngineChoice.local:  # what the file says of a cluster then means nothing
        file = dataclasses.replace(file, engine="local", workers=workers, ray_address=ray_address)
    else:
        chosen = file.engine if engine is None else "ray"
        file = dataclasses.replace(
            file, engine=chosen, workers=workers or file.workers, ray_address=ray_address or file.ray_address
        )
    return run_job_file(file, dry_run=dry_run, retry=retry, output_format=output_format)


def run_job_file(file: JobFile, *, dry_run: bool, retry: bool, output_format: opt.Format) -> int:
    """Runs a job, or says what it would take, and gives the exit code."""
    formats = check_formats(file.formats, file.settings.mode)
    require_libraries(formats)
    model = (file.settings, file.checkpoint, file.backend, file.precision)
    job = Job(
        scenes=file.scenes,
        output=file.output,
        job_hash=job_hash(*model),
        micro_batch=file.micro_batch,
        budget=file.settings.max_visual_tokens,
        formats=formats,
    )
    opener = ModelOpener(*model)
    if dry_run:
        with terminal.working("opening scenes", len(job.scenes)) as bar:
            estimate = estimate_job(job, Worker(opener), bar.advance)
        return _show_estimate(estimate, file, output_format)
    with _workers(file, opener) as workers, _bar() as report:
        result = run_job(job, workers, write_outputs=_writer(file.settings), report=report, retry=retry)
    return _show_result(result, file, output_format)


def _writer(settings: RunSettings) -> WriteOutputs:
    """Writes a scene's formats; pictures show the scene as the model saw it."""

    def overview(header: SceneHeader) -> Overview:
        with settings.open(header.source) as scene:
            return Overview(*scene.overview())

    return functools.partial(write_outputs, read_overview=overview)


@contextmanager
def _workers(file: JobFile, opener: ModelOpener) -> Iterator[Workers]:
    found: Workers
    if file.engine == "ray":
        checkpoint = None if file.checkpoint is None else str(file.checkpoint)
        load = functools.partial(load_opener, file.settings.to_dict(), checkpoint, file.backend, file.precision)
        with terminal.working("starting workers"):
            count = file.workers or usable_cores()
            found = RayWorkers(load, count, address=file.ray_address, cpus=file.cpus, gpus=file.gpus)
    else:
        found = LocalWorkers(opener)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Shows progress on a bar, or as a line a minute where there is no terminal."""
    spoken = time.monotonic()
    with terminal.working("opening scenes", 1, counted=False) as bar:

        def report(progress: Progress) -> None:
            nonlocal spoken
            words = progress_text(progress)
            bar.show(progress.done_px / progress.expected_px if progress.expected_px else 0.0, words)
            if not sys.stderr.isatty() and time.monotonic() - spoken >= LINE_EVERY_S:
                spoken = time.monotonic()
                terminal.note(words)

        yield report


def progress_text(progress: Progress) -> str:
    """12 of 40 windows · 1 of 3 scenes · 0.42 Mpx/s · 0.082 km²/s · about 3 min left."""
    more = "+" if progress.scenes_known < progress.scenes else ""
    parts = [f"{progress.answered} of {progress.windows}{more} windows", f"{progress.scenes_done} of {progress.scenes} scenes"]
    if progress.quarantined:
        parts.append(f"{progress.quarantined} quarantined")
    if progress.mpix_per_s is not None:
        parts.append(f"{_amount(progress.mpix_per_s)} Mpx/s")
    if progress.km2_per_s is not None:
        parts.append(f"{_amount(progress.km2_per_s)} km²/s")
    if progress.eta_s is not None:
        parts.append(f"about {duration(progress.eta_s)} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 3 min 20 s, 5 h 12 min, 2 d 4 h."""
    whole = round(seconds)
    for unit, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // small
            return f"{whole // unit} {name} {rest} {small_name}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"


def _amount(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _show_result(result: JobResult, file: JobFile, output_format: opt.Format) -> int:
    for reason in result.lowered:
        terminal.note(f"warning: {reason}")
    _list(result.quarantined)
    if output_format is opt.Format.json:
        terminal.json({"output": str(file.output), **result.to_dict()})
    else:
        words = (
            f"{result.answered} of {result.windows} windows of {result.scenes} scenes answered, {result.computed} of them now"
        )
        terminal.data(f"{file.output}\t{words}")
    refused = sum(each.window is None for each in result.quarantined)
    return _exit_code(bool(result.quarantined), result.answered > 0 or (result.windows == 0 and refused < result.scenes))


def _list(quarantined: Sequence[Quarantined]) -> None:
    """One line for each."""
    for each in quarantined:
        place = "" if each.window is None else f", window at row {each.window.row_off} and column {each.window.col_off}"
        subject = "" if not place and each.source in each.reason else f"{each.source}{place}: "
        terminal.problem(f"quarantined: {subject}{each.reason}")


def _exit_code(quarantined: bool, something: bool) -> int:
    """3 when something is quarantined, 1 when nothing else came of the job."""
    if not quarantined:
        return EXIT_OK
    return EXIT_PARTLY if something else EXIT_ERROR


def _show_estimate(estimate: Estimate, file: JobFile, output_format: opt.Format) -> int:
    _list(estimate.quarantined)
    workers = (file.workers or usable_cores()) if file.engine == "ray" else 1
    if output_format is opt.Format.json:
        terminal.json({"output": str(file.output), "workers": workers, **estimate.to_dict()})
    else:
        terminal.data(estimate_text(estimate, workers))
    return _exit_code(bool(estimate.quarantined), len(estimate.quarantined) < estimate.scenes)


def estimate_text(estimate: Estimate, workers: int) -> str:
    """A table of names and values; what rests on a measurement says "about"."""
    broken = f", {len(estimate.quarantined)} cannot be opened" if estimate.quarantined else ""
    ground = "" if estimate.area_m2 is None else f", {_amount(estimate.area_m2 / 1e6)} km²"
    rows = [
        ("scenes", f"{estimate.scenes}{broken}"),
        ("windows", f"{estimate.windows:,}, of them {estimate.answered:,} answered already"),
        (
            "area",
            f"{_amount(estimate.pixels / 1e6)} Mpx{ground}, beside {_amount(estimate.skipped_px / 1e6)} Mpx without content",
        ),
    ]
    if estimate.visual_tokens is not None:
        rows.append(("visual tokens", f"about {estimate.visual_tokens:,}, at most {estimate.at_most_visual_tokens:,}"))
        rows.append(("text tokens", f"about {estimate.prompt_tokens:,} read, {estimate.new_tokens:,} written"))
    if estimate.peak_rss_bytes is not None:
        rows.append(("memory", f"about {estimate.peak_rss_bytes / 2**20:,.0f} MiB for each worker"))
    if estimate.seconds is not None:
        together = f", about {duration(estimate.seconds / workers)} with {workers}" if workers > 1 else ""
        rows.append(("time", f"about {duration(estimate.seconds)} with one worker{together}"))
    rows.append(("measured on", estimate.measured))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
