"""A tiny labelled set and a checkpoint folder of known length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsvlm_infer.bench.images import ImageSet, rsicd_images
from rsvlm_infer.bench.measure import Workload

FAKE = "tests.bench.fake_rsvlm:FakeRSVLM"
THEMES = {"forest-even.jpg": "forest", "forest-odd.jpg": "forest", "river-even.jpg": "river", "road-odd.jpg": "beach"}


def write_rsicd(folder: Path) -> Path:
    """RSICD's layout with four images; the fake model gets the theme of road-odd.jpg wrong."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for name, theme in THEMES.items():
        (folder / "images" / name).write_bytes(name.encode())
        captions = ["a green field near the river .", f"the {name.split('-')[0]} is green ."]
        entries.append({"filename": name, "split": "test", "theme": theme, "captions": captions})
    (folder / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def rsicd(tmp_path: Path) -> Path:
    return write_rsicd(tmp_path / "rsicd")


@pytest.fixture
def images(rsicd: Path) -> ImageSet:
    return rsicd_images(rsicd, "test")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "knowledge").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "knowledge" / "entries.jsonl").write_bytes(b"x" * 24)
    return folder


@pytest.fixture
def work(checkpoint: Path, images: ImageSet) -> Workload:
    return Workload(
        str(checkpoint), images, repeats=2, warmup=1, offline_batch=3, max_new_tokens=6, logits_images=2, model=FAKE
    )
