"""Tables, Markdown, charts and the page."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from rsvlm_infer.bench.charts import draw_charts
from rsvlm_infer.bench.compare import Rule, compare
from rsvlm_infer.bench.html import render_html
from rsvlm_infer.bench.schema import Agreement
from rsvlm_infer.bench.tables import bytes_text, markdown, number, other_ms, quality_text, report_tables
from rsvlm_infer.errors import MissingDependencyError
from tests.bench.made_up import make_report, make_row


@pytest.fixture
def report():
    return make_report(
        make_row(),
        make_row("bfloat16", ms=50.0, agreement=Agreement(4, 0.5, 0.75, 0.125, 0.99)),
        make_row(scenario="Offline"),
        make_row("float16", error="cannot <run> here", agreement=None),
    )


def test_numbers_read_well() -> None:
    assert number(12345.678) == "12,345.7"
    assert number(None) == "–"
    assert [bytes_text(value) for value in (None, 12, 2048, 3 * 2**20, 1.5 * 2**30)] == [
        "–",
        "12 B",
        "2 KiB",
        "3 MiB",
        "1.50 GiB",
    ]
    assert quality_text("class_accuracy", 0.756) == "75.6 %"
    assert quality_text("cider", 0.4567) == "0.457"
    assert quality_text("cider", None) == "–"


def test_headline_puts_accuracy_beside_latency(report) -> None:
    single, offline, stages, resources, accuracy, examples, failed = report_tables(report)
    assert (single.title, offline.title) == ("SingleStream", "Offline")
    assert single.header == (
        "row", "images/s", "Mpx/s", "× eager fp32", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "mean ± std ms", "TTFT ms", "TPOT ms",
        "peak RSS", "class acc.", "CIDEr", "same tokens",
    )  # fmt: skip
    assert single.rows[1] == (
        "eager bfloat16", "8.00", "0.80", "2.00", "125.0", "185.0", "192.5", "198.5", "125.0 ± 64.5", "25.0", "2.5",
        "1.00 GiB", "75.0 %", "0.500", "50.0 %",
    )  # fmt: skip
    assert "p50 ms" not in offline.header
    assert stages.rows[0] == ("eager float32 SingleStream", *["10.0"] * 7, "180.0")
    assert stages.rows[2][-1] == "–"
    assert resources.rows[0][1:] == ("1.50", "5 MiB", "1.00 GiB", "256.0", "10.0", "40.0")
    assert accuracy.rows[1] == ("eager bfloat16 SingleStream", "75.0 %", "0.500", "50.0 %", "75.0 %", "1.25e-01", "0.990000")
    assert examples.rows == (("a.jpg", "a river .", "a river | a road", "a river | a road"),)
    assert failed.rows == (("eager float16 SingleStream", "cannot <run> here"),)


def test_notes_say_what_is_not_measured_in_batches(report) -> None:
    said = "one image at a time in both scenarios."
    _, offline, _, _, accuracy, *_ = report_tables(report)
    assert offline.note.endswith(f" Class accuracy: {said}")
    assert accuracy.note.endswith(f"Logits: first step, worst image. Class accuracy: {said}")
    both = make_report(make_row(scenario="Offline", quality={"answer_accuracy": 0.5, "class_accuracy": 0.5}))
    assert report_tables(both)[0].note.endswith(f" Class accuracy and answer accuracy: {said}")
    neither = make_report(make_row(scenario="Offline", quality={"cider": 0.5}))
    assert [said in table.note for table in report_tables(neither)] == [False] * 5


def test_energy_and_guesses_have_columns_only_where_they_were_measured() -> None:
    plain = report_tables(make_report(make_row(energy_why_not="not readable: no counter")))[2]
    assert plain.header[-1] == "tokens/s"
    assert plain.note.endswith(" Energy: not readable: no counter.")
    measured = make_row("int4", energy_j=2.34, tokens_per_step=1.875, draft_acceptance=0.7)
    table = report_tables(make_report(make_row(), measured))[2]
    assert table.header[-3:] == ("J per image", "tokens/step", "guesses kept")
    assert [row[-3:] for row in table.rows] == [("–", "–", "–"), ("2.3", "1.88", "70.0 %")]
    assert "the answers are those without guesses" in table.note
    assert measured.metrics()["tokens_per_step"] == 1.875


def test_rows_say_their_axes_and_the_summary_names_packages() -> None:
    rows = [make_row(scenario="Offline", batch=batch, budget=64, package="mine") for batch in (1, 8)]
    packages = [{"row": "eager float32", "label": "mine", "path": "/there/mine"}]
    report = make_report(*rows, batches=[1, 8], packages=packages)
    headline = report_tables(report)[0]
    assert [row[0] for row in headline.rows] == [f"eager float32 mine budget 64 batch {batch}" for batch in (1, 8)]
    assert headline.note.startswith("All images at once, in batches as the row says.")
    assert "- package mine: /there/mine" in markdown(report)


def test_other_time_is_never_negative() -> None:
    assert other_ms(make_row()) == pytest.approx(180.0)
    assert other_ms(make_row(scenario="Offline")) is None
    assert other_ms(make_row(latency_ms=make_row(ms=1.0).latency_ms)) == 0.0


def test_markdown_is_a_table_per_section(report) -> None:
    text = markdown(report)
    assert text.startswith("# Bench of rsvlm_infer\n\n- images: 4 of RSICD test")
    assert "> be careful" in text
    assert "0.1.0 at 0123456789ab with local changes" in text
    assert "a river \\| a road" in text  # a bar inside a cell
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_comparison_is_shown_with_what_was_violated(report) -> None:
    new, old = make_report(make_row(ms=200.0)), make_report(make_row(), image_set="x")
    comparison = compare(new, old, [Rule.parse("p95>+10%")], force=True)
    table = report_tables(report, comparison)[-1]
    assert table.rows[0] == ("eager float32 SingleStream p50", "250", "500", "+100.0 %")
    assert table.note.startswith("Forced although workload image_set")
    assert "**Violated rules**" in markdown(report, comparison)
    assert "violates p95&gt;+10%" in render_html(report, comparison)


def test_report_with_no_successful_row_still_renders() -> None:
    failed = make_report(make_row(error="broken"))
    assert [table.title for table in report_tables(failed)] == ["Failed"] or "Failed" in markdown(failed)
    assert draw_charts(failed) == []
    assert "broken" in render_html(failed)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_page_is_self_contained_and_escaped(report) -> None:
    text = render_html(report)
    page = _Page()
    page.feed(text)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert page.counts["svg"] == 4
    assert page.counts["table"] == 7
    assert "script" not in page.counts
    assert "cannot &lt;run&gt; here" in text
    assert "<run>" not in text
    assert "be careful" in text


def test_charts_are_wellformed_and_repeatable(report) -> None:
    charts = draw_charts(report)
    assert [title for title, _, _ in charts] == [
        "Accuracy against latency",
        "Where the time goes",
        "Latency",
        "Throughput and memory",
    ]
    for _, _, svg in charts:
        assert ET.fromstring(svg).tag.endswith("svg")
    assert charts == draw_charts(report)
    offline = draw_charts(make_report(make_row(scenario="Offline")))
    assert [title for title, _, _ in offline] == ["Throughput and memory"]


@pytest.mark.parametrize(("module", "message"), [("jinja2", "Jinja2"), ("matplotlib.figure", "matplotlib")])
def test_missing_report_extra_is_named(report, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{message}.*rsvlm-infer\[report\]"):
        render_html(report)
