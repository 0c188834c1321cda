"""Peak memory of planning and packing one file, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import json, sys
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.pack import pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.source import open_scene
from tests.imagery.configs import imagery_config
peaks = {}
for tiling in ("dris", "anyres", "fixed"):
    config = imagery_config(tiling)
    with open_scene(sys.argv[1]) as scene:
        complexity = ComplexityMap(*scene.overview(), config=config.dris)
        plan = plan_scene(scene.height, scene.width, config, complexity=None if sys.argv[2] else complexity)
        pack_scene(scene, plan, config)
    # not ru_maxrss: that one begins at the size of the process which started this one
    peaks[tiling] = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps(peaks))
"""


def peak_mib(path: Path, repository: Path, longest_plan: bool = False) -> dict[str, float]:
    """Peak resident MiB of a fresh process that plans and packs `path` in each tiling."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    command = [sys.executable, "-c", MEASURE, str(path), "1" if longest_plan else ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    assert done.stderr == ""
    peaks: dict[str, float] = json.loads(done.stdout)
    return peaks
