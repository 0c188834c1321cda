"""What a job will take: counted exactly where it can be, measured otherwise, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.scenes.estimate import NOTHING_MEASURED, estimate_job
from rsvlm_infer.scenes.job import Job, JobError, run_job
from rsvlm_infer.scenes.worker import LocalWorkers, Worker
from tests.scenes.fake_scenes import FakeOpener, write_fake


def make_job(tmp_path: Path, *scenes: str, budget: int | None = None) -> Job:
    return Job(scenes=scenes, output=tmp_path / "out", job_hash="job", micro_batch=3, budget=budget)


def test_windows_are_counted_and_the_rest_follows_from_one_micro_batch(tmp_path: Path) -> None:
    opener = FakeOpener(tmp_path / "log", pause_s=0.01)
    (tmp_path / "bad.json").write_text("{")
    scenes = [write_fake(tmp_path / "a.json", 2), str(tmp_path / "bad.json"), write_fake(tmp_path / "b.json", 18)]
    seen: list[int] = []
    found = estimate_job(make_job(tmp_path, *scenes), Worker(opener), lambda: seen.append(1))
    assert len(seen) == 3
    assert (found.scenes, found.windows, found.answered, found.pixels, found.area_m2) == (3, 20, 0, 200_000, 200_000 * 100.0)
    assert (found.visual_tokens, found.at_most_visual_tokens, found.prompt_tokens, found.new_tokens) == (5120, 5120, 200, 100)
    assert found.seconds is not None
    assert 20 * 0.01 <= found.seconds < 20 * 0.1
    assert found.peak_rss_bytes is None or found.peak_rss_bytes > 1 << 20
    assert found.measured == f"3 windows of {scenes[2]}, answered just now"
    assert [each.source for each in found.quarantined] == [scenes[1]]
    assert [indices for _, indices, _ in opener.calls()] == [[7], [7, 8, 9]]  # a warm-up, then the middle
    assert not (tmp_path / "out").exists()


def test_a_journal_gives_the_pace_and_what_is_left(tmp_path: Path) -> None:
    opener = FakeOpener(tmp_path / "log", pause_s=0.02)
    first, second = write_fake(tmp_path / "a.json", 4), write_fake(tmp_path / "b.json", 6, gsd=None)
    run_job(make_job(tmp_path, first, budget=128), LocalWorkers(opener))
    calls = len(opener.calls())
    found = estimate_job(make_job(tmp_path, first, second, budget=128), Worker(opener))
    assert len(opener.calls()) == calls
    assert (found.windows, found.answered, found.visual_tokens, found.at_most_visual_tokens) == (10, 4, 6 * 128, 6 * 128)
    assert found.area_m2 is None
    assert found.measured == "4 windows in the journal"
    assert found.seconds == pytest.approx(6 * 0.02, rel=0.5)
    done = estimate_job(make_job(tmp_path, first, budget=128), Worker(opener))
    assert (done.windows, done.answered, done.seconds) == (4, 4, 0.0)


def test_without_a_window_nothing_is_measured(tmp_path: Path) -> None:
    found = estimate_job(make_job(tmp_path, write_fake(tmp_path / "a.json", 0)), Worker(FakeOpener(tmp_path / "log")))
    assert (found.windows, found.seconds, found.visual_tokens, found.measured) == (0, None, None, NOTHING_MEASURED)


def test_a_window_that_fails_cannot_be_measured(tmp_path: Path) -> None:
    scene = write_fake(tmp_path / "a.json", 1, broken=[0])
    with pytest.raises(JobError, match=r"window 0 of .*a\.json cannot be answered \(RuntimeError: window 0 is broken\)"):
        estimate_job(make_job(tmp_path, scene), Worker(FakeOpener(tmp_path / "log")))
