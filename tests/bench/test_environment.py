"""Where a result comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rsvlm_infer import __version__
from rsvlm_infer.bench import environment as module
from rsvlm_infer.bench.environment import busy_warning, environment, git_state


def test_environment_is_json_and_complete() -> None:
    values = json.loads(json.dumps(environment(["--images", "my scenes"])))
    assert values["command"] == "python -m rsvlm_infer.bench --images 'my scenes'"
    assert values["rsvlm_infer"] == __version__
    assert values["packages"]["numpy"].count(".") >= 1
    assert values["machine"]["cores"] >= 1
    assert "libraries" not in values["machine"]
    assert values["date"].endswith("+00:00")


def test_git_state_tells_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    file = tmp_path / "__init__.py"
    file.write_text("", encoding="utf-8")
    assert git_state(tmp_path) is None  # not tracked: somebody else's repository
    git("add", "__init__.py")
    git("commit", "-qm", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    file.write_text("x = 1\n", encoding="utf-8")
    state = git_state(tmp_path)
    assert state is not None
    assert state["changed"] is True


def test_busy_machine_is_said() -> None:
    assert busy_warning({"load_average": 0.9, "machine": {"cores": 2}}) is None
    assert busy_warning({"load_average": None, "machine": {"cores": 2}}) is None
    line = busy_warning({"load_average": 1.1, "machine": {"cores": 2}})
    assert line is not None
    assert "load 1.1 on 2 cores" in line


def test_load_average_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "getloadavg", raising=False)
    assert module.load_average() is None
