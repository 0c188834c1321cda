"""A job answers every window once, goes on where it stopped, and survives windows, scenes and memory that fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rsvlm_infer.errors import BackendError, InputError
from rsvlm_infer.scenes.job import Job, JobError, JobResult, Progress, run_job
from rsvlm_infer.scenes.journal import JournalError
from rsvlm_infer.scenes.record import PixelWindow, SceneHeader, WindowRecord
from rsvlm_infer.scenes.worker import LocalWorkers
from tests.scenes.fake_scenes import FakeOpener, FakeRun, write_fake
from tests.scenes.folders import contents


def run(
    tmp_path: Path, scenes: Sequence[str], opener: FakeOpener, *, retry: bool = False, output: str = "out", **job: object
) -> JobResult:
    values = {"micro_batch": 4, "job_hash": "job"} | job
    workers = LocalWorkers(opener)
    try:
        return run_job(Job(scenes=tuple(scenes), output=tmp_path / output, **values), workers, retry=retry)  # type: ignore[arg-type]
    finally:
        workers.close()


@pytest.fixture
def opener(tmp_path: Path) -> FakeOpener:
    return FakeOpener(tmp_path / "log.jsonl")


def texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "records.jsonl").read_text().splitlines()]


def test_every_window_of_every_scene_is_answered_once_in_micro_batches(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [
        write_fake(tmp_path / "a.json", 6),
        write_fake(tmp_path / "b.json", 3, gsd=2.0),
        write_fake(tmp_path / "none.json", 0),
    ]
    result = run(tmp_path, scenes, opener)
    assert (result.scenes, result.windows, result.answered, result.computed, result.quarantined, result.lowered) == (
        3,
        9,
        9,
        9,
        (),
        (),
    )
    assert [(name, indices) for name, indices, _ in opener.calls()] == [
        ("a.json", [0, 1, 2, 3]),
        ("a.json", [4, 5]),
        ("b.json", [0, 1, 2]),
    ]
    assert [len(texts(tmp_path / "out" / name)) for name in ("a", "b", "none")] == [6, 3, 0]
    assert opener.opened == opener.closed == 3
    report = json.loads((tmp_path / "out" / "job.json").read_text())
    assert [(each["folder"], each["windows"], each["answered"], each["pixels"]) for each in report["scenes"]] == [
        ("a", 6, 6, 60_000),
        ("b", 3, 3, 30_000),
        ("none", 0, 0, 0),
    ]


def test_a_finished_job_opens_no_scene_again_and_writes_lost_files_without_asking(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 6), write_fake(tmp_path / "b.json", 3)]
    first = run(tmp_path, scenes, opener)
    before = contents(tmp_path / "out")
    again = run(tmp_path, scenes, opener)
    assert (opener.opened, len(opener.calls())) == (2, 3)
    assert (again.answered, again.computed) == (first.answered, 0)
    (tmp_path / "out" / "b" / "records.jsonl").unlink()
    run(tmp_path, scenes, opener)
    assert (opener.opened, len(opener.calls())) == (3, 3)
    assert contents(tmp_path / "out") == before


def test_a_changed_scene_or_model_is_asked_again_and_equal_content_is_not(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 2), write_fake(tmp_path / "copy.json", 2)]
    assert run(tmp_path, scenes, opener).computed == 2  # both files hold the same
    assert texts(tmp_path / "out" / "a") == texts(tmp_path / "out" / "copy")
    write_fake(tmp_path / "a.json", 3)
    assert run(tmp_path, scenes, opener).computed == 3
    opener.model = "another"
    assert run(tmp_path, scenes, opener, job_hash="another").computed == 5


def test_a_window_that_fails_three_times_is_quarantined_listed_once_and_left_alone(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 6, broken=[1]), write_fake(tmp_path / "b.json", 2)]
    result = run(tmp_path, scenes, opener)
    (listed,) = result.quarantined
    assert (listed.source, listed.window, listed.attempts) == (scenes[0], PixelWindow(100, 0, 100, 100), 3)
    assert listed.reason == "RuntimeError: window 1 is broken"
    assert (result.windows, result.answered) == (8, 7)
    counts = Counter(index for name, indices, _ in opener.calls() for index in indices if name == "a.json")
    assert counts == {
        0: 2,
        1: 4,
        2: 2,
        3: 2,
        4: 1,
        5: 1,
    }  # its micro-batch once together, then one by one, and it alone three times
    order = [indices for name, indices, _ in opener.calls() if name == "a.json"]
    assert order[-2:] == [[1], [1]]  # behind the others
    report = json.loads((tmp_path / "out" / "job.json").read_text())
    assert report["quarantined"] == [listed.to_dict() | {"window": {"row_off": 100, "col_off": 0, "height": 100, "width": 100}}]
    calls = len(opener.calls())
    assert run(tmp_path, scenes, opener).quarantined == result.quarantined
    (tmp_path / "out" / "a" / "header.json").unlink()  # also when the scene is opened again
    assert run(tmp_path, scenes, opener).quarantined == result.quarantined
    assert len(opener.calls()) == calls
    assert run(tmp_path, scenes, opener, retry=True).quarantined == result.quarantined
    assert len(opener.calls()) == calls + 3


def test_a_window_that_fails_once_gets_its_answer(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 5, flaky=[2, 4])]
    result = run(tmp_path, scenes, opener)
    assert (result.answered, result.quarantined) == (5, ())
    flaky = texts(tmp_path / "out" / "a")
    assert [text.startswith("scene ") for text in flaky] == [True] * 5


def test_a_corrupt_or_absent_scene_is_quarantined_until_it_changes(tmp_path: Path, opener: FakeOpener) -> None:
    good, bad = write_fake(tmp_path / "good.json", 2), str(tmp_path / "bad.json")
    Path(bad).write_text("{")
    absent = str(tmp_path / "absent.json")
    result = run(tmp_path, [bad, good, absent], opener)
    assert [(each.source, each.window) for each in result.quarantined] == [(bad, None), (absent, None)]
    assert (result.windows, result.answered) == (2, 2)
    assert opener.opened == 3
    assert run(tmp_path, [bad, good, absent], opener).quarantined == result.quarantined
    assert opener.opened == 4  # the absent one may have come
    assert not (tmp_path / "out" / "bad").exists()
    write_fake(Path(bad), 1)
    write_fake(Path(absent), 1)
    mended = run(tmp_path, [bad, good, absent], opener)
    assert (mended.quarantined, mended.answered) == ((), 4)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_byte(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 11), write_fake(tmp_path / "b.json", 3)]
    run(tmp_path, scenes, opener, output="plain", micro_batch=8)
    small = FakeOpener(tmp_path / "small.jsonl", memory_windows=3)
    result = run(tmp_path, scenes, small, micro_batch=8)
    assert result.lowered == (
        "out of memory with 8 windows at a time; 4 from now on",
        "out of memory with 4 windows at a time; 2 from now on",
    )
    assert [len(indices) for _, indices, _ in small.calls()] == [8, 4, 2, 2, 2, 2, 2, 1, 2, 1]
    assert result.quarantined == ()
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_when_one_window_is_too_much_the_budget_is_halved_and_the_record_says_so(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 3)]
    opener.memory_windows, opener.memory_budget = 1, 100
    result = run(tmp_path, scenes, opener, micro_batch=2)
    assert result.lowered == (
        "out of memory with 2 windows at a time; 1 from now on",
        "out of memory with 256 visual tokens for a window; 128 from now on",
        "out of memory with 128 visual tokens for a window; 64 from now on",
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "a" / "records.jsonl").read_text().splitlines()]
    assert [line["num_visual_tokens"] for line in lines] == [64, 64, 64]
    assert {tuple(line["warnings"]) for line in lines} == {
        ("out of memory: answered with at most 64 visual tokens instead of 256",)
    }
    write_fake(tmp_path / "b.json", 1)
    more = run(tmp_path, [*scenes, str(tmp_path / "b.json")], opener, micro_batch=2)  # a later run knows it
    assert (opener.calls()[-1], more.computed, more.lowered) == (("b.json", [0], 64), 1, result.lowered)
    opener.memory_windows, opener.memory_budget = 10, 1000
    run(tmp_path, [*scenes, str(write_fake(tmp_path / "c.json", 2, gsd=None))], opener, micro_batch=2, retry=True)
    assert opener.calls()[-1] == ("c.json", [0, 1], 256)


def test_a_window_that_no_budget_helps_is_quarantined_and_the_rest_goes_on(tmp_path: Path, opener: FakeOpener) -> None:
    opener.memory_windows = 0
    result = run(tmp_path, [write_fake(tmp_path / "a.json", 2)], opener)
    assert [(each.attempts, each.reason) for each in result.quarantined] == [(3, "MemoryError")] * 2
    assert (result.windows, result.answered) == (2, 0)


def test_what_would_fail_for_every_scene_stops_the_job(
    tmp_path: Path, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeRun, windows: object) -> list[WindowRecord]:
        raise BackendError("no such device; choose another")

    monkeypatch.setattr(FakeRun, "answer", refuse)
    with pytest.raises(JobError, match="no such device; choose another"):
        run(tmp_path, [write_fake(tmp_path / "a.json", 2)], opener)


def test_a_scene_that_changes_while_the_job_runs_stops_it(tmp_path: Path, opener: FakeOpener) -> None:
    a = write_fake(tmp_path / "a.json", 4, broken=[0])
    plain = opener.note

    def note(source: str, indices: Sequence[int], budget: int) -> None:
        plain(source, indices, budget)
        if len(opener.calls()) == 2:
            write_fake(tmp_path / "a.json", 4)
            raise MemoryError  # closes the scene, so that the next micro-batch opens the changed file

    opener.note = note  # type: ignore[method-assign]
    with pytest.raises(JobError, match=r"the scene's content of .*a\.json must be the same for every worker"):
        run(tmp_path, [a], opener, micro_batch=2)


def test_formats_are_written_for_each_scene_and_again_when_they_change(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [write_fake(tmp_path / "a.json", 2), write_fake(tmp_path / "b.json", 1)]
    asked: list[tuple[str, int, str, tuple[str, ...]]] = []

    def write(header: SceneHeader, records: Sequence[WindowRecord], folder: Path, formats: Sequence[str]) -> list[Path]:
        asked.append((Path(header.source).name, len(records), folder.name, tuple(formats)))
        for name in formats:
            (folder / f"records.{name}").write_text("x")
        return [folder / f"records.{name}" for name in formats]

    def go(*formats: str) -> JobResult:
        job = Job(scenes=tuple(scenes), output=tmp_path / "out", job_hash="job", formats=formats)
        return run_job(job, LocalWorkers(opener), write_outputs=write)

    go("geojson")
    assert asked == [("a.json", 2, "a", ("geojson",)), ("b.json", 1, "b", ("geojson",))]
    go("geojson")
    assert len(asked) == 2
    (tmp_path / "out" / "a" / "records.geojson").unlink()
    go("geojson")
    assert len(asked) == 3
    assert go("html").computed == 0
    assert asked[3:] == [("a.json", 2, "a", ("html",)), ("b.json", 1, "b", ("html",))]
    assert len(opener.calls()) == 2


def test_files_of_a_format_that_is_no_longer_asked_for_go(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = (write_fake(tmp_path / "a.json", 2),)

    def write(header: SceneHeader, records: Sequence[WindowRecord], folder: Path, formats: Sequence[str]) -> list[Path]:
        (folder / f"records.{formats[0]}").write_text("x")
        return [folder / f"records.{formats[0]}"]

    for formats in (("geojson",), ("html",)):
        job = Job(scenes=scenes, output=tmp_path / "out", job_hash="job", formats=formats)
        run_job(job, LocalWorkers(opener), write_outputs=write)
        (tmp_path / "out" / "a" / "mine.txt").write_text("a file of the user")
    assert sorted(path.name for path in (tmp_path / "out" / "a").iterdir()) == [
        "header.json",
        "mine.txt",
        "records.html",
        "records.jsonl",
    ]


def test_progress_knows_pixels_ground_and_what_is_left(tmp_path: Path, opener: FakeOpener) -> None:
    scenes = [
        write_fake(tmp_path / "a.json", 4),
        write_fake(tmp_path / "b.json", 4, gsd=None),
        write_fake(tmp_path / "c.json", 4, x=1),
    ]
    seen: list[tuple[int, int, int, float]] = []

    def report(progress: Progress) -> None:
        seen.append((progress.answered, progress.known_px, progress.done_px, progress.expected_px))
        last.append(progress)

    last: list[Progress] = []
    run_job(Job(scenes=tuple(scenes), output=tmp_path / "out", job_hash="job"), LocalWorkers(opener), report=report)
    assert seen[0] == (0, 0, 0, 0.0)
    assert (4, 40_000, 40_000, 120_000.0) in seen
    assert seen[-1] == (12, 120_000, 120_000, 120_000.0)
    final = last[-1]
    assert final.computed_m2 == 2 * 40_000 * 10.0**2
    assert final.mpix_per_s is not None
    assert final.km2_per_s is not None
    assert final.km2_per_s / final.mpix_per_s == pytest.approx(80_000 * 100 / 120_000, rel=0.2)  # the clock runs between both
    assert final.eta_s == 0.0


def test_an_answer_for_another_window_is_refused(tmp_path: Path, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FakeRun.answer
    monkeypatch.setattr(FakeRun, "answer", lambda self, windows: plain(self, windows)[::-1])
    with pytest.raises(JobError, match="one record for each of 2 windows, in their order"):
        run(tmp_path, [write_fake(tmp_path / "a.json", 2)], opener)


def test_bad_limits_and_a_folder_in_use_are_refused(tmp_path: Path, opener: FakeOpener) -> None:
    for name in ("micro_batch", "budget"):
        with pytest.raises(InputError, match=f"{name} must be at least 1.*got 0"):
            Job(scenes=(), output=tmp_path, job_hash="job", **{name: 0})  # type: ignore[arg-type]
    scene = write_fake(tmp_path / "a.json", 2)

    def inside(progress: Progress) -> None:
        with pytest.raises(JournalError, match="in use by another rsvlm process"):
            run(tmp_path, [scene], opener)

    run_job(Job(scenes=(scene,), output=tmp_path / "out", job_hash="job"), LocalWorkers(opener), report=inside)
