"""Runs a job over fake scenes in a process of its own and, when told so, kills it with SIGKILL at a moment that the job cannot foresee."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rsvlm_infer.scenes.job import Job, run_job
from rsvlm_infer.scenes.worker import LocalWorkers
from tests.scenes.fake_scenes import FakeOpener

MICRO_BATCH = 4
PAUSE_S = 0.002


class DyingOpener(FakeOpener):
    """Kills its process `delay_s` after the job's call number `last_call`; call 0 is the job's start."""

    last_call = -1
    delay_s = 0.0
    made = 0

    def note(self, source: str, indices: Sequence[int], budget: int) -> None:
        super().note(source, indices, budget)
        self.made += 1
        self.tick()

    def tick(self) -> None:
        """Starts to die when it is time."""
        if self.made == self.last_call:
            killer = threading.Timer(self.delay_s, lambda: os.kill(os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()


def main(output: str, log: str, last_call: str, delay_s: str, *scenes: str) -> None:
    """last_call: -1 = never."""
    opener = DyingOpener(
        Path(log), pause_s=PAUSE_S, memory_windows=3
    )  # a micro-batch of four does not fit: limits are journaled too
    opener.last_call, opener.delay_s = int(last_call), float(delay_s)
    opener.tick()
    result = run_job(Job(scenes=scenes, output=Path(output), job_hash="job", micro_batch=MICRO_BATCH), LocalWorkers(opener))
    sys.stdout.write(f"{result.answered} {len(result.quarantined)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
