"""The journal keeps what it was told, whatever happens to its process."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rsvlm_infer.scenes.journal import AnswerKey, Failure, Journal, JournalError, Limits, Pace
from rsvlm_infer.scenes.record import GridWindow, PixelWindow, WindowRecord
from rsvlm_infer.tasks.result import Timings
from tests.conftest import REPOSITORY

KEY = AnswerKey("content", "model", "prompt", "config")
OTHERS = [
    AnswerKey("x", "model", "prompt", "config"),
    AnswerKey("content", "x", "prompt", "config"),
    AnswerKey("content", "model", "x", "config"),
    AnswerKey("content", "model", "prompt", "x"),
]


TOOK = {"budget": None, "job_hash": "job", "pace": Pace(windows=1, seconds=1.0)}


def window(index: int) -> GridWindow:
    place = PixelWindow(index * 8, 0, 8, 16)
    return GridWindow(index, place, place)


def record(index: int) -> WindowRecord:
    return WindowRecord(
        place=window(index),
        text="a harbour – größer",
        score=0.1 + index,
        num_visual_tokens=64,
        num_prompt_tokens=7,
        num_new_tokens=3,
        timings=Timings(decode_ms=1.5),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "journal.sqlite"


def test_answers_come_back_with_their_timings_and_only_under_their_key(path: Path) -> None:
    with Journal(path) as journal:
        journal.add(KEY, [record(0), record(1)], **TOOK)
    with Journal(path) as journal:
        assert journal.answers(KEY) == {window(0).window: record(0), window(1).window: record(1)}
        for other in OTHERS:
            assert journal.answers(other) == {}


def test_a_micro_batch_is_written_whole_or_not_at_all(path: Path) -> None:
    bad = WindowRecord(place=window(1), score=float("nan"))
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.add(KEY, [record(0), bad], **TOOK)
        assert journal.answers(KEY) == {}
        journal.add(KEY, [record(0)], **TOOK)
        assert len(journal.answers(KEY)) == 1


def test_attempts_are_counted_across_openings_until_an_answer_comes(path: Path) -> None:
    with Journal(path) as journal:
        assert journal.fail(KEY, window(3), "first") == Failure(1, "first")
    with Journal(path) as journal:
        assert journal.fail(KEY, window(3), "second") == Failure(2, "second")
        assert journal.failures(KEY) == {window(3).window: Failure(2, "second")}
        assert journal.failures(OTHERS[0]) == {}
        journal.add(KEY, [record(3)], **TOOK)
        assert journal.failures(KEY) == {}


def test_a_refused_or_finished_scene_is_so_until_it_changes(path: Path) -> None:
    with Journal(path) as journal:
        journal.refuse("a.tif", "1", "damaged")
        journal.finish("b.tif", "1", "job", {"windows": 2})
        assert (journal.refusal("a.tif", "1"), journal.refusal("a.tif", "2"), journal.refusal("b.tif", "1")) == (
            "damaged",
            None,
            None,
        )
        assert journal.finished("b.tif", "1", "job") == {"windows": 2}
        assert journal.finished("b.tif", "2", "job") is None
        assert journal.finished("b.tif", "1", "another job") is None


def test_names_that_are_no_utf8_are_kept(path: Path) -> None:
    odd = "gr\udcf6sse.tif"
    with Journal(path) as journal:
        journal.refuse(odd, f"{odd} 1", f"{odd} is damaged")
        journal.finish(odd, f"{odd} 1", "job", {"source": odd, "files": {odd: 1}})
        journal.fail(KEY, window(0), f"{odd} failed")
        assert journal.refusal(odd, f"{odd} 1") == f"{odd} is damaged"
        assert journal.finished(odd, f"{odd} 1", "job") == {"source": odd, "files": {odd: 1}}
        assert journal.files_of(odd) == (odd,)
        assert journal.failures(KEY) == {window(0).window: Failure(1, f"{odd} failed")}


def test_lowered_limits_stay_with_their_job_and_are_forgotten_on_request(path: Path) -> None:
    with Journal(path) as journal:
        journal.lower("job", Limits(2, None), "first")
        journal.lower("job", Limits(1, 128), "second")
        journal.fail(KEY, window(0), "reason")
        assert journal.lowered("job") == [(Limits(2, None), "first"), (Limits(1, 128), "second")]
        assert journal.lowered("another") == []
        journal.add(KEY, [record(1)], **TOOK)
        journal.forget_failures()
        assert (journal.lowered("job"), journal.failures(KEY)) == ([], {})
        assert len(journal.answers(KEY)) == 1


def test_the_pace_adds_up_over_scenes_and_runs_of_one_job(path: Path) -> None:
    records = [record(0), record(1)]
    first, second = Pace.of(records, 3.0, 50), Pace.of(records[:1], 1.5, 40)
    assert first == Pace(2, 2 * 128, 3.0, 128, 14, 6, 50)
    with Journal(path) as journal:
        assert journal.pace("job") == Pace()
        journal.add(KEY, records, budget=None, job_hash="job", pace=first)
    with Journal(path) as journal:
        journal.add(OTHERS[0], records[:1], budget=None, job_hash="job", pace=second)
        journal.add(OTHERS[1], records, budget=None, job_hash="another", pace=first)
        assert journal.pace("job") == Pace(3, 3 * 128, 4.5, 192, 21, 9, 50)
        assert journal.pace("another") == first


def test_a_second_process_is_told_that_the_folder_is_in_use_and_a_killed_one_lets_go(path: Path) -> None:
    held = (
        "import sys, time; from pathlib import Path; from rsvlm_infer.scenes.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", held, str(path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(
            JournalError, match=r"out is in use by another rsvlm process; wait for it, or choose another folder"
        ):
            Journal(path)
    finally:
        process.kill()
        process.wait()
    with Journal(path) as journal:
        assert journal.answers(KEY) == {}


def test_a_file_that_is_no_journal_or_of_another_version_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is a text of some length, and no database at all" * 40)
    with pytest.raises(JournalError, match=r"journal .*journal\.sqlite is damaged .*; delete it to start again"):
        Journal(path)
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE something (x)")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(JournalError, match="must be of version 1, got 99; delete it"):
        Journal(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"output folder .*file.* cannot be made"):
        Journal(tmp_path / "file" / "out" / "journal.sqlite")
