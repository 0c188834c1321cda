"""Owns a job's workers on a Ray cluster: one process with one model each, tasks out, outcomes back. Knows no journal and no model.

The process that started the job hands out the tasks and alone writes the journal and the files; workers only read scenes and answer.
Actors and not Ray Data: the job must hear of each micro-batch by itself and decide what comes next; a pipeline has its own rules.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, MissingDependencyError
from ..hardware import library_version
from .job import JobError
from .worker import Outcome, SceneOpener, Task, Trouble, Worker, reason_of, trouble_of

QUEUED = 2  # tasks at a worker: one that runs, and one so that it never waits for the driver
STORE_BYTES = 128 << 20  # windows and records are small: a local cluster need not take Ray's 30 % of the memory
LOAD_S = 600.0


def ray_why_not() -> str | None:
    """Why jobs cannot run on Ray here; None when they can."""
    if library_version("ray") is None:
        return "ray is not installed; run pip install 'rsvlm-infer[ray]', or leave out --engine ray"
    return None


class ClusterWorker:
    """What runs in a worker's process: loads its model when it is first asked whether it is ready."""

    def __init__(self, load: Callable[[], SceneOpener]) -> None:
        self._load = load
        self._worker: Worker | None = None

    def ready(self) -> tuple[Trouble, str] | None:
        """Loads the model; what went wrong, or None."""
        try:
            self._worker = Worker(self._load(), keep=2)  # two: at the end of one scene the next one begins
        except Exception as error:
            return trouble_of(error), reason_of(error)
        return None

    def do(self, task: Task) -> Outcome:
        """See `Worker.do`."""
        assert self._worker is not None  # the driver waits for `ready`
        return self._worker.do(task)


@dataclass
class _Seat:
    """One worker as the driver sees it: its tasks with Ray's references, in the order in which it does them."""

    actor: Any
    tasks: deque[tuple[Any, Task]] = field(default_factory=deque)
    last_source: str = ""


class RayWorkers:
    """`count` workers on a Ray cluster.

    load: makes a worker's model, in the worker's process; a function that every machine can import. address: of a running cluster,
    "auto" for the one that this machine belongs to; None starts a cluster on this machine, which ends with `close`. cpus, gpus: what a
    worker takes.

    Raises:
        MissingDependencyError: ray is not installed. InputError: no worker asked for. JobError: no cluster, or a worker cannot load.
    """

    def __init__(
        self, load: Callable[[], SceneOpener], count: int, *, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        if reason := ray_why_not():
            raise MissingDependencyError(reason)
        if count < 1:
            raise InputError(f"workers must be at least 1, got {count}; leave it out for one worker per core")
        self._ray: Any = importlib.import_module("ray")
        self._load, self._cpus, self._gpus = load, cpus, gpus
        self._owns_ray = not self._ray.is_initialized()
        self.capacity = count * QUEUED
        if self._owns_ray:
            self._connect(address, count)
        self._seats = [_Seat(self._actor()) for _ in range(count)]
        try:
            self._wait_until_ready(self._seats)
        except BaseException:
            self.close()
            raise

    def submit(self, task: Task) -> None:
        """To the worker with the least to do, of these to one that has the scene open."""
        seat = min(self._seats, key=lambda each: (len(each.tasks), each.last_source != task.source))
        seat.tasks.append((seat.actor.do.remote(task), task))
        seat.last_source = task.source

    def next(self) -> Outcome:
        references = {seat.tasks[0][0]: seat for seat in self._seats if seat.tasks}
        (done, *_), _ = self._ray.wait(list(references), num_returns=1)
        seat = references[done]
        try:
            outcome: Outcome = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            return self._replace(seat, error)
        seat.tasks.popleft()
        return outcome

    def close(self) -> None:
        """Ends the workers; models go with them."""
        for seat in self._seats:
            self._ray.kill(seat.actor)
        if self._owns_ray:
            self._ray.shutdown()

    def _connect(self, address: str | None, count: int) -> None:
        local = {"num_cpus": max(1, round(count * self._cpus)), "object_store_memory": STORE_BYTES, "include_dashboard": False}
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is None:
                # "local": without it, RAY_ADDRESS or a cluster that happens to run here would be joined unasked
                self._ray.init(address="local", **quiet, **local)
            else:
                self._ray.init(address=address, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise JobError(
                f"Ray cluster {address or 'on this machine'} cannot be reached ({reason_of(error)}); start one with `ray start --head`, "
                "or leave out --ray-address"
            ) from None

    def _actor(self) -> Any:
        return (
            self._ray.remote(ClusterWorker).options(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0).remote(self._load)
        )

    def _wait_until_ready(self, seats: list[_Seat]) -> None:
        pending = [seat.actor.ready.remote() for seat in seats]
        try:
            for trouble in self._ray.get(pending, timeout=LOAD_S):
                if trouble is not None:
                    raise JobError(f"a worker cannot load its model: {trouble[1]}")
        except self._ray.exceptions.GetTimeoutError:
            raise JobError(
                f"{len(seats)} workers of {self._cpus:g} CPUs and {self._gpus:g} GPUs must be ready within {LOAD_S:.0f} s and were not; "
                "ask for fewer with --workers, or see `ray status`"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise JobError(
                f"a worker ended while it loaded its model ({_first_line(error)}); see its log on the cluster"
            ) from None

    def _replace(self, seat: _Seat, error: BaseException) -> Outcome:
        """A worker died: the task that it was doing failed, those behind it go to its successor."""
        (_, task), *behind = seat.tasks
        words = str(error).lower()
        memory = trouble_of(error) == "memory" or "low on memory" in words or "oom" in words.split()
        seat.actor, seat.last_source = self._actor(), ""
        self._wait_until_ready([seat])
        seat.tasks = deque((seat.actor.do.remote(each), each) for _, each in behind)
        return Outcome(task, trouble="memory" if memory else "other", reason=f"its worker died ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    """Ray's messages are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
