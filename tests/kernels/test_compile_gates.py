"""The table of compiled kernels is complete, within every limit, and what the compiler gives today (one chip; `make gates`: all)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsvlm_infer.hardware import library_version

pytestmark = pytest.mark.skipif(library_version("triton") is None, reason="triton is not installed")


def _gates(repository: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.compile_gates", *arguments]
    finished = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def test_the_table_has_every_shipped_kernel_within_its_limits(repository: Path) -> None:
    _gates(repository, "--table-only")


@pytest.mark.slow
def test_the_compiler_agrees_with_the_table(repository: Path) -> None:
    _gates(repository, "--chips", "90")
