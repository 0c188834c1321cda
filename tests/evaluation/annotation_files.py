"""Tiny annotation files in the layouts of public sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save(file: Path, value: Any) -> Path:
    """JSON, or one JSON value on each line when the name ends in jsonl."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(line) for line in value) + "\n" if file.suffix == ".jsonl" else json.dumps(value)
    file.write_text(text, encoding="utf-8")
    return file


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def karpathy(tmp_path: Path) -> Path:
    images = [
        {
            "filename": f"{name}.tif",
            "imgid": i,
            "split": split,
            "sentences": [{"raw": f"{name} .", "tokens": [name]}, {"raw": "x"}],
        }
        for i, (name, split) in enumerate((("a", "train"), ("b", "test"), ("c", "test")))
    ]
    return save(tmp_path / "dataset.json", {"images": images, "dataset": "UCM"})
