"""kill -9 at twenty random points, then resume: the same bytes, and nothing asked twice but what was in flight."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.scenes.fake_scenes import write_fake
from tests.scenes.folders import contents

KILLS = 20
WINDOWS = (150, 90, 0, 120)
BROKEN = (3, 70)


def run(
    output: Path, log: Path, scenes: list[str], last_call: int = -1, delay_s: float = 0.0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.scenes.killed_job", str(output), str(log), str(last_call), str(delay_s), *scenes]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def calls(log: Path) -> list[tuple[str, list[int]]]:
    return [(name, indices) for name, indices, _ in map(json.loads, log.read_text().splitlines())] if log.exists() else []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_twenty_kills_change_no_byte_and_repeat_at_most_what_was_in_flight(tmp_path: Path) -> None:
    scenes = [write_fake(tmp_path / f"scene{i}.json", count, broken=BROKEN) for i, count in enumerate(WINDOWS)]
    scenes.append(str(tmp_path / "corrupt.json"))
    Path(scenes[-1]).write_text("{")

    plain = run(tmp_path / "plain", tmp_path / "plain.log", scenes)
    # windows 3 and 70 of three scenes; one file
    assert (plain.returncode, plain.stdout) == (0, f"{sum(WINDOWS) - 6} 7\n"), plain.stderr
    expected = Counter((name, index) for name, indices in calls(tmp_path / "plain.log") for index in indices)

    # twenty points of the whole job, counted in calls, so that they do not depend on the machine's speed; then some milliseconds, so that
    # they fall into answering, the journal's commit, opening, and the writing of files alike
    total = len(calls(tmp_path / "plain.log"))
    rng = random.Random(6)
    points = [0, *sorted(rng.sample(range(1, total * 3 // 4), KILLS - 1))]
    steps = [points[0], *(later - earlier for earlier, later in itertools.pairwise(points))]
    out, log = tmp_path / "out", tmp_path / "killed.log"
    seen: list[int] = []
    for number, step in enumerate(steps, start=1):
        killed = run(out, log, scenes, step, rng.uniform(0.0, 0.008))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        seen.append(len(calls(log)))
        asked = Counter((name, index) for name, indices in calls(log) for index in indices)
        assert sum((asked - expected).values()) <= 4 * number  # each kill repeats one micro-batch at most
    assert len(set(seen)) > KILLS // 2  # they fell at different points
    assert seen[0] < total // 2 < seen[-1]  # over the whole job
    last = run(out, log, scenes)
    assert (last.returncode, last.stdout) == (0, plain.stdout), last.stderr

    assert contents(out) == contents(tmp_path / "plain")
    assert len(contents(out)) == 2 * len(WINDOWS) + 1
    asked = Counter((name, index) for name, indices in calls(log) for index in indices)
    assert set(asked) == set(expected)
    assert sum((asked - expected).values()) <= 4 * KILLS
    again = len(calls(log))
    assert run(out, log, scenes).stdout == plain.stdout
    assert len(calls(log)) == again
