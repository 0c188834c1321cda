"""A report as tables of text and as Markdown. Knows the schema and how people read numbers; measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .compare import Comparison, percent_change
from .schema import SCENARIOS, STAGES, Report, Row, Summary

# Shown beside latency when a row has it, in this order; every other accuracy number stands in the accuracy table.
HEADLINE_QUALITY = {"class_accuracy": "class acc.", "cider": "CIDEr", "answer_accuracy": "answer acc."}
FRACTIONS = ("class_accuracy", "answer_accuracy", "text_to_image", "image_to_text", "mean_recall")
COMPARED = (
    "p50", "p95", "ttft_ms_p50", "tpot_ms_p50", "images_per_s", "peak_rss_bytes", "load_ms",
    "class_accuracy", "cider", "answer_accuracy", "same_tokens",
)  # fmt: skip
ONE_BY_ONE = ("class_accuracy", "answer_accuracy")  # judged after the clock, without batches
METRIC_TITLES = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
EXAMPLES = 4
NOTHING = "–"

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """Text cells under headings; the first column is a name, the others are numbers unless `prose`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    prose: bool = False

    def to_markdown(self) -> str:
        rule = ["---", *(["---"] if self.prose else ["---:"]) * (len(self.header) - 1)]
        lines = [f"## {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (self.header, rule, *self.rows)]
        return "\n".join(lines)


def report_tables(report: Report, comparison: Comparison | None = None) -> list[Table]:
    """Every table of a report, the headline first."""
    tables = [_headline(report, scenario) for scenario in SCENARIOS if any(row.scenario == scenario for row in report.rows)]
    ok = [row for row in report.rows if row.ok]
    if ok:
        tables += [_stages(ok), _resources(ok), _accuracy(ok)]
        if any(row.answers for row in ok):
            tables.append(_examples(report, ok))
    failed = [row for row in report.rows if not row.ok]
    if failed:
        tables.append(Table("Failed", ("row", "reason"), tuple((row.title, str(row.error)) for row in failed), prose=True))
    if comparison is not None:
        tables.append(_comparison(comparison))
    return tables


def markdown(report: Report, comparison: Comparison | None = None) -> str:
    """The whole report as Markdown."""
    parts = ["# Bench of rsvlm_infer", "\n".join(f"- {name}: {value}" for name, value in summary_lines(report))]
    if report.warnings:
        parts.append("\n".join(f"> {line}" for line in report.warnings))
    if comparison is not None and comparison.violations:
        parts.append("\n".join(["**Violated rules**", "", *(f"- {line}" for line in comparison.violations)]))
    parts += [table.to_markdown() for table in report_tables(report, comparison)]
    return "\n\n".join(parts) + "\n"


def summary_lines(report: Report) -> list[tuple[str, str]]:
    """What, on what, where, when: name and value."""
    work, environment = report.workload, report.environment
    machine, git, packages = environment.get("machine", {}), environment.get("git"), environment.get("packages", {})
    return [
        (
            "images",
            f"{work.get('images')} of {work.get('image_set')}, {work.get('repeats')} repeat(s), {work.get('warmup')} for warm-up",
        ),
        ("checkpoint", str(work.get("checkpoint"))),
        *([("backend auto", str(work["auto_backend"]))] if "auto_backend" in work else []),
        *((f"package {entry['label'] or entry['row']}", str(entry["path"])) for entry in work.get("packages") or ()),
        ("answers", f"greedy, at most {work.get('max_new_tokens')} tokens; Offline in batches {_batches(report)}"),
        ("machine", f"{machine.get('cpu')}, {machine.get('cores')} cores, {bytes_text(machine.get('memory_bytes'))} memory"),
        ("GPUs", ", ".join(gpu["name"] for gpu in machine.get("gpus") or ()) or "none"),
        ("threads", str(work.get("threads") or "as the libraries choose")),
        ("system", f"{machine.get('system')}, Python {environment.get('python')}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()) or "unknown"),
        ("rsvlm_infer", str(environment.get("rsvlm_infer")) + (_commit(git) if git else "")),
        ("date", str(environment.get("date"))),
        ("command", f"`{environment.get('command')}`"),
    ]


def number(value: float | None, digits: int = 1) -> str:
    """A number with thousands apart, or a dash."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def bytes_text(value: float | None) -> str:
    """Bytes in binary units."""
    if not value:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def quality_text(name: str, value: float | None) -> str:
    """A share as percent, a score as it is."""
    if value is None:
        return NOTHING
    return _percent(value) if name.startswith(FRACTIONS) else f"{value:.3f}"


def metric_title(name: str) -> str:
    """A metric's name as a heading."""
    return METRIC_TITLES.get(name, name.replace("_", " "))


def _headline(report: Report, scenario: str) -> Table:
    rows = [row for row in report.rows if row.scenario == scenario and row.ok]
    single = scenario == "SingleStream"
    quality = {name: title for name, title in HEADLINE_QUALITY.items() if any(name in row.quality for row in rows)}
    columns: list[tuple[str, Cell]] = [
        ("images/s", lambda row: number(row.images_per_s, 2)),
        ("Mpx/s", lambda row: number(row.mpix_per_s, 2)),
        ("× eager fp32", lambda row: _ratio(report.ratios(row).get("images_per_s"))),
    ]
    if single:
        columns += [(f"{name} ms", _latency_cell(name)) for name in ("p50", "p90", "p95", "p99")]
        columns.append(("mean ± std ms", lambda row: _spread(row.latency_ms)))
    columns += [
        ("TTFT ms", lambda row: _median(row.token_times.get("ttft_ms"))),
        ("TPOT ms", lambda row: _median(row.token_times.get("tpot_ms"))),
        ("peak RSS", lambda row: bytes_text(row.peak_rss_bytes)),
    ]
    columns += [(title, _quality_cell(name)) for name, title in quality.items()]
    columns.append(("same tokens", _agreement_cell("same_tokens", _percent)))
    note = (
        "One image at a time. TTFT and TPOT are medians; × eager fp32 is throughput against the baseline of the same run."
        if single
        else f"All images at once, in batches {_batches(report)}. TTFT is from the start of an image's batch."
    )
    note += _one_by_one_note(rows)
    return Table(scenario, ("row", *(title for title, _ in columns)), _cells(rows, columns, lambda row: row.name), note)


def _batches(report: Report) -> str:
    several = report.workload.get("batches")
    return "as the row says" if several else f"of {report.workload.get('offline_batch')}"


def _one_by_one_note(rows: Sequence[Row]) -> str:
    """A batch could change an answer: says which numbers do not come from the scenario's own batches."""
    names = [name.replace("_", " ") for name in ONE_BY_ONE if any(name in row.quality for row in rows)]
    return f" {' and '.join(names).capitalize()}: one image at a time in both scenarios." if names else ""


def _stages(rows: Sequence[Row]) -> Table:
    columns: list[tuple[str, Cell]] = [(name.removesuffix("_ms"), _stage_cell(name)) for name in STAGES]
    columns.append(("other", lambda row: number(other_ms(row))))
    note = "Mean ms per image. In Offline, prefill and decode are those of the image's batch. Other = latency less all stages."
    return Table("Stages", ("row", *(title for title, _ in columns)), _cells(rows, columns, lambda row: row.title), note)


def other_ms(row: Row) -> float | None:
    """Mean latency outside of all stages: prompts, sampling, decoding text."""
    if row.latency_ms is None:
        return None
    return max(0.0, row.latency_ms.mean - sum(summary.mean for summary in row.stages.values()))


def _resources(rows: Sequence[Row]) -> Table:
    columns: list[tuple[str, Cell]] = [
        ("load s", lambda row: number(row.load_ms / 1e3 if row.load_ms is not None else None, 2)),
        ("on disk", lambda row: bytes_text(row.disk_bytes)),
        ("peak RSS", lambda row: bytes_text(row.peak_rss_bytes)),
        ("visual tokens", lambda row: number(row.visual_tokens)),
        ("generated tokens", lambda row: number(row.generated_tokens)),
        ("tokens/s", lambda row: number(row.tokens_per_s)),
    ]
    optional: list[tuple[str, str, Cell]] = [
        ("energy_j", "J per image", lambda row: number(row.energy_j)),
        ("tokens_per_step", "tokens/step", lambda row: number(row.tokens_per_step, 2)),
        (
            "draft_acceptance",
            "guesses kept",
            lambda row: NOTHING if row.draft_acceptance is None else _percent(row.draft_acceptance),
        ),
    ]
    columns += [(title, cell) for name, title, cell in optional if any(getattr(row, name) is not None for row in rows)]
    note = "Each row ran in a process of its own. Load is RSVLM.from_pretrained with its imports; tokens are means per image."
    reasons = dict.fromkeys(row.energy_why_not for row in rows if row.energy_why_not)
    note += "".join(f" Energy: {reason}." for reason in reasons)
    if any(row.tokens_per_step is not None for row in rows):
        note += (
            " Tokens/step: decoded tokens per step of the model, guessed ones included; the answers are those without guesses."
        )
    return Table("Resources", ("row", *(title for title, _ in columns)), _cells(rows, columns, lambda row: row.title), note)


def _accuracy(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.quality))
    columns = [(metric_title(name), _quality_cell(name)) for name in names]
    columns += [
        ("same tokens", _agreement_cell("same_tokens", _percent)),
        ("same prefix", _agreement_cell("token_prefix", _percent)),
        ("logits max abs", _agreement_cell("logits_max_abs", "{:.2e}".format)),
        ("logits cosine", _agreement_cell("logits_cosine", "{:.6f}".format)),
    ]
    note = (
        "Same tokens: share of images whose greedy tokens equal those of eager fp32. Same prefix: share of its tokens before the first "
        "difference. Logits: first step, worst image."
    ) + _one_by_one_note(rows)
    return Table(
        "Accuracy and agreement", ("row", *(title for title, _ in columns)), _cells(rows, columns, lambda row: row.title), note
    )


def _examples(report: Report, rows: Sequence[Row]) -> Table:
    shown = [row for row in rows if row.scenario == rows[0].scenario]
    references: dict[str, str] = report.workload.get("references", {})
    header = ("image", *(["a person"] if references else []), *(row.name for row in shown))
    cells = tuple(
        (name, *([references.get(name, NOTHING)] if references else []), *(row.answers.get(name, NOTHING) for row in shown))
        for name in list(shown[0].answers)[:EXAMPLES]
    )
    return Table("What it says", header, cells, "The first images of the run.", prose=True)


def _comparison(comparison: Comparison) -> Table:
    cells = []
    for new, old in comparison.pairs:
        after, before = new.metrics(), old.metrics()
        for name in COMPARED:
            if name in after and name in before:
                change = f"{percent_change(after[name], before[name]):+.1f} %"
                cells.append((f"{new.title} {name}", f"{before[name]:.6g}", f"{after[name]:.6g}", change))
    note = "Forced although " + "; ".join(comparison.differences) if comparison.differences else ""
    return Table("Against the older result", ("metric", "was", "is", "change"), tuple(cells), note)


def _latency_cell(name: str) -> Cell:
    return lambda row: number(getattr(row.latency_ms, name) if row.latency_ms is not None else None)


def _stage_cell(name: str) -> Cell:
    return lambda row: number(row.stages[name].mean if name in row.stages else None)


def _quality_cell(name: str) -> Cell:
    return lambda row: quality_text(name, row.quality.get(name))


def _agreement_cell(name: str, form: Callable[[float], str]) -> Cell:
    def cell(row: Row) -> str:
        value = getattr(row.agreement, name, None)
        return NOTHING if value is None else form(value)

    return cell


def _cells(rows: Sequence[Row], columns: Sequence[tuple[str, Cell]], name: Cell) -> tuple[tuple[str, ...], ...]:
    return tuple((name(row), *(cell(row) for _, cell in columns)) for row in rows)


def _spread(summary: Summary | None) -> str:
    return NOTHING if summary is None else f"{number(summary.mean)} ± {number(summary.std)}"


def _median(summary: Summary | None) -> str:
    return NOTHING if summary is None else number(summary.p50)


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _commit(git: dict[str, object]) -> str:
    return f" at {str(git['commit'])[:12]}" + (" with local changes" if git["changed"] else "")
