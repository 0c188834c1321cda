"""Runs the rows of a bench, each in fresh processes, and joins them to one report. Knows processes and progress, no model.

A fresh process per row and repeat gives each its own load time and memory peak, and one that fails leaves the others alone. Repeats
are rounds: every row once, then every row again in the other direction, so that what slows the machine for a while slows them all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..backends import choose_backend
from ..hardware import library_version
from .environment import busy_warning
from .measure import PassTimes, Workload, join_passes, workload_to_dict
from .plan import RowPlan
from .schema import Agreement, Report, Row, row_from_dict

FEW_VALUES = 100  # below this, p99 is next to the largest value
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What one process brought back."""

    row: Row
    token_ids: dict[str, list[int]]
    logits: npt.NDArray[np.float32]  # [n, V], [0, 0] when it failed
    passes: list[PassTimes] = field(default_factory=list)


def run_rows(work: Workload, plans: Sequence[RowPlan], environment: dict[str, Any], console: Console) -> Report:
    """Measures every row and compares it with eager float32 at the same work; rows that failed carry their error."""
    rounds: dict[RowPlan, list[Outcome]] = {plan: [] for plan in plans}
    for repeat in range(work.repeats):
        for number, plan in enumerate(plans if repeat % 2 == 0 else reversed(plans), 1 + repeat * len(plans)):
            if rounds[plan] and not rounds[plan][-1].row.ok:
                continue
            title = f"{number}/{len(plans) * work.repeats} {plan.row().title}"
            with tempfile.TemporaryDirectory(prefix="rsvlm-bench-") as folder:
                outcome = _run_row(work, plan, repeat, Path(folder), console, title)
            rounds[plan].append(outcome)
            if outcome.row.error is not None:
                console.print(f"{plan.row().title} failed: {outcome.row.error}", style="red", markup=False)
    outcomes = [_joined(each) for each in rounds.values()]
    joined = []
    for outcome in outcomes:
        reference = next((each for each in outcomes if each.row.is_baseline_of(outcome.row) and each.row.ok), None)
        comparable = outcome.row.ok and reference is not None
        joined.append(
            dataclasses.replace(outcome.row, agreement=agreement(outcome, reference))
            if comparable and reference
            else outcome.row
        )
    return Report(environment, describe(work, plans), tuple(joined), tuple(_warnings(work, joined, environment)))


def _joined(rounds: Sequence[Outcome]) -> Outcome:
    """One outcome of a row's rounds; the first one was judged."""
    first, last = rounds[0], rounds[-1]
    if not last.row.ok:
        return last
    loads = [outcome.row.load_ms for outcome in rounds if outcome.row.load_ms is not None]
    peaks = [outcome.row.peak_rss_bytes for outcome in rounds if outcome.row.peak_rss_bytes is not None]
    row = dataclasses.replace(
        join_passes(first.row, [each for outcome in rounds for each in outcome.passes]),
        load_ms=statistics.median(loads) if loads else None,
        peak_rss_bytes=max(peaks, default=None),
    )
    return dataclasses.replace(first, row=row)


def agreement(outcome: Outcome, reference: Outcome) -> Agreement:
    """How near an outcome is to the reference on the same images; see `Agreement`."""
    names = [name for name in reference.token_ids if name in outcome.token_ids]
    pairs = [(outcome.token_ids[name], reference.token_ids[name]) for name in names]
    same = [ours == theirs for ours, theirs in pairs]
    prefix = [1.0 if ours == theirs else _common_prefix(ours, theirs) / max(1, len(theirs)) for ours, theirs in pairs]
    max_abs = cosine = None
    if outcome.logits.size and outcome.logits.shape == reference.logits.shape:
        ours64, theirs64 = outcome.logits.astype(np.float64), reference.logits.astype(np.float64)  # [n, V]
        max_abs = float(np.abs(ours64 - theirs64).max())
        norms = np.linalg.norm(ours64, axis=1) * np.linalg.norm(theirs64, axis=1)
        cosine = float(((ours64 * theirs64).sum(axis=1) / norms).min())
    return Agreement(len(names), sum(same) / len(names), sum(prefix) / len(names), max_abs, cosine)


