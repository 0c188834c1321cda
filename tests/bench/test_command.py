"""The command: exit codes, files, what goes where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rsvlm_infer.bench import command, main
from rsvlm_infer.bench.measure import Workload
from rsvlm_infer.bench.runner import THREAD_VARIABLES
from rsvlm_infer.bench.schema import Report, read_report
from tests.bench.conftest import FAKE
from tests.bench.made_up import make_report, make_row
from tests.tasks.telling_model import telling_config


@pytest.fixture
def bench(rsicd: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command on the tiny set with the fake model."""
    monkeypatch.setattr(command, "Workload", lambda **values: Workload(**values, model=FAKE))

    def run(*arguments: str) -> int:
        base = ["--checkpoint", str(checkpoint), "--images", str(rsicd), "--output", str(tmp_path / "out"), "--threads", "1"]
        return main([*base, *arguments])

    return run


def _save(report: Report, file: Path) -> Path:
    file.write_text(json.dumps(report.to_dict()), encoding="utf-8")
    return file


def test_a_run_writes_four_files_and_prints_its_tables(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--scenario", "SingleStream", "--images-limit", "3", "--warmup", "0") == 0
    out, err = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.html", "bench.json", "bench.md", "pareto.png"]
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    report = read_report(tmp_path / "out" / "bench.json")
    assert [row.key for row in report.rows] == [("eager", "float32", "SingleStream"), ("eager", "bfloat16", "SingleStream")]
    assert report.workload["images"] == 3
    assert report.workload["threads"] == 1
    assert report.environment["command"].startswith("python -m rsvlm_infer.bench --checkpoint")
    assert "SingleStream" in out
    assert "eager bfloat16" in out
    assert "warning: " in err
    assert "wrote " in err
    assert "wrote " not in out


def _package(folder: Path, precision: str, embedder: str) -> Path:
    """A native package as far as a run looks at it before the model does."""
    folder.mkdir()
    values = {"format": "rsvlm-package", "version": 1, "architecture": "rsvlm", "kind": "native", "precision": precision}
    contents = {"config.json": json.dumps(telling_config().to_dict()), "tokenizer.json": "", "weights.safetensors": ""}
    for name, content in contents.items():
        (folder / name).write_text(content)
    files = {name: {"bytes": len(content), "sha256": ""} for name, content in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({**values, "files": files, "model": {"embedder": embedder}}))
    return folder


def test_packages_are_rows_beside_the_baseline_on_the_checkpoint(
    bench: Callable[..., int],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "embedder_digest", lambda folder: "ours")
    ours, theirs = _package(tmp_path / "ours", "int4", "ours"), _package(tmp_path / "theirs", "bf16", "theirs")
    arguments = ("--images-limit", "1", "--warmup", "0", "--budget", "7", "--batch", "1,2", "--scenario", "Offline")
    assert bench("--package", str(ours), "--package", str(theirs), *arguments) == 0
    report = read_report(tmp_path / "out" / "bench.json")
    assert [row.title for row in report.rows] == [
        f"{name} Offline budget 7 batch {batch}" for batch in (1, 2) for name in ("eager float32", "native int4", "native bf16")
    ]
    assert {row.visual_tokens for row in report.rows} == {7.0}
    assert report.rows[0].disk_bytes == 1024
    assert report.rows[1].disk_bytes == sum(path.stat().st_size for path in ours.iterdir())
    assert report.rows[1].agreement is not None
    assert [entry["path"] for entry in report.workload["packages"]] == [str(ours), str(theirs)]
    err = capsys.readouterr().err
    assert f"package {theirs} was made from another checkpoint" in err
    assert f"package {ours} was made" not in err
    assert bench("--package", str(ours), "--precision", "bfloat16", *arguments) == 0
    rows = read_report(tmp_path / "out" / "bench.json").rows[:3]
    assert [(row.backend, row.precision) for row in rows] == [("eager", "float32"), ("eager", "bfloat16"), ("native", "int4")]
    assert bench("--package", str(checkpoint), *arguments) == 1
    assert "--package must name an exported package" in capsys.readouterr().err


def test_a_package_in_place_of_the_checkpoint_runs_alone(bench: Callable[..., int], tmp_path: Path) -> None:
    ours = _package(tmp_path / "ours", "int4", "ours")
    assert bench("--checkpoint", str(ours), "--images-limit", "1", "--warmup", "0", "--scenario", "SingleStream") == 0
    report = read_report(tmp_path / "out" / "bench.json")
    assert [row.title for row in report.rows] == ["native int4 SingleStream"]
    assert report.workload["auto_backend"].startswith("native: ")


@pytest.mark.parametrize("counts", ["0", "a", "8,", "-1", ""])
def test_counts_are_whole_numbers(bench: Callable[..., int], counts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(f"--batch={counts}") == 2
    assert "must be whole numbers from 1" in capsys.readouterr().err


def test_partly_failed_is_3_and_a_failed_baseline_is_1(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--scenario", "Offline", "--images-limit", "1", "--warmup", "0")
    assert bench(*arguments, "--precision", "float16") == 3
    assert "precision float16 is not for this fake" in capsys.readouterr().err
    assert bench(*arguments, "--precision", "float32", "--tiling", "dris", "--max-new-tokens", "2") == 0


def test_failed_baseline_in_a_result_is_an_error(tmp_path: Path) -> None:
    source = _save(make_report(make_row(error="broken"), make_row("bfloat16")), tmp_path / "result.json")
    assert main(["--from", str(source), "--output", str(tmp_path / "out")]) == 1


@pytest.mark.parametrize(
    ("rule", "code", "line"),
    [
        ("p95>+10%", 1, "violated: eager float32 SingleStream: p95 was 385, is 462 (+20.0%); violates p95>+10%"),
        ("p95>+25%", 0, None),
        ("p59>+25%", 1, "error: metric of 'p59>+25%' must be in the older result"),
    ],
)
def test_rules_decide_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, code: int, line: str | None
) -> None:
    old = _save(make_report(make_row()), tmp_path / "old.json")
    new = _save(make_report(make_row(ms=120.0)), tmp_path / "new.json")
    arguments = ["--from", str(new), "--compare", str(old), "--output", str(tmp_path / "out"), "--fail-if", rule]
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert line is None or line in err
    assert ("violated" in err) == (line is not None and line.startswith("violated"))


def test_square_brackets_in_a_caption_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save(make_report(make_row(answers={"a.jpg": "a [red] roof [/]"})), tmp_path / "result.json")
    assert main(["--from", str(source), "--output", str(tmp_path / "out")]) == 0
    assert "a [red] roof [/]" in capsys.readouterr().out


def test_results_that_do_not_fit_need_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = _save(make_report(make_row(), images_digest="other"), tmp_path / "old.json")
    new = _save(make_report(make_row()), tmp_path / "new.json")
    arguments = ["--from", str(new), "--compare", str(old), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "pass --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "warning: workload images_digest is 'abc', was 'other'" in capsys.readouterr().err


def test_the_older_result_may_lie_where_the_new_one_goes(bench: Callable[..., int], tmp_path: Path) -> None:
    arguments = ("--scenario", "Offline", "--images-limit", "2", "--warmup", "0", "--precision", "float32")
    assert bench(*arguments) == 0
    assert bench(*arguments, "--compare", str(tmp_path / "out" / "bench.json"), "--fail-if", "class_accuracy<-0.01") == 0


def test_a_comparison_that_cannot_be_is_refused_before_measuring_and_results_are_kept_after(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--scenario", "Offline", "--images-limit", "2", "--warmup", "0", "--precision", "float32")
    assert bench(*arguments) == 0
    older = (tmp_path / "out" / "bench.json").rename(tmp_path / "old.json")
    assert bench(*arguments, "--compare", str(older), "--fail-if", "p59>1") == 1  # known only once the rows are there
    assert (tmp_path / "out" / "bench.json").is_file()
    monkeypatch.setattr(command, "run_rows", lambda *_: pytest.fail("must not measure"))
    capsys.readouterr()
    assert bench(*arguments, "--max-new-tokens", "3", "--compare", str(older)) == 1
    assert "workload max_new_tokens is 3, was 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-if", "p95>+10%"], "add --compare"),
        (["--compare", "x.json", "--fail-if", "p95"], "METRIC OP LIMIT"),
        (["--scenario", "Server"], "invalid choice"),
        (["--images-limit", "-1"], "--images-limit must be at least 0"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_usage_errors_are_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_other_errors_are_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", str(tmp_path / "absent")]) == 1
    assert main(["--compare", str(tmp_path / "absent.json")]) == 1
    err = capsys.readouterr().err
    assert "error: --images must name a folder" in err
    assert "error: bench result" in err


def test_a_missing_default_checkpoint_is_made_and_a_named_one_must_exist(
    rsicd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(command, "run_rows", lambda work, *_: make_report(make_row(), checkpoint=work.checkpoint))
    monkeypatch.setattr("rsvlm_infer.pull.pull", lambda: tmp_path / "made")
    arguments = ["--images", str(rsicd), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert read_report(tmp_path / "out" / "bench.json").workload["checkpoint"] == str(tmp_path / "made")
    assert main([*arguments, "--checkpoint", str(tmp_path / "absent")]) == 1
    assert "--checkpoint must name a checkpoint folder" in capsys.readouterr().err


def test_help_explains_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "p95>+10%" in capsys.readouterr().out


def test_without_the_report_extra_the_page_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    source = _save(make_report(make_row()), tmp_path / "result.json")
    assert main(["--from", str(source), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "pareto.png"]
    assert "no bench.html: the HTML report needs Jinja2" in capsys.readouterr().err


def test_accuracy_only_scores_the_whole_split(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "2")  # and what it was is restored after the test
    assert bench("--accuracy-only", "--split", "test") == 0
    assert [os.environ[name] for name in THREAD_VARIABLES] == ["1", "1", "1"]
    values = json.loads((tmp_path / "out" / "accuracy.json").read_text(encoding="utf-8"))
    assert values["workload"]["images"] == 4
    assert values["metrics"]["class_accuracy"] == 0.75
    assert len((tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert "text to image r10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--compare", "old.json", "--fail-if", "p95>+10%"], "--compare, --fail-if"),
        (["--fail-if", "p95>+10%"], "--fail-if"),
        (["--from", "bench.json"], "--from"),
        (["--force", "--scenario", "Offline"], "--scenario, --force"),
        (["--repeats", "3", "--warmup", "0"], "--repeats, --warmup"),
        (["--backend", "eager", "--backend", "native"], "several --backend"),
        (["--precision", "float32", "--precision", "bfloat16"], "several --precision"),
        (["--package", "p", "--budget", "64", "--batch", "1,8"], "--package, --budget, several --batch"),
    ],
)
def test_accuracy_only_refuses_what_it_would_ignore(
    bench: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.setattr(command, "measure_accuracy", lambda *_: pytest.fail("must not measure"))
    assert bench("--accuracy-only", *arguments) == 2
    assert f"error: --accuracy-only cannot be combined with {named}: it scores one backend" in capsys.readouterr().err


def test_accuracy_only_takes_one_backend_and_one_precision(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    assert bench("--accuracy-only", "--backend", "eager", "--precision", "bfloat16", "--tiling", "fixed") == 0
    values = json.loads((tmp_path / "out" / "accuracy.json").read_text(encoding="utf-8"))
    assert (values["backend"], values["precision"], values["workload"]["tiling"]) == ("eager", "bfloat16", "fixed")


def test_another_set_of_questions_is_refused(
    bench: Callable[..., int], rsicd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files with other sentences are other work: accuracy would change though the code did not."""
    arguments = ("--scenario", "Offline", "--images-limit", "2", "--warmup", "0", "--precision", "float32")
    assert bench(*arguments) == 0
    older = (tmp_path / "out" / "bench.json").rename(tmp_path / "old.json")
    entries = json.loads((rsicd / "captions.json").read_text(encoding="utf-8"))
    for entry in entries:
        entry["captions"] = entry["captions"][:1]
    (rsicd / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
    monkeypatch.setattr(command, "run_rows", lambda *_: pytest.fail("must not measure"))
    capsys.readouterr()
    assert bench(*arguments, "--compare", str(older)) == 1
    err = capsys.readouterr().err
    assert "workload captions is 2, was 4" in err
    assert "workload images_digest is" in err


def test_default_limit_is_small_and_zero_means_all(
    bench: Callable[..., int], rsicd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(work: Workload, *others: object) -> Report:
        seen.append(len(work.images.samples))
        return make_report(make_row())

    monkeypatch.setattr(command, "run_rows", stop)
    monkeypatch.setattr(command, "DEFAULT_LIMIT", 2)
    assert bench() == 0
    assert bench("--images-limit", "0") == 0
    assert seen == [2, 4]


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rsvlm_infer.bench", "--scenario", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "rsvlm bench: error" in done.stderr
