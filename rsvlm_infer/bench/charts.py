"""Charts of a report as SVG text. Knows the schema and matplotlib, which it imports only when a chart is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .pareto import draw_pareto, pareto_note, pareto_points
from .schema import SCENARIOS, STAGES, Report, Row
from .style import INK, chart_style, load_figure, svg_text
from .tables import other_ms

WIDTH_IN = 9.6
# Okabe and Ito's colours, told apart by colour-blind readers too; grey is for what no stage owns
STAGE_COLORS = ("#56b4e9", "#f0e442", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
OTHER_COLOR = "#b8c0c8"
SCENARIO_COLORS = {"SingleStream": "#0072b2", "Offline": "#e69f00"}


def draw_charts(report: Report) -> list[tuple[str, str, str]]:
    """(title, what it shows, SVG) of every chart that the rows allow.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    mpl, figure_class = load_figure()
    rows = [row for row in report.rows if row.ok]
    single = [row for row in rows if row.latency_ms is not None]
    charts = []
    with mpl.rc_context(chart_style()):
        if pareto_points(report) is not None:
            figure = draw_pareto(figure_class, report)
            charts.append(("Accuracy against latency", pareto_note(report), svg_text(figure, "Accuracy against latency")))
        if single:
            charts.append(("Where the time goes", "Mean of each stage, one image at a time.", _stages(figure_class, single)))
            note = "Each dot is one image; the bar spans p50 to p95, the tick is p99."
            charts.append(("Latency", note, _latency(figure_class, single)))
        if rows:
            charts.append(
                (
                    "Throughput and memory",
                    "More images per second is better, less memory is better.",
                    _totals(figure_class, rows),
                )
            )
    return charts


def pareto_png(report: Report) -> bytes | None:
    """The picture of accuracy against latency; None when no row has both.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if pareto_points(report) is None:
        return None
    mpl, figure_class = load_figure()
    buffer = io.BytesIO()
    with mpl.rc_context(chart_style()):
        draw_pareto(figure_class, report).savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _stages(figure_class: Any, rows: Sequence[Row]) -> str:
    figure, axes = _axes(figure_class, 1.5 + 0.5 * len(rows))
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    widest = max(row.latency_ms.mean for row in rows if row.latency_ms is not None)
    for name, color in (*zip(STAGES, STAGE_COLORS, strict=True), ("other", OTHER_COLOR)):
        values = [
            (other_ms(row) or 0.0) if name == "other" else row.stages[name].mean if name in row.stages else 0.0 for row in rows
        ]
        axes.barh(
            places,
            values,
            left=left,
            height=0.62,
            color=color,
            label=name.removesuffix("_ms"),
            edgecolor="white",
            linewidth=0.6,
        )
        for place, (start, value) in enumerate(zip(left, values, strict=True)):
            if value > 0.06 * widest:  # narrower than its number otherwise
                ink = "white" if name in ("encode_ms", "prefill_ms", "decode_ms") else INK
                axes.text(start + value / 2, place, f"{value:,.0f}", ha="center", va="center", color=ink, fontsize=9)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:,.0f} ms", va="center", color=INK)
    _name_rows(axes, rows)
    axes.set_xlim(0, max(left) * 1.14)
    axes.set_xlabel("ms per image")
    figure.legend(loc="outside upper left", ncols=8, frameon=False, handlelength=1, columnspacing=1.2)
    return svg_text(figure, "Mean milliseconds per stage")


def _latency(figure_class: Any, rows: Sequence[Row]) -> str:
    figure, axes = _axes(figure_class, 1.1 + 0.62 * len(rows))
    for place, row in enumerate(rows):
        summary = row.latency_ms
        if summary is None:
            continue
        # a fixed zigzag keeps dots apart without random positions, so the same result gives the same picture
        heights = [place + 0.13 + 0.05 * (i % 5) for i in range(len(row.samples_ms))]
        axes.plot(
            row.samples_ms, heights, "o", color=SCENARIO_COLORS["SingleStream"], markersize=3.5, alpha=0.5, markeredgewidth=0
        )
        axes.barh(place - 0.12, summary.p95 - summary.p50, left=summary.p50, height=0.2, color=SCENARIO_COLORS["SingleStream"])
        axes.plot([summary.p99] * 2, [place - 0.26, place + 0.02], color=INK, linewidth=1.5)
        axes.text(
            summary.p99,
            place - 0.12,
            f"  p50 {summary.p50:,.0f} · p95 {summary.p95:,.0f} · p99 {summary.p99:,.0f}",
            va="center",
        )
    _name_rows(axes, rows)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, max(row.latency_ms.p99 for row in rows if row.latency_ms is not None) * 1.4)
    axes.set_xlabel("ms per image")
    return svg_text(figure, "Latency of each image")


def _totals(figure_class: Any, rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row.name for row in rows))
    scenarios = [scenario for scenario in SCENARIOS if any(row.scenario == scenario for row in rows)]
    figure = figure_class(figsize=(WIDTH_IN, 1.6 + 0.6 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.7 / len(scenarios)
    for axes, unit, values, form in (
        (left, "images per second", {row.key: row.images_per_s or 0.0 for row in rows}, "{:.2f}"),
        (right, "peak RSS, GiB", {row.key: (row.peak_rss_bytes or 0) / 2**30 for row in rows}, "{:.2f}"),
    ):
        for order, scenario in enumerate(scenarios):
            chosen = [row for row in rows if row.scenario == scenario]
            places = [names.index(row.name) + (order - (len(scenarios) - 1) / 2) * height for row in chosen]
            lengths = [values[row.key] for row in chosen]
            axes.barh(
                places, lengths, height=height * 0.9, color=SCENARIO_COLORS[scenario], label=scenario if axes is left else None
            )
            for place, length in zip(places, lengths, strict=True):
                axes.text(length, place, " " + form.format(length), va="center", fontsize=9)
        axes.set_xlim(0, max(values.values()) * 1.18 or 1)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=len(scenarios), frameon=False, handlelength=1)
    return svg_text(figure, "Throughput and peak memory")


def _axes(figure_class: Any, height_in: float) -> tuple[Any, Any]:
    figure = figure_class(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="x")
    return figure, axes


def _name_rows(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
