"""An arrow may only point down, and the tree keeps its manners."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LARGEST_MODULE_LINES = 500
LARGEST_FILE_BYTES = 1 << 20
LARGEST_DELTA_BYTES = 60_000_000


@cache
def tracked_files() -> tuple[Path, ...]:
    """Files that git tracks or would add."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(REPOSITORY / name for name in listed if (REPOSITORY / name).is_file())


def modules() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def test_import_linter_keeps_the_floors() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "export")}  # also where rsvlm_export is not installed
    done = subprocess.run([command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_knows_no_python_and_no_torch() -> None:
    sources = [path for path in tracked_files() if path.is_relative_to(REPOSITORY / "csrc") and path.suffix in (".cpp", ".h")]
    assert len(sources) > 5
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if "python" not in path.relative_to(REPOSITORY / "csrc").parts:
            assert not re.search(r"#include\s*[<\"](pybind11|Python\.h|torch|ATen)", text), path


def test_every_package_folder_is_a_package() -> None:
    roots = (REPOSITORY / "rsvlm_infer", REPOSITORY / "export" / "rsvlm_export")
    folders = {path.parent for path in modules() if any(path.is_relative_to(root) for root in roots)}
    assert roots[1] / "onnx" in folders
    assert REPOSITORY / "rsvlm_infer" / "ops" in folders
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_module_says_what_it_owns_and_stays_short() -> None:
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert text.count("\n") <= LARGEST_MODULE_LINES, f"{path} is longer than {LARGEST_MODULE_LINES} lines"


def test_every_op_has_its_definition_and_its_twins_share_its_name() -> None:
    from rsvlm_infer.ops.registry import OPS

    for op, implementations in OPS.items():
        assert (REPOSITORY / "rsvlm_infer" / "ops" / f"{op}.py").exists(), op
        for implementation in implementations:
            assert (REPOSITORY / "rsvlm_infer" / "kernels" / implementation / f"{op}.py").exists(), (implementation, op)


def test_no_machine_paths_and_no_large_files() -> None:
    # written apart, so that this file does not find itself
    machine = re.compile("|".join(("/ro" + r"ot/", "/wo" + r"rk/(main|shared)", "/ho" + r"me/\w+/")))
    for path in tracked_files():
        content = path.read_bytes()
        limit = LARGEST_DELTA_BYTES if path.name == "delta.safetensors" else LARGEST_FILE_BYTES
        assert len(content) < limit, path
        if b"\0" not in content[:4096]:
            found = machine.search(content.decode("utf-8", errors="replace"))
            assert found is None, f"{path} holds the machine path {found.group() if found else ''}"
