"""Rules and comparability."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rsvlm_infer.bench.compare import Rule, compare, differences, percent_change
from rsvlm_infer.errors import InputError
from tests.bench.made_up import make_report, make_row


@pytest.mark.parametrize(
    ("text", "metric", "op", "kind", "limit"),
    [
        ("p95>+10%", "p95", ">", "percent", 10.0),
        ("images_per_s < -5.5 %", "images_per_s", "<", "percent", -5.5),
        (" class_accuracy<=-0.02 ", "class_accuracy", "<=", "change", -0.02),
        ("ttft_ms_p50>=+12", "ttft_ms_p50", ">=", "change", 12.0),
        ("peak_rss_bytes>2e9", "peak_rss_bytes", ">", "value", 2e9),
    ],
)
def test_rules_parse(text: str, metric: str, op: str, kind: str, limit: float) -> None:
    rule = Rule.parse(text)
    assert (rule.text, rule.metric, rule.op, rule.kind, rule.limit) == (text.strip(), metric, op, kind, limit)


@pytest.mark.parametrize("text", ["", "p95", "p95>", "p95=10", "p95>+ten%", ">5", "p95>+10%x", "p95>1>2", "9p>1"])
def test_other_text_is_no_rule(text: str) -> None:
    with pytest.raises(InputError, match="METRIC OP LIMIT"):
        Rule.parse(text)


def test_a_percentage_needs_a_sign() -> None:
    with pytest.raises(InputError, match=r"write \+10% or -10%"):
        Rule.parse("p95>10%")


@pytest.mark.parametrize(
    ("text", "violated"),
    [
        ("p50>+19%", True),
        ("p50>+20%", False),  # exactly 20 %
        ("p50>=+20%", True),
        ("p50>+49", True),  # 250 -> 300 ms
        ("p50>+50", False),
        ("p50>299", True),
        ("images_per_s<-10%", True),
        ("images_per_s<-20%", False),
        ("class_accuracy<-0.01", False),
    ],
)
def test_rules_against_a_slower_row(text: str, violated: bool) -> None:
    old, new = make_report(make_row(ms=100.0)), make_report(make_row(ms=120.0))
    lines = compare(new, old, [Rule.parse(text)]).violations
    assert len(lines) == violated
    if text == "p50>+19%":
        assert lines == ("eager float32 SingleStream: p50 was 250, is 300 (+20.0%); violates p50>+19%",)


def test_a_metric_that_got_lost_or_broke_violates() -> None:
    old = make_report(make_row())
    for quality in ({}, {"cider": math.nan}):
        lines = compare(make_report(make_row(quality=quality)), old, [Rule.parse("cider<-0.5")]).violations
        assert lines == ("eager float32 SingleStream: cider was 0.5, is not measured any more; violates cider<-0.5",)


def test_a_rule_on_an_unknown_metric_is_an_error_not_a_pass() -> None:
    with pytest.raises(InputError, match=r"'p59'.*known are .*'p50'"):
        compare(make_report(make_row()), make_report(make_row()), [Rule.parse("p59>+1%")])


def test_rules_apply_to_every_row_that_has_the_metric() -> None:
    old = make_report(make_row(), make_row(scenario="Offline"))
    new = make_report(make_row(ms=200.0), make_row(scenario="Offline", ms=200.0))
    assert len(compare(new, old, [Rule.parse("p95>+10%"), Rule.parse("images_per_s<-10%")]).violations) == 3


def test_zero_before_has_infinite_change() -> None:
    assert percent_change(0.0, 0.0) == 0.0
    assert percent_change(1.0, 0.0) == math.inf
    assert percent_change(-1.0, -2.0) == 50.0


def test_other_machine_work_schema_or_rows_are_refused_unless_forced() -> None:
    old = make_report(make_row(), make_row("bfloat16"))
    environment = {**old.environment, "machine": {**old.environment["machine"], "cpu": "Other CPU"}}
    new = dataclasses.replace(
        make_report(make_row(), make_row(scenario="Offline"), images_digest="def"),
        environment=environment,
        schema="rsvlm-bench/2",
    )
    found = differences(new, old)
    assert found == [
        "schema is rsvlm-bench/2, was rsvlm-bench/1",
        "machine cpu is 'Other CPU', was 'Fake CPU'",
        "workload images_digest is 'def', was 'abc'",
        "row eager float32 Offline is only in the newer result",
        "row eager bfloat16 SingleStream is only in the older result",
    ]
    with pytest.raises(InputError, match=r"do not compare: schema.*--force"):
        compare(new, old, [])
    forced = compare(new, old, [Rule.parse("p50>+1%")], force=True)
    assert [after.key for after, _ in forced.pairs] == [("eager", "float32", "SingleStream")]
    assert forced.violations == ()
    assert list(forced.differences) == found


def test_nothing_in_common_cannot_be_forced() -> None:
    with pytest.raises(InputError, match="in common"):
        compare(make_report(make_row("bfloat16")), make_report(make_row()), [], force=True)
