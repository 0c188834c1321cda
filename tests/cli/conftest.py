"""Fixtures of the command tests: a fake model in place of a checkpoint, images, a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rsvlm_infer.pipeline import RSVLM
from tests.tasks.telling_model import TellingBackend, load_tokenizer, picture, telling_config


@pytest.fixture
def backend() -> TellingBackend:
    return TellingBackend()


@pytest.fixture(autouse=True)
def fake_model(backend: TellingBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda path, backend_name, precision: RSVLM(backend, tokenizer))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three good images and a bad one."""
    paths = {}
    for colour in ("red", "green", "blue"):
        paths[colour] = str(tmp_path / f"{colour}.png")
        Image.fromarray(picture(colour)).save(paths[colour])
    paths["bad"] = str(tmp_path / "bad.png")
    Path(paths["bad"]).write_bytes(b"not an image")
    return paths


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(telling_config().to_dict()))
    (folder / "model.safetensors").write_bytes(b"abc")
    return str(folder)
