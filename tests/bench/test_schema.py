"""The shape of a result: summaries, metrics, ratios, JSON there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsvlm_infer.bench.schema import SCHEMA, Agreement, Report, Summary, read_report
from rsvlm_infer.errors import InputError
from tests.bench.made_up import make_report, make_row


def test_summary_by_hand() -> None:
    summary = Summary.of([10.0, 20.0, 30.0, 40.0, 50.0])
    assert (summary.count, summary.mean, summary.p50) == (5, 30.0, 30.0)
    assert summary.std == pytest.approx(250**0.5)
    assert (summary.p90, summary.p95, summary.p99) == pytest.approx((46.0, 48.0, 49.6))
    assert Summary.of([7.0]) == Summary(1, 7.0, 0.0, 7.0, 7.0, 7.0, 7.0)


def test_metrics_are_flat_and_leave_out_what_was_not_measured() -> None:
    row = make_row(ms=100.0, agreement=Agreement(4, 0.75, 0.9, None, None))
    metrics = row.metrics()
    assert metrics["p50"] == metrics["latency_ms_p50"] == 250.0
    assert metrics["p95"] == pytest.approx(385.0)
    assert metrics["encode_ms_mean"] == 10.0
    assert metrics["ttft_ms_p95"] == 50.0
    assert metrics["cider"] == 0.5
    assert metrics["same_tokens"] == 0.75
    assert "logits_max_abs" not in metrics
    assert "p95" not in make_row(scenario="Offline").metrics()


def test_ratios_say_how_much_better_than_the_baseline_of_the_same_scenario() -> None:
    fast = make_row("bfloat16", ms=50.0, peak_rss_bytes=2**29)
    report = make_report(make_row(), fast, make_row("bfloat16", "Offline"))
    ratios = report.ratios(fast)
    assert ratios["p50"] == pytest.approx(2.0)
    assert ratios["images_per_s"] == pytest.approx(2.0)
    assert ratios["peak_rss_bytes"] == pytest.approx(2.0)
    assert report.ratios(report.rows[0])["p95"] == 1.0
    assert report.ratios(report.rows[2]) == {}  # no baseline in Offline


def test_json_round_trip_keeps_everything(tmp_path: Path) -> None:
    report = make_report(make_row(), make_row("bfloat16", error="no", latency_ms=None, agreement=None))
    file = tmp_path / "bench.json"
    values = report.to_dict()
    values["rows"][0]["a_field_of_tomorrow"] = 1
    values["rows"][0]["latency_ms"]["p999"] = 1
    file.write_text(json.dumps(values), encoding="utf-8")
    assert values["schema"] == SCHEMA == "rsvlm-bench/1"
    assert values["rows"][0]["to_baseline"]["p50"] == 1.0
    assert read_report(file) == report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "schema"),
        ('{"schema": "other/1"}', "schema"),
        ('{"schema": "rsvlm-bench/1"}', "KeyError"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "bench.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_report(file)


def test_baseline_must_have_run() -> None:
    assert make_report(make_row(error="broken")).baseline(make_row()) is None
    assert isinstance(make_report(make_row()), Report)
