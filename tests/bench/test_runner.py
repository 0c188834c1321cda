"""Rows in processes of their own, joined to a report."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rsvlm_infer.bench import runner
from rsvlm_infer.bench.measure import Workload
from rsvlm_infer.bench.plan import ModelChoice, RowPlan, plan_rows
from rsvlm_infer.bench.runner import Outcome, agreement, run_rows
from rsvlm_infer.bench.schema import Scenario
from tests.bench.made_up import make_report, make_row

ENVIRONMENT = make_report().environment


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def _plans(work: Workload, *precisions: str, scenario: Scenario = "SingleStream") -> list[RowPlan]:
    return [RowPlan(ModelChoice("eager", precision, work.checkpoint), scenario) for precision in precisions]


def _outcome(token_ids: dict[str, list[int]], logits: Any) -> Outcome:
    return Outcome(make_row(), token_ids, np.array(logits, dtype=np.float32))


def test_agreement_by_hand() -> None:
    reference = _outcome({"a": [1, 2, 3, 4], "b": [5], "c": []}, [[3.0, 4.0], [0.0, 1.0]])
    other = _outcome({"a": [1, 2, 9, 4], "b": [5], "c": []}, [[3.0, 4.0], [1.0, 1.0]])
    found = agreement(other, reference)
    assert found.images == 3
    assert found.same_tokens == pytest.approx(2 / 3)
    assert found.token_prefix == pytest.approx((0.5 + 1 + 1) / 3)
    assert found.logits_max_abs == 1.0
    assert found.logits_cosine == pytest.approx(0.5**0.5)
    itself = agreement(reference, reference)
    assert (itself.same_tokens, itself.token_prefix, itself.logits_max_abs, itself.logits_cosine) == (1.0, 1.0, 0.0, 1.0)


def test_a_longer_answer_is_not_the_same_and_logits_of_another_shape_have_no_distance() -> None:
    found = agreement(_outcome({"a": [1, 2]}, [[1.0]]), _outcome({"a": [1]}, [[1.0, 2.0]]))
    assert (found.same_tokens, found.token_prefix, found.logits_max_abs, found.logits_cosine) == (0.0, 1.0, None, None)


def test_rows_run_in_processes_and_failures_stay_alone(work: Workload) -> None:
    console = _console()
    plans = _plans(work, "float32", "bfloat16", "float16", "crash")
    report = run_rows(dataclasses.replace(work, threads=1), plans, ENVIRONMENT, console)
    baseline, other, refused, crashed = report.rows
    assert baseline.agreement is not None
    assert baseline.agreement.same_tokens == 1.0
    assert baseline.agreement.logits_max_abs == 0.0
    assert other.agreement is not None
    assert other.agreement.same_tokens == 0.5  # two of four names hold "odd"
    assert other.agreement.token_prefix == pytest.approx((1 + 5 / 6) / 2)
    assert other.agreement.logits_max_abs == 0.5
    assert refused.error == "precision float16 is not for this fake; use float32"
    assert crashed.error is not None
    assert "exit code 9: it said nothing" in crashed.error
    assert report.workload["images"] == 4
    assert report.workload["references"]["river-even.jpg"] == "a green field near the river ."
    assert "8 latencies per row" in report.warnings[0]
    assert any("CIDEr" in line for line in report.warnings)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    done = [line.split()[0] for line in said.splitlines() if line.endswith(" done")]
    assert done == ["1/8", "2/8", "3/8", "4/8", "7/8", "8/8"]  # the second round goes back, without the rows that failed
    assert said.index("7/8 eager bfloat16") < said.index("8/8 eager float32")
    assert (baseline.repeats, len(baseline.samples_ms)) == (2, 8)
    assert "eager float16 SingleStream failed: precision float16" in said


def test_budgets_and_batches_are_axes_with_their_own_baselines(work: Workload) -> None:
    model, other = (ModelChoice("eager", precision, work.checkpoint) for precision in ("float32", "bfloat16"))
    plans = plan_rows([model, other], ["Offline"], budgets=[4, 8], batches=[1, 5])
    report = run_rows(dataclasses.replace(work, repeats=1, logits_images=1), plans, ENVIRONMENT, _console())
    assert [row.error for row in report.rows] == [None] * 8
    assert [row.title for row in report.rows[:3]] == [
        "eager float32 Offline budget 4 batch 1",
        "eager bfloat16 Offline budget 4 batch 1",
        "eager float32 Offline budget 4 batch 5",
    ]
    assert [row.visual_tokens for row in report.rows] == [4.0] * 4 + [8.0] * 4
    assert report.baseline(report.rows[7]) is report.rows[6]
    assert all(row.agreement is not None for row in report.rows)
    assert (report.workload["budgets"], report.workload["batches"]) == ([4, 8], [1, 5])
    assert any("batches of [5] hold no more than the run's 4 images" in line for line in report.warnings)


def test_a_traceback_ends_in_its_last_line(work: Workload) -> None:
    broken = dataclasses.replace(work, model="tests.bench.fake_rsvlm:Absent")
    (row,) = run_rows(broken, _plans(broken, "float32", scenario="Offline"), ENVIRONMENT, _console()).rows
    assert row.error is not None
    assert row.error.endswith("has no attribute 'Absent'")
    assert "exit code 1" in row.error


def test_interrupt_leaves_no_process_behind(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupt(process: Any, console: Console, title: str) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_rows(work, _plans(work, "float32"), ENVIRONMENT, _console())
    assert started[0].poll() is not None


def test_progress_on_a_terminal_shows_the_row(work: Workload) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    run_rows(work, _plans(work, "float32"), ENVIRONMENT, console)
    assert "1/2 eager float32 SingleStream" in console.file.getvalue()  # type: ignore[attr-defined]


def test_missing_metrics_package_is_said_once(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "library_version", lambda name: None)
    report = run_rows(work, _plans(work, "float32", scenario="Offline"), ENVIRONMENT, _console())
    assert report.warnings[0].startswith("pycocoevalcap is not installed")
