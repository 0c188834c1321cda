"""Adds scenes to an archive and is killed at a chosen write to disk: python -m tests.index.killed_writer FOLDER WRITES [merge].

With merge the scenes are there already, and the archive is merged.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.index.archives import ENCODING, FEATURES, scene, view, writer

SCENES = 6


def main() -> None:
    """Every rename, every fsync and every removal counts as one step; at step WRITES the process is killed as by kill -9."""
    folder, left = Path(sys.argv[1]), int(sys.argv[2])
    replace, fsync, unlink = Path.replace, os.fsync, os.unlink

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

    def counted_unlink(*given: Any, **options: Any) -> None:
        step()
        unlink(*given, **options)

    Path.replace = counted_replace  # type: ignore[method-assign, assignment]
    os.fsync, os.unlink = counted_fsync, counted_unlink  # type: ignore[assignment]
    with writer(folder, encoding={**ENCODING, "features": FEATURES}) as open_writer:
        if sys.argv[3:] == ["merge"]:
            open_writer.merge()
            return
        for index in range(SCENES):
            if open_writer.source_of(scene(str(index)).content_hash) is None:
                open_writer.add(scene(str(index)), [view(np.random.default_rng(index), patches=4)])
                open_writer.close_segment()


if __name__ == "__main__":
    main()
