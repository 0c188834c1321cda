"""Where a result comes from: machine, packages, commit, date, command line. Knows no model and no result."""

from __future__ import annotations

import datetime as dt
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..hardware import probe

BUSY_SHARE = 0.5  # load average per core from which other programs visibly slow a run down


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """JSON values that describe this machine, this code and this call; `argv` are the arguments after the command's name."""
    hardware = probe(gpu=True).to_dict()
    packages = {name: version for name, version in hardware.pop("libraries").items() if version is not None}
    python = hardware.pop("python")
    values = {
        "machine": hardware,
        "python": python,
        "rsvlm_infer": __version__,
        "packages": packages,
        "git": git_state(Path(__file__).parent),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "rsvlm_infer.bench", *argv]),
        "load_average": load_average(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists, as they are in a file
    return plain


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in `folder` and whether it was changed since; None outside a repository or without git."""
    try:
        # an installed package may lie inside somebody else's repository (a venv): only a tracked file counts
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return {"commit": _git(folder, "rev-parse", "HEAD"), "changed": bool(_git(folder, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def load_average() -> float | None:
    """Runnable processes in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy_warning(environment: dict[str, Any]) -> str | None:
    """Says so when the machine had other work before the run began."""
    load, cores = environment["load_average"], environment["machine"]["cores"]
    if load is None or load <= BUSY_SHARE * cores:
        return None
    return f"the machine was busy before the run (load {load} on {cores} cores): times are too long and scatter more"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
