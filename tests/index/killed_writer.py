"""Adds scenes to an archive and is killed at a chosen write to disk: python -m tests.index.killed_writer FOLDER WRITES."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from tests.index.archives import scene, view, writer

SCENES = 6


def main() -> None:
    """Every rename and every fsync counts as one step; at step WRITES the process is killed as by kill -9."""
    folder, left = Path(sys.argv[1]), int(sys.argv[2])
    replace, fsync = Path.replace, os.fsync

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(self: Path, target: Path) -> Path:
        step()
        return replace(self, target)

    def counted_fsync(handle: int) -> None:
        step()
        fsync(handle)

    Path.replace = counted_replace  # type: ignore[method-assign, assignment]
    os.fsync = counted_fsync
    with writer(folder) as open_writer:
        for index in range(SCENES):
            if open_writer.source_of(scene(str(index)).content_hash) is None:
                open_writer.add(scene(str(index)), [view(np.random.default_rng(index))])
                open_writer.close_segment()


if __name__ == "__main__":
    main()
