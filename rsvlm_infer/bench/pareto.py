"""Accuracy against latency as a picture: which rows no other row beats in both. Knows the schema; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schema import Report, Row
from .style import INK, QUIET
from .tables import FRACTIONS, HEADLINE_QUALITY, quality_text

# Captions first: their latency is what was measured. Classes come from embeddings and do not use the language model.
PREFERRED = ("cider", "answer_accuracy", "class_accuracy")
BACKEND_COLORS = {"eager": "#6b7785", "native": "#0072b2", "onnx": "#e69f00", "cuda": "#009e73", "tensorrt": "#cc79a7"}
OTHER_BACKEND = "#d55e00"
LABEL_PT, LINE_PT, DOT_PT = 150.0, 14.0, 6.0  # length of a label, distance of two lines, radius of a dot, in points
FEW_IMAGES = 200  # below, two rows of equal weights differ by chance as much as by precision


@dataclass(frozen=True)
class ParetoPoint:
    """One row: median latency in ms, its span from p50 to p90, accuracy, and whether no other row is faster and at least as right."""

    row: Row
    ms: float
    slow_ms: float
    quality: float
    best: bool


def pareto_points(report: Report) -> tuple[str, list[ParetoPoint]] | None:
    """The metric and the rows of SingleStream that have it, fastest first; None when there are none."""
    rows = [row for row in report.rows if row.ok and row.latency_ms is not None]
    metric = next((name for name in PREFERRED if any(name in row.quality for row in rows)), None)
    if metric is None:
        return None
    chosen = sorted(
        ((row.latency_ms.p50, -row.quality[metric], row) for row in rows if row.latency_ms and metric in row.quality),
        key=lambda item: item[:2],
    )
    points: list[ParetoPoint] = []
    highest = float("-inf")
    for ms, negative, row in chosen:
        assert row.latency_ms is not None
        points.append(ParetoPoint(row, ms, row.latency_ms.p90, -negative, -negative > highest))
        highest = max(highest, -negative)
    return metric, points


def pareto_note(report: Report) -> str:
    """What the picture shows, in words."""
    found = pareto_points(report)
    assert found is not None
    metric, points = found
    images = points[0].row.images
    few = " So few images say little about accuracy: a difference may be chance." if images < FEW_IMAGES else ""
    return (
        f"Left and up is better. Dots are the median latency of a caption, lines reach to p90; {HEADLINE_QUALITY[metric]} of {images} "
        "images. The step line joins the rows that no other row beats in both; the dotted line is eager fp32's accuracy." + few
    )


def draw_pareto(figure_class: Any, report: Report) -> Any:
    """The figure; one label per dot, moved apart where they would overlap."""
    found = pareto_points(report)
    assert found is not None
    metric, points = found
    figure = figure_class(figsize=(9.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(True)
    axes.set_xscale("log")
    axes.set_xlim(min(point.ms for point in points) * 0.8, max(point.slow_ms for point in points) * 1.6)
    qualities = [point.quality for point in points]
    space = max(max(qualities) - min(qualities), 0.02 * max(map(abs, qualities)), 0.01)
    axes.set_ylim(min(qualities) - 0.35 * space, max(qualities) + 0.35 * space)
    baseline = next((point for point in points if point.row.is_baseline_of(point.row)), None)
    if baseline is not None:
        axes.axhline(baseline.quality, color=QUIET, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    front = [point for point in points if point.best]
    xs = [front[0].ms, *(each.ms for each in front[1:] for _ in range(2)), axes.get_xlim()[1]]
    ys = [each.quality for each in front for _ in range(2)]
    axes.plot(xs, ys, color=INK, linewidth=1.4, alpha=0.45, zorder=2)
    for backend in dict.fromkeys(row.backend for row in report.rows):
        axes.plot([], [], "o", markersize=8, color=_color(backend), label=backend)
    axes.plot([], [], color=INK, linewidth=1.4, alpha=0.45, label="no row is faster and at least as right")
    for point in points:
        color = _color(point.row.backend)
        axes.plot([point.ms, point.slow_ms], [point.quality] * 2, color=color, linewidth=1, alpha=0.5, zorder=3)
        face = color if point.best else "white"
        axes.plot(point.ms, point.quality, "o", markersize=9, color=color, markerfacecolor=face, markeredgewidth=1.8, zorder=4)
    _label(figure, axes, metric, points)
    _ticks(axes)
    axes.set_xlabel("ms per caption, median (log scale)")
    title = HEADLINE_QUALITY[metric]
    axes.set_ylabel(title if title.isupper() or title == "CIDEr" else title.capitalize())
    if metric in FRACTIONS:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f} %")
    figure.legend(loc="outside upper left", ncols=7, frameon=False, handlelength=1.4, columnspacing=1.6)
    return figure


def _color(backend: str) -> str:
    return BACKEND_COLORS.get(backend, OTHER_BACKEND)


def _ticks(axes: Any) -> None:
    """Round milliseconds instead of powers of ten."""
    low, high = axes.get_xlim()
    rounds = [digit * 10**power for power in range(-2, 8) for digit in (1, 2, 5)]
    ticks = [value for value in rounds if low <= value <= high]
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()


def _label(figure: Any, axes: Any, metric: str, points: list[ParetoPoint]) -> None:
    """Names beside the dots, at the nearest height where neither another name nor another dot lies."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # fixes the layout, so that places in pixels hold
    scale = figure.dpi / 72
    dots = [tuple(axes.transData.transform((point.ms, point.quality))) for point in points]
    names: list[tuple[float, float]] = []

    def is_free(x: float, y: float, own: tuple[float, float]) -> bool:
        apart = all(abs(x - other_x) > LABEL_PT * scale or abs(y - other_y) > LINE_PT * scale for other_x, other_y in names)
        return apart and not any(
            dot != own and -DOT_PT * scale < dot[0] - x < LABEL_PT * scale and abs(dot[1] - y) < (LINE_PT / 2 + DOT_PT) * scale
            for dot in dots
        )

    for point, (x, y) in sorted(zip(points, dots, strict=True), key=lambda item: (-item[0].quality, item[0].ms)):
        heights = [y + sign * (10 + 2 * step) * scale for step in range(80) for sign in (1, -1)]
        text_y = next((height for height in heights if is_free(x, height, (x, y))), heights[0])
        names.append((x, text_y))
        axes.annotate(
            f"{_short(point.row)}  {point.ms:,.0f} ms · {quality_text(metric, point.quality)}",
            (point.ms, point.quality),
            xytext=(8, (text_y - y) / scale),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if point.best else "normal",
            color=INK,
            va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],  # lines pass behind the words
            zorder=5,
        )


def _short(row: Row) -> str:
    """Its name without the backend, which the colour says."""
    return " ".join((row.precision, *row.key[3:]))
