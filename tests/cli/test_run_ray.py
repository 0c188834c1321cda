"""`rsvlm run --engine ray` with real weights, tiny and random: two workers write the bytes that one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.models.checkpoint import save_checkpoint
from rsvlm_infer.scenes.cluster import ray_why_not
from tests.conftest import REPOSITORY
from tests.models.tiny import random_model
from tests.scenes.folders import contents
from tests.tasks.telling_model import telling_config, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(ray_why_not() is not None, reason=str(ray_why_not()))]


def run(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "rsvlm_infer", "run", str(job), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_two_workers_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    config = telling_config()
    folder = save_checkpoint(tmp_path / "model", config, random_model(config).state_dict())
    write_tokenizer(folder)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (84, 140, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    job = tmp_path / "job.toml"
    lines = ['scenes = "*.png"', 'checkpoint = "model"', "window = 28", "overlap = 4", "max_new_tokens = 8", "micro_batch = 2"]
    written = []
    for engine, output in (("local", "here"), ("ray", "there")):
        job.write_text("\n".join([*lines, f'output = "{output}"']))
        arguments = ["--workers", "2"] if engine == "ray" else []
        done = run(job, "--engine", engine, *arguments)
        assert done.returncode == 3, done.stderr
        assert done.stdout == f"{tmp_path / output}\t72 of 72 windows of 4 scenes answered, 72 of them now\n"
        assert done.stderr.count("quarantined") == done.stderr.count("broken.png") == 1, done.stderr
        assert all(line.startswith("rsvlm: ") for line in done.stderr.splitlines()), done.stderr  # Ray says nothing of its own
        written.append(contents(tmp_path / output))
    assert len(written[0]) == 7
    assert len(set(written[0]["a/records.jsonl"].split(b"\n"))) == 25  # 24 windows, all different, and an end
    assert written[0] == written[1]
    again = run(job, "--engine", "ray", "--workers", "2")
    assert "72 of 72 windows of 4 scenes answered, 0 of them now" in again.stdout
