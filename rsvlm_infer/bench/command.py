"""The command line of the bench: options in, files and tables out. Knows no measurement itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..backends import BACKENDS
from ..errors import InputError, MissingDependencyError, RsvlmError
from ..models.load import embedder_digest
from ..models.package import is_package
from ..pipeline import default_checkpoint
from .accuracy import measure_accuracy
from .charts import pareto_png
from .compare import Comparison, Rule, compare, refuse, setting_differences
from .environment import environment
from .html import render_html
from .images import choose_images
from .measure import Workload
from .output import write_atomically
from .plan import RowPlan, choose_models, package_choice, plan_rows
from .rsvqa import fetch_rsvqa
from .runner import describe, run_rows, thread_variables
from .schema import SCENARIOS, Report, read_report
from .tables import Table, markdown, report_tables

OK, ERROR, USAGE, PARTLY_FAILED = 0, 1, 2, 3
DEFAULT_BACKEND = next(iter(BACKENDS))  # what "auto" takes; others need a device that most machines lack
DEFAULT_LIMIT = 24  # two precisions in two scenarios take some minutes on two cores
DEFAULT_PRECISIONS = ("float32", "bfloat16")
# options that say something about timed rows, which --accuracy-only has none of
TIMED_ONLY = {
    "scenario": "--scenario", "package": "--package", "budget": "--budget", "repeats": "--repeats", "warmup": "--warmup",
    "source": "--from", "compare": "--compare", "fail_if": "--fail-if", "force": "--force",
}  # fmt: skip

DESCRIPTION = """\
Measures backends x precisions and exported packages on real images: latency, throughput, memory, load time, size, energy, and beside
them how right and how equal to eager float32 the answers are. Eager float32 on the checkpoint is the baseline of every run. Writes
bench.json, bench.md, bench.html and, where accuracy was measured, pareto.png.
"""
EPILOG = """\
rules for --fail-if:  METRIC OP LIMIT, for example
  p95>+10%              p95 latency grew by more than 10 percent against --compare
  class_accuracy<-0.02  accuracy fell by more than 0.02
  peak_rss_bytes>2e9    the new value is above a limit
