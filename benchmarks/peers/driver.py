"""Runs the workers: one process each, all loaded, asked in turn so that every round meets the same machine. Knows no library."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPLY_S = 600.0  # a worker that says nothing for so long is ended
REST_S = 0.2  # between workers: idle threads of the last one may still spin
SELDOM = {"mixed padded": 3}  # works that take long: rounds at most


@dataclass
class Measured:
    """What one worker gave: seconds of each named time by round, and what came with them."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    facts: dict[str, dict[str, Any]] = field(
        default_factory=lambda: defaultdict(dict)
    )  # of each name: first answer's other values
    counts: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )  # drafted, accepted
    errors: dict[str, str] = field(default_factory=dict)

    def record(self, work: str, answer: Mapping[str, Any], *, warming: bool) -> None:
        """One answer; the warming round's times do not count, its tokens and memory do."""
        if "error" in answer:
            self.errors.setdefault(work, str(answer["error"]))
            return
        for name, seconds in answer["seconds"].items():
            known = self.facts[name]
            for key in ("tokens", "cosine", "peak_rss_bytes"):
                if key in answer:
                    known.setdefault(key, answer[key])
            if not warming:
                self.seconds[name].append(seconds)
        for key in ("drafted", "accepted"):
            if key in answer and not warming:
                self.counts[work][key] += answer[key]


class Worker:
    """One process that answers JSON lines."""

    def __init__(self, command: Sequence[str], root: Path, environment: Mapping[str, str], log: Path) -> None:
        with log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=root,
                env=dict(environment),
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._answer(REPLY_S)

    @property
    def works(self) -> list[str]:
        """What it can measure; nothing when it did not start."""
        return list(self.ready.get("works", []))

    def ask(self, work: str, round_index: int, timeout_s: float = REPLY_S) -> dict[str, Any]:
        """One measurement, or `{"error": ...}`."""
        if self.process.poll() is not None or self.process.stdin is None:
            return {"error": f"its process ended with status {self.process.returncode}"}
        try:
            self.process.stdin.write(json.dumps({"work": work, "round": round_index}) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            return {"error": f"its process takes no requests ({error})"}
        return self._answer(timeout_s)

    def close(self) -> None:
        """Ends the process: closing its stdin asks it to, then it is killed."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.process.kill()
            return {"error": f"no answer in {timeout_s:.0f} s"}
        if not line:
            return {"error": f"its process ended with status {self.process.wait()}; see its log"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def worker_environment(threads: int, root: Path, ours: bool) -> dict[str, str]:
    """The same number of threads for everybody; only our own worker sees our packages."""
    paths = [str(root), str(root / "export")] if ours else [str(root)]
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def run_rounds(workers: Mapping[str, Worker], rounds: int, minutes: float, between: Any = None) -> dict[str, Measured]:
    """A warming round, then `rounds` that count, fewer when the next one would not end within `minutes`.

    between: called before each round that counts, to measure the machine itself.
    """
    measured = {name: Measured() for name in workers}
    started = time.monotonic()
    longest = 0.0
    for round_index in range(rounds + 1):
        begun = time.monotonic()
        if round_index > 1 and begun - started + longest > minutes * 60:
            print(f"stopping after {round_index - 1} rounds: another would not end within {minutes:g} minutes", file=sys.stderr)
            break
        if round_index and between is not None:
            between()
        for name, worker in workers.items():
            for work in worker.works:
                if round_index <= SELDOM.get(work, rounds) and work not in measured[name].errors:
                    measured[name].record(work, worker.ask(work, round_index), warming=round_index == 0)
            time.sleep(REST_S)
        longest = max(longest, time.monotonic() - begun) if round_index > 1 else time.monotonic() - begun
        print(f"round {round_index} of {rounds}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return measured
