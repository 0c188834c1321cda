"""What `make native-checks` proves is what is shipped: every native op, compiled as setup.py compiles it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rsvlm_infer.ops.registry import OPS
from tests.native_checks.__main__ import PROGRAMS, SHIPPED, missing_packages


def test_every_native_op_is_recorded_and_run(repository: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from tests.native_checks.cases import RECORDERS, SAME_FUNCTION
    from tests.native_checks.model_cases import MODEL_RECORDERS

    native = {SAME_FUNCTION.get(op, op) for op, implementations in OPS.items() if "native" in implementations}
    called = re.findall(r'\{"(\w+)", run_\1\}', (repository / "csrc" / "checks" / "run_cases.cpp").read_text(encoding="utf-8"))
    assert set(RECORDERS) == native
    assert set(called) == native | set(MODEL_RECORDERS)


def test_the_flags_are_those_of_setup(repository: Path) -> None:
    setup = (repository / "setup.py").read_text(encoding="utf-8")
    line = next(line for line in setup.splitlines() if "extra_compile_args" in line)
    assert sorted(re.findall(r'"(-[^"]+)"', line)) == sorted(flag for flag in SHIPPED if flag != "-fopenmp")
    assert 'openmp = ["-fopenmp"]' in setup
    assert "cxx_std=17" in setup


def test_missing_programs_are_named_by_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_packages() == sorted(set(PROGRAMS.values()))
