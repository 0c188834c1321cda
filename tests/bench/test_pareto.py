"""Accuracy against latency: which rows are on the front, and a picture whose labels can be read."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest
from PIL import Image

from rsvlm_infer.bench.charts import pareto_png
from rsvlm_infer.bench.pareto import draw_pareto, pareto_note, pareto_points
from rsvlm_infer.bench.schema import Report, Row
from rsvlm_infer.bench.style import load_figure
from tests.bench.made_up import make_report, make_row


def _row(backend: str, precision: str, ms: float, cider: float) -> Row:
    return dataclasses.replace(make_row(precision, ms=ms, quality={"cider": cider, "class_accuracy": 0.5}), backend=backend)


@pytest.fixture
def report() -> Report:
    return make_report(
        _row("eager", "float32", 300, 0.912),
        _row("eager", "bfloat16", 210, 0.905),
        _row("native", "fp32", 90, 0.912),
        _row("native", "int4", 42, 0.89),
        _row("native", "int8", 43, 0.8901),
        _row("onnx", "int4", 42.5, 0.88),
        make_row(scenario="Offline"),
        make_row("float16", error="no"),
    )


def test_the_front_is_what_no_row_beats_in_both(report: Report) -> None:
    found = pareto_points(report)
    assert found is not None
    metric, points = found
    assert metric == "cider"
    assert [(point.row.backend, point.row.precision) for point in points if point.best] == [
        ("native", "int4"),
        ("native", "int8"),
        ("native", "fp32"),
    ]
    assert [point.ms for point in points] == sorted(point.ms for point in points)
    assert len(points) == 6
    assert points[-1].ms == 750.0  # as right as a faster one is not better
    assert points[-1].slow_ms == pytest.approx(1110.0)
    assert "CIDEr of 4 images" in pareto_note(report)


def test_other_truths_and_none() -> None:
    only_classes = make_report(make_row(quality={"class_accuracy": 0.75}))
    found = pareto_points(only_classes)
    assert found is not None
    assert found[0] == "class_accuracy"
    assert pareto_png(only_classes) is not None  # a single dot has no span
    assert pareto_points(make_report(make_row(quality={}), make_row(scenario="Offline"))) is None
    assert pareto_png(make_report(make_row(quality={}))) is None


def test_labels_do_not_lie_on_each_other_and_the_picture_is_repeatable(report: Report) -> None:
    png = pareto_png(report)
    assert png is not None
    assert png == pareto_png(report)
    assert Image.open(io.BytesIO(png)).size == (1536, 832)
    figure = draw_pareto(load_figure()[1], report)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    assert len(boxes) == 6
    for (name, one), (other, two) in itertools.combinations(boxes.items(), 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width <= 0 or height <= 0.15 * one.height, (name, other)
