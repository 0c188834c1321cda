"""RSVQA scenes and questions on any machine: out of a wheel that pip fetches and whose hash is pinned. Knows no model.

The wheel `configilm` 0.7.1 (MIT) carries 24 georeferenced RSVQA scenes with their official questions (CC-BY-4.0).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from ..errors import InputError
from ..models.checkpoint import sha256_of
from ..pipeline import default_checkpoint

WHEEL = "configilm-0.7.1-py3-none-any.whl"
REQUIREMENT = "configilm==0.7.1"
SHA256 = "54e8c2424c55bb4e68dfda07593e155e9ecfa6c60b50585c4b378076934cf5e3"
MEMBERS = "configilm/extra/mock_data/"
PARTS = ("RSVQA-LR/", "RSVQA-HR/")


def fetch_rsvqa(console: Console) -> Path:
    """The folder with RSVQA-LR and RSVQA-HR, unpacked once below $RSVLM_HOME.

    The wheel is taken from the folder RSVLM_WHEELS or from $RSVLM_HOME/wheels when it lies there, else downloaded by pip.

    Raises:
        InputError: pip cannot download the wheel, or it is not the pinned one.
    """
    home = default_checkpoint().parent
    folder = home / "images" / f"rsvqa-{SHA256[:12]}"
    if folder.is_dir():
        return folder
    wheel = _wheel(home / "wheels", console)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".rsvqa-") as unpacked:
        unpack(wheel, Path(unpacked) / "rsvqa")
        try:
            (Path(unpacked) / "rsvqa").rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """Writes the TIFFs and JSONs of both parts below `folder`.

    Raises:
        InputError: the file is not the pinned wheel.
    """
    found = sha256_of(wheel)
    if found != SHA256:
        raise InputError(f"{wheel} must have sha256 {SHA256}, got {found}; delete it and run again")
    with zipfile.ZipFile(wheel) as archive:
        for name in rsvqa_members(archive.namelist()):
            target = folder / name.removeprefix(MEMBERS)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def rsvqa_members(names: Iterable[str]) -> list[str]:
    """The members of the wheel that make up RSVQA."""
    starts = tuple(MEMBERS + part for part in PARTS)
    return [name for name in names if name.startswith(starts) and name.endswith((".json", ".tif")) and ".." not in name]


def _wheel(wheels: Path, console: Console) -> Path:
    for folder in (os.environ.get("RSVLM_WHEELS"), wheels):
        if folder and (Path(folder) / WHEEL).is_file():
            return Path(folder) / WHEEL
    console.print(f"fetching {REQUIREMENT} (53 MiB) for its RSVQA scenes", markup=False, highlight=False)
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as download:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            download,
            REQUIREMENT,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (Path(download) / WHEEL).is_file():
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(
                f"pip could not download {REQUIREMENT} ({reason}); pass --images DIR, or put {WHEEL} into {wheels}"
            )
        (Path(download) / WHEEL).replace(wheels / WHEEL)
    return wheels / WHEEL
