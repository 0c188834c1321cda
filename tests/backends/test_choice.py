""" "auto": the folder alone decides, and it is said once, with the reason."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rsvlm_infer.backends import choose_backend, load_backend
from rsvlm_infer.contract import ARCHITECTURE, CONFIG, FORMAT, MANIFEST, NATIVE_WEIGHTS
from rsvlm_infer.errors import RsvlmError
from tests.native import needs_native


def _package(folder: Path, kind: str) -> Path:
    """A manifest that can be read, and none of the files that it names."""
    folder.mkdir()
    values = {"format": FORMAT, "version": 1, "architecture": ARCHITECTURE, "kind": kind, "precision": "fp32"}
    (folder / MANIFEST).write_text(json.dumps({**values, "files": {CONFIG: {}, NATIVE_WEIGHTS: {}}}))
    return folder


def test_the_folder_decides(tmp_path: Path) -> None:
    assert choose_backend(_package(tmp_path / "n", "native")).name == "native"
    assert choose_backend(_package(tmp_path / "o", "onnx")).name == "onnx"
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    _package(checkpoint / "native", "native")  # a package beside or inside is not taken in the checkpoint's place
    choice = choose_backend(checkpoint)
    assert choice.name == "eager"
    assert str(choice) == f"eager: {choice.reason}"
    assert "rsvlm export" in choice.reason


def test_it_is_said_once_for_each_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [_package(tmp_path / name, "native") for name in ("one", "two")]
    with caplog.at_level(logging.INFO, "rsvlm_infer.backends"):
        for folder in (*folders, *folders):
            with pytest.raises(RsvlmError):  # it is no whole package, which comes out after the choice
                load_backend(folder)
            with pytest.raises(RsvlmError):
                load_backend(folder, "native")  # named, so nothing was chosen
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"backend auto for {folder} is native: the folder is a package for it" for folder in folders]


@needs_native
def test_info_and_load_agree(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="packages are made with torch")
    from rsvlm_infer.cli.inspect import checkpoint_report
    from tests.backends.native_packages import CONFIG, write_package

    for folder, name in zip(write_package(tmp_path, CONFIG), ("eager", "native"), strict=True):
        assert load_backend(folder).name == name
        report = checkpoint_report(folder)
        assert report.values["auto_backend"]["name"] == name
        assert f"backend     {name}: " in report.text
