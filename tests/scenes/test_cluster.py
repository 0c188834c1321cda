"""The same job on a local Ray cluster of two workers: the same bytes, the driver alone writes, workers may die."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from rsvlm_infer.errors import CheckpointError, InputError, MissingDependencyError
from rsvlm_infer.scenes import cluster
from rsvlm_infer.scenes.cluster import RayWorkers, ray_why_not
from rsvlm_infer.scenes.job import Job, JobError, JobResult, run_job
from rsvlm_infer.scenes.worker import LocalWorkers
from tests.conftest import REPOSITORY
from tests.scenes.fake_scenes import FakeOpener, FakeRun, write_fake
from tests.scenes.folders import contents


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "library_version", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"rsvlm-infer\[ray\]"):
        RayWorkers(lambda: FakeOpener(Path("log")), 1)


class DyingRun(FakeRun):
    """Ends its whole process at some windows: always, or once."""

    def answer(self, windows: Sequence) -> list:  # type: ignore[type-arg]
        for window in windows:
            if window.index in self.values.get("deadly", ()):
                os.kill(os.getpid(), signal.SIGKILL)
            mark = Path(f"{self.source}.{window.index}")
            if window.index in self.values.get("deadly_once", ()) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(windows)


class DyingOpener(FakeOpener):
    def open(self, source: str, budget: int | None) -> FakeRun:
        plain = super().open(source, budget)
        return DyingRun(self, source, plain.budget, plain.values)


def load(log: Path, memory_windows: int = 1000, pause_s: float = 0.005) -> FakeOpener:
    return DyingOpener(log.with_name(f"{log.name}.{os.getpid()}"), pause_s=pause_s, memory_windows=memory_windows)


def refuse() -> FakeOpener:
    raise CheckpointError("no checkpoint here; run rsvlm pull")


def calls(log: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """What each process answered."""
    found = log.parent.glob(f"{log.name}.*")
    return {path.name: [tuple(json.loads(line)[:2]) for line in path.read_text().splitlines()] for path in found}


needs_ray = pytest.mark.skipif(ray_why_not() is not None, reason=str(ray_why_not()))


@pytest.fixture(scope="module")
def ray_is_up() -> Iterator[None]:
    """One local cluster for the whole module, because starting it takes seconds."""
    ray = importlib.import_module("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{before or ''}"  # workers import this file
    ray.init(address="local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def on_ray(output: Path, scenes: Sequence[str], loader: Callable[[], FakeOpener]) -> JobResult:
    workers = RayWorkers(loader, 2)
    try:
        return run_job(Job(scenes=tuple(scenes), output=output, job_hash="job"), workers)
    finally:
        workers.close()


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_is_up")
class TestOnRay:
    def test_two_workers_share_the_windows_and_write_the_same_bytes(self, tmp_path: Path) -> None:
        scenes = [write_fake(tmp_path / f"scene{i}.json", count, broken=[2]) for i, count in enumerate((40, 0, 1, 33))]
        (tmp_path / "bad.json").write_text("{")
        scenes.insert(1, str(tmp_path / "bad.json"))
        local = run_job(
            Job(scenes=tuple(scenes), output=tmp_path / "local", job_hash="job"),
            LocalWorkers(FakeOpener(tmp_path / "local.log")),
        )
        # slow windows: a worker that a busy machine halts for half a second must not leave the other one everything
        result = on_ray(tmp_path / "ray", scenes, functools.partial(load, tmp_path / "log", pause_s=0.02))
        assert result == local
        assert len(result.quarantined) == 3
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")
        by_process = calls(tmp_path / "log")
        assert len(by_process) == 2
        assert min(len(each) for each in by_process.values()) >= 5
        again = on_ray(tmp_path / "ray", scenes, functools.partial(load, tmp_path / "log again"))
        assert (again.computed, calls(tmp_path / "log again")) == (0, {})

    def test_a_job_that_began_here_goes_on_there(self, tmp_path: Path) -> None:
        first, second = write_fake(tmp_path / "a.json", 10), write_fake(tmp_path / "b.json", 9)
        run_job(Job(scenes=(first,), output=tmp_path / "out", job_hash="job"), LocalWorkers(FakeOpener(tmp_path / "local.log")))
        result = on_ray(tmp_path / "out", [first, second], functools.partial(load, tmp_path / "log"))
        assert (result.answered, result.computed) == (19, 9)
        assert {name for each in calls(tmp_path / "log").values() for name, _ in each} == {"b.json"}

    def test_little_memory_on_the_workers_changes_no_byte(self, tmp_path: Path) -> None:
        scenes = [write_fake(tmp_path / "a.json", 13)]
        run_job(
            Job(scenes=tuple(scenes), output=tmp_path / "local", job_hash="job"), LocalWorkers(FakeOpener(tmp_path / "l.log"))
        )
        result = on_ray(tmp_path / "ray", scenes, functools.partial(load, tmp_path / "log", memory_windows=1))
        assert result.lowered == (
            "out of memory with 4 windows at a time; 2 from now on",
            "out of memory with 2 windows at a time; 1 from now on",
        )
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")

    def test_a_worker_that_dies_is_replaced_and_its_window_tried_three_times(self, tmp_path: Path) -> None:
        scene = write_fake(tmp_path / "a.json", 8, deadly=[1], deadly_once=[6])
        result = on_ray(tmp_path / "out", [scene], functools.partial(load, tmp_path / "log"))
        (listed,) = result.quarantined
        assert (listed.window is not None and listed.window.row_off, listed.attempts) == (100, 3)
        assert listed.reason.startswith("its worker died (")
        assert (result.windows, result.answered) == (8, 7)

    def test_a_worker_that_cannot_load_or_does_not_fit_stops_the_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(JobError, match="a worker cannot load its model: no checkpoint here; run rsvlm pull"):
            RayWorkers(refuse, 2)
        with pytest.raises(InputError, match="workers must be at least 1, got 0"):
            RayWorkers(refuse, 0)
        monkeypatch.setattr(cluster, "LOAD_S", 2.0)
        with pytest.raises(JobError, match="1 workers of 64 CPUs and 0 GPUs must be ready within 2 s"):
            RayWorkers(refuse, 1, cpus=64.0)
