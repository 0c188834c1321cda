"""`rsvlm scene` with several scenes is a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.cli.scene import split_words
from rsvlm_infer.errors import InputError
from tests.cli.running import objects, run
from tests.cli.test_run import paint
from tests.scenes.folders import contents


def test_words_are_scenes_then_a_mode_then_a_question() -> None:
    assert split_words(["a.tif"]) == (["a.tif"], "describe", "")
    assert split_words(["a.tif", "b.tif", "describe"]) == (["a.tif", "b.tif"], "describe", "")
    assert split_words(["a.tif", "b.tif", "ask", "Is there a port?"]) == (["a.tif", "b.tif"], "ask", "Is there a port?")
    assert split_words(["a.tif", "ask", "find"]) == (["a.tif"], "ask", "find")
    assert split_words(["./ask", "b.tif"]) == (["./ask", "b.tif"], "describe", "")
    with pytest.raises(InputError, match='SCENE must come before "find", got none; write rsvlm scene FILE find'):
        split_words(["find", "a lake"])


def test_many_scenes_are_a_job_that_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: str) -> None:
    for name, colour in (("a", (200, 10, 10)), ("b", (10, 200, 10))):
        paint(tmp_path / f"{name}.png", colour)
    out = tmp_path / "out"
    fixed = ("-o", str(out), "-c", checkpoint, "--window", "28")
    command = ("scene", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "ask", "What colour?", *fixed)
    code, text, err = run(capsys, *command, "--dry-run", "-f", "json")
    assert (code, objects(text)[0]["windows"], err) == (0, 12, "")
    assert not out.exists()
    assert run(capsys, *command) == (0, f"{out}\t12 of 12 windows of 2 scenes answered, 12 of them now\n", "")
    assert sorted(contents(out)) == [
        *(f"{name}/{file}" for name in "ab" for file in (f"{name}.geojson", "header.json", "records.jsonl")),
        "job.json",
    ]
    quoted = ("scene", str(tmp_path / "*.png"), "ask", "What colour?", *fixed)  # a pattern that the shell left alone
    assert run(capsys, *quoted) == (0, f"{out}\t12 of 12 windows of 2 scenes answered, 0 of them now\n", "")


def test_many_scenes_need_a_folder(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, text, err = run(capsys, "scene", files["red"], files["green"])
    assert (code, text) == (2, "")
    assert "need --output, got 2 scenes; add -o FOLDER" in err
