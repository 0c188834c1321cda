"""The package installs without a compiler, says what is slower, and carries its data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """What a build reads, copied, because a build writes into its source tree."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, target)
    shutil.copytree(REPOSITORY / "csrc", target / "csrc")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "rsvlm_infer", target / "rsvlm_infer", ignore=ignored)
    shutil.copytree(REPOSITORY / "export", target / "export", ignore=ignored)
    return target


def test_installs_without_a_compiler(source_copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("pybind11", reason="pybind11 is not installed (needed to build without isolation)")
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [*command, str(tmp_path / "wheels"), str(source_copy)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "rsvlm_infer._C was not built" in said
    assert "pack_tiles" in said
    assert "complexity_map" in said

    (wheel,) = (tmp_path / "wheels").glob("rsvlm_infer-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.endswith(".so") for name in names)
    assert {"rsvlm_infer/py.typed", "rsvlm_infer/_C.pyi", "rsvlm_infer/__init__.py"} <= names
    assert {"rsvlm_export/py.typed", "rsvlm_export/contract.py", "rsvlm_export/onnx/builder.py"} <= names
    shipped = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "rsvlm_infer").rglob("*") if path.is_file()]
    missing = {
        path.as_posix() for path in shipped if path.suffix not in (".so", ".pyc", ".pyd") and "__pycache__" not in path.parts
    } - names
    assert missing == set()
    assert not any(name.startswith(("tests/", "training/", "csrc/")) for name in names)