def describe(work: Workload, plans: Sequence[RowPlan]) -> dict[str, Any]:
    """The workload as the report shows it: what was run on what."""
    models = dict.fromkeys(plan.model for plan in plans)
    return {
        "checkpoint": work.checkpoint,
        "auto_backend": str(choose_backend(work.checkpoint)),
        "packages": [
            {"row": f"{model.backend} {model.precision}", "label": model.label, "path": model.folder}
            for model in models
            if model.embedder is not None
        ],
        "budgets": list(dict.fromkeys(plan.budget for plan in plans if plan.budget is not None)),
        "batches": list(dict.fromkeys(plan.batch for plan in plans if plan.batch is not None)),
        "image_set": work.images.name,
        "image_source": work.images.source,
        "images": len(work.images.samples),
        "labels": len(work.images.labels),
        "captions": sum(len(sample.captions) for sample in work.images.samples),
        "questions": sum(len(sample.questions) for sample in work.images.samples),
        "images_digest": work.images.digest,
        "repeats": work.repeats,
        "warmup": work.warmup,
        "offline_batch": work.offline_batch,
        "max_new_tokens": work.max_new_tokens,
        "tiling": work.tiling,
        "threads": work.threads,
        "seed": work.seed,
        "logits_images": min(work.logits_images, len(work.images.samples)),
        "references": {sample.name: sample.captions[0] for sample in work.images.samples if sample.captions},
    }


def _run_row(work: Workload, plan: RowPlan, repeat: int, folder: Path, console: Console, title: str) -> Outcome:
    job = {
        "row": dataclasses.asdict(plan.row()),
        "workload": workload_to_dict(plan.workload(work)),
        "repeats": [repeat],
        "judged": repeat == 0,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "rsvlm_infer.bench.worker", str(folder)]
    with (folder / "stderr.txt").open("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_worker_environment(work))
        try:
            _follow(process, console, title)
            code = process.wait()
        except BaseException:  # Ctrl-C must not leave a process behind
            process.kill()
            process.wait()
            raise
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if code != 0 or not (folder / "result.json").is_file():
        reason = said[-1] if said else "it said nothing"
        return _failed(plan, f"the measuring process ended with exit code {code}: {reason}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    row = row_from_dict(result["row"])
    logits = np.load(folder / "logits.npy", allow_pickle=False) if row.ok else np.zeros((0, 0), dtype=np.float32)
    return Outcome(row, result["token_ids"], logits, [PassTimes(**each) for each in result["passes"]])


def thread_variables(threads: int | None) -> dict[str, str]:
    """Environment that holds the numeric libraries to so many threads, when they are loaded after it is set."""
    return {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))


def _failed(plan: RowPlan, error: str) -> Outcome:
    return Outcome(plan.row(error), {}, np.zeros((0, 0), dtype=np.float32))


def _worker_environment(work: Workload) -> dict[str, str]:
    variables = os.environ | thread_variables(work.threads)
    # the worker must import the same package and test doubles as this process, whatever folder it starts in
    variables["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return variables


def _follow(process: subprocess.Popen[str], console: Console, title: str) -> None:
    """Shows "done total" lines as a bar; silent when the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        for line in process.stdout or ():
            done, _, total = line.strip().partition(" ")
            if done.isdigit() and total.isdigit():
                bar.update(task, completed=int(done), total=int(total))
    if not console.is_terminal:
        console.print(f"{title} done", markup=False, highlight=False)


def _common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        count += 1
    return count


def _warnings(work: Workload, rows: Sequence[Row], environment: dict[str, Any]) -> list[str]:
    found = [busy_warning(environment)] if environment.get("machine") else []
    values = max((len(row.samples_ms) for row in rows), default=0)
    if 0 < values < FEW_VALUES:
        found.append(
            f"{values} latencies per row: p95 and p99 rest on few values, raise --images-limit or --repeats to trust them"
        )
    if any(sample.captions for sample in work.images.samples):
        if library_version("pycocoevalcap") is None:
            found.append("pycocoevalcap is not installed, so captions have no score; run: pip install 'rsvlm-infer[eval]'")
        found.append("CIDEr and BLEU depend on the set: compare them only between rows and runs with the same images")
    large = sorted({row.batch for row in rows if row.batch is not None and row.batch > len(work.images.samples)})
    if large:
        found.append(f"batches of {large} hold no more than the run's {len(work.images.samples)} images; raise --images-limit")
    reasons = dict.fromkeys(row.energy_why_not for row in rows if row.energy_why_not)
    found += [f"energy is {reason}" for reason in reasons]
    return [line for line in found if line is not None]