metrics: p50 p90 p95 p99 mean std (latency in ms), the same of each stage and token time (encode_ms_p50, ttft_ms_p95, ...),
images_per_s mpix_per_s tokens_per_s peak_rss_bytes load_ms disk_bytes energy_j tokens_per_step
draft_acceptance, accuracy (class_accuracy, cider, answer_accuracy, ...)
and agreement (same_tokens, token_prefix, logits_max_abs, logits_cosine).
exit codes: 0 ok, 1 error or violated rule, 2 usage, 3 some rows failed
"""


def parser() -> argparse.ArgumentParser:
    """The options of `rsvlm bench`."""
    options = argparse.ArgumentParser(
        "rsvlm bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = options.add_argument_group("what to measure")
    what.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="checkpoint folder (default: the one that `rsvlm pull` makes)"
    )
    what.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"repeatable; known: {', '.join(BACKENDS)} (default: {DEFAULT_BACKEND})",
    )
    what.add_argument("--precision", action="append", metavar="NAME", help="repeatable (default: float32 and bfloat16)")
    what.add_argument(
        "--package",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="exported package, repeatable: a row beside eager float32 of the checkpoint, on the package's own backend",
    )
    what.add_argument(
        "--budget",
        type=_counts,
        default=(),
        metavar="N,N,...",
        help="visual tokens that a plan may take, as an axis of the table",
    )
    what.add_argument("--scenario", action="append", choices=SCENARIOS, help="repeatable (default: both)")
    what.add_argument("--accuracy-only", action="store_true", help="score one backend at one precision on the whole set, all "
                      "images unless limited; no timing, so nothing to compare")  # fmt: skip
    images = options.add_argument_group("on which images")
    images.add_argument("--images", type=Path, metavar="DIR", help="RSICD folder, folder of classes or of images (default: RSICD in "
                        "RSVLM_DATA or ../shared/data, else RSVQA scenes from the wheel configilm)")  # fmt: skip
    images.add_argument("--split", default="test", help="split of RSICD (default: test)")
    images.add_argument("--images-limit", type=int, metavar="N", help=f"at most N images, 0 = all (default: {DEFAULT_LIMIT})")
    images.add_argument("--questions-per-image", type=int, default=2, metavar="N", help="of RSVQA (default: 2)")
    images.add_argument("--seed", type=int, default=0, help="of choice and order (default: 0)")
    how = options.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=1, metavar="N", help="rounds over all rows and images (default: 1)")
    how.add_argument("--warmup", type=int, default=2, metavar="N", help="images before the clock starts (default: 2)")
    how.add_argument(
        "--batch", type=_counts, default=(4,), metavar="N,N,...", help="images per batch in Offline, as 1,8,32 (default: 4)"
    )
    how.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="per caption (default: 32)")
    how.add_argument("--tiling", choices=("fixed", "anyres", "dris"), help="default: the checkpoint's own")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as the libraries choose)")
    out = options.add_argument_group("result")
    out.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR", help="default: bench-results")
    out.add_argument("--from", type=Path, dest="source", metavar="JSON", help="take this result instead of measuring")
    out.add_argument("--compare", type=Path, metavar="JSON", help="an older result to compare with")
    out.add_argument(
        "--fail-if", action="append", default=[], metavar="RULE", help="repeatable, needs --compare; exit code 1 when true"
    )
    out.add_argument("--force", action="store_true", help="compare although machine, workload or schema differ")
    return options


def _counts(text: str) -> tuple[int, ...]:
    """The text 1,8,32 as numbers from 1 on, each once."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1, with commas between them, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def run(argv: list[str] | None = None) -> int:
    """One call of the command; see `rsvlm_infer.bench.main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else USAGE
    errors = Console(stderr=True)
    try:
        rules = _checked_rules(options)
    except InputError as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return USAGE
    try:
        if options.accuracy_only:
            return _run_accuracy(options, arguments, errors)
        return _run_bench(options, arguments, rules, errors)
    except RsvlmError as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return ERROR


def _checked_rules(options: argparse.Namespace) -> list[Rule]:
    if options.accuracy_only:
        _refuse_beside_accuracy(options)
    if options.fail_if and options.compare is None:
        raise InputError("--fail-if needs an older result to hold the new one against; add --compare OLD.json")
    for name in ("images_limit", "questions_per_image"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {value}; raise it")
    return [Rule.parse(text) for text in options.fail_if]


def _refuse_beside_accuracy(options: argparse.Namespace) -> None:
    """What --accuracy-only would not do must not look done: a gate that is never applied is an open one."""
    defaults = parser()
    found = [flag for name, flag in TIMED_ONLY.items() if getattr(options, name) != defaults.get_default(name)]
    found += [f"several --{name}" for name in ("backend", "precision", "batch") if len(getattr(options, name) or ()) > 1]
    if found:
        raise InputError(
            f"--accuracy-only cannot be combined with {', '.join(found)}: it scores one backend at one precision and times "
            "nothing; leave these out, or leave out --accuracy-only"
        )


def _run_bench(options: argparse.Namespace, arguments: Sequence[str], rules: list[Rule], errors: Console) -> int:
    older = read_report(options.compare) if options.compare is not None else None  # before this run writes over it
    if options.source is not None:
        report = read_report(options.source)
    else:
        work, here = _workload(options, DEFAULT_LIMIT, errors), environment(arguments)
        rows, warnings = _plan(options, work)
        if older is not None:  # before minutes are spent on a result that cannot be compared
            refuse(setting_differences(Report(here, describe(work, rows), ()), older), force=options.force)
        report = run_rows(work, rows, here, errors)
        report = dataclasses.replace(report, warnings=(*warnings, *report.warnings))
    try:
        comparison = None if older is None else compare(report, older, rules, force=options.force)
    except InputError:
        _write(report, None, options.output, errors)  # what was measured is kept, even when it cannot be compared
        raise
    for path in _write(report, comparison, options.output, errors):
        errors.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    _show(report_tables(report, comparison), [*report.warnings, *(comparison.differences if comparison else ())], errors)
    for line in comparison.violations if comparison else ():
        errors.print(f"violated: {line}", style="red", markup=False, soft_wrap=True)
    failed = [row for row in report.rows if not row.ok]
    if (comparison and comparison.violations) or any(row.is_baseline_of(row) for row in failed):
        return ERROR
    return PARTLY_FAILED if failed else OK


def _plan(options: argparse.Namespace, work: Workload) -> tuple[list[RowPlan], list[str]]:
    """The rows of a run, and what makes packages hard to compare with the checkpoint."""
    packages = [package_choice(folder) for folder in options.package]
    packaged = is_package(work.checkpoint)
    if packaged:  # it has one precision, its own, and runs on one backend
        packages.insert(0, package_choice(Path(work.checkpoint)))
    asked = options.backend or options.precision or not packages
    models = choose_models(
        work.checkpoint,
        (options.backend or [DEFAULT_BACKEND]) if asked and not packaged else [],
        options.precision or DEFAULT_PRECISIONS,
        packages,
        baseline=not packaged,
    )
    warnings = []
    if packages and not packaged:
        own = embedder_digest(work.checkpoint)
        warnings = [
            f"package {package.folder} was made from another checkpoint: its accuracy and agreement are not those of this one"
            for package in packages
            if package.embedder != own
        ]
    return plan_rows(models, options.scenario or SCENARIOS, budgets=options.budget, batches=options.batch), warnings


def _run_accuracy(options: argparse.Namespace, arguments: Sequence[str], errors: Console) -> int:
    work = _workload(options, None, errors)
    os.environ.update(thread_variables(work.threads))  # this process runs the model itself, and has not loaded torch yet
    backend, precision = (options.backend or ["auto"])[0], (options.precision or ["auto"])[0]
    result = measure_accuracy(work, backend, precision, environment(arguments), errors)
    for path in result.write(options.output):
        errors.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    _show([result.table()], [], errors)
    return OK


def _workload(options: argparse.Namespace, default_limit: int | None, errors: Console) -> Workload:
    checkpoint = _checkpoint(options.checkpoint, errors)
    limit = options.images_limit if options.images_limit is not None else default_limit
    images = choose_images(
        options.images,
        split=options.split,
        questions_per_image=options.questions_per_image,
        seed=options.seed,
        fetch_rsvqa=lambda: fetch_rsvqa(errors),
    )
    return Workload(
        checkpoint=str(checkpoint),
        images=images.limited(limit or None, options.seed),
        repeats=options.repeats,
        warmup=options.warmup,
        offline_batch=options.batch[0],
        max_new_tokens=options.max_new_tokens,
        tiling=options.tiling,
        threads=options.threads,
        seed=options.seed,
    )


def _checkpoint(folder: Path | None, errors: Console) -> Path:
    """The folder to measure; the default one is made when it is not there yet."""
    if folder is None and not default_checkpoint().is_dir():
        from ..pull import pull

        with errors.status("making the default checkpoint, as `rsvlm pull` does: about 180 MB to download"):
            return pull()
    folder = folder or default_checkpoint()
    if not folder.is_dir():
        raise InputError(f"--checkpoint must name a checkpoint folder, got {str(folder)!r}; check the path")
    return folder


def _write(report: Report, comparison: Comparison | None, folder: Path, errors: Console) -> list[Path]:
    values: dict[str, Any] = report.to_dict()
    files = {"bench.json": json.dumps(values, indent=1, ensure_ascii=False) + "\n", "bench.md": markdown(report, comparison)}
    try:
        files["bench.html"] = render_html(report, comparison)
    except MissingDependencyError as error:
        errors.print(f"no bench.html: {error}", style="yellow", markup=False, soft_wrap=True)
    try:
        picture = pareto_png(report)
    except MissingDependencyError:
        picture = None  # said above
    contents: dict[str, str | bytes] = {**files, **({} if picture is None else {"pareto.png": picture})}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _show(tables: Sequence[Table], warnings: Sequence[str], errors: Console) -> None:
    """Tables on stdout, warnings on stderr."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width; do not break rows for it
    for table in tables:
        shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
        for index, title in enumerate(table.header):
            shown.add_column(title, justify="left" if index == 0 or table.prose else "right")
        for row in table.rows:
            shown.add_row(*map(Text, row))  # a plain str would be read for rich's [markup]
        console.print(shown)
    for line in warnings:
        errors.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
