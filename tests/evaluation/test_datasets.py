"""Readers of labelled sets, on tiny sets written by the tests and on the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, read_class_folders, read_rsicd, read_rsvqa


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def test_rsicd_gives_one_split_in_file_order(tmp_path: Path) -> None:
    entries = [
        {"filename": f"{name}.jpg", "split": split, "theme": "port", "captions": [f"{name} ."]}
        for name, split in (("b", "test"), ("x", "train"), ("a", "test"))
    ]
    _write(tmp_path / "captions.json", entries)
    images = read_rsicd(tmp_path, "test")
    assert [image.path for image in images] == [tmp_path / "images" / "b.jpg", tmp_path / "images" / "a.jpg"]
    assert images[0].captions == ("b .",)
    with pytest.raises(InputError, match=r"\['test', 'train'\].*'val'"):
        read_rsicd(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("[{]", "not JSON"), ('[{"split": "test"}]', "must be a list")]
)
def test_damaged_rsicd_names_the_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "captions.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_rsicd(tmp_path, "test")


def test_class_folders_are_sorted_and_other_files_ignored(tmp_path: Path) -> None:
    for name in ("River/b.jpg", "River/a.PNG", "Forest/c.tif", "Forest/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = read_class_folders(tmp_path)
    assert [(image.label, image.path.name) for image in images] == [("Forest", "c.tif"), ("River", "a.PNG"), ("River", "b.jpg")]
    with pytest.raises(InputError, match="found no image"):
        read_class_folders(tmp_path / "Forest")


def test_rsvqa_joins_by_id_and_skips_inactive(tmp_path: Path) -> None:
    (tmp_path / "Images_LR").mkdir()
    questions = [
        {"id": 9, "img_id": 2, "type": "count", "question": "How many?", "answers_ids": [90], "active": True},
        {"id": 8, "img_id": 1, "type": "presence", "question": "Is there?", "answers_ids": [80], "active": True},
        {"id": 0, "active": False},
    ]
    answers = [
        {"id": 80, "answer": "yes", "active": True},
        {"id": 1, "active": False},
        {"id": 90, "answer": "3", "active": True},
    ]
    _write(tmp_path / "LR_split_val_questions.json", {"questions": questions})
    _write(tmp_path / "LR_split_val_answers.json", {"answers": answers})
    found = read_rsvqa(tmp_path)
    assert [(item.path.name, item.kind, item.question, item.answer) for item in found] == [
        ("1.tif", "presence", "Is there?", "yes"),
        ("2.tif", "count", "How many?", "3"),
    ]
    _write(tmp_path / "LR_split_val_answers.json", {"answers": answers[:1]})
    with pytest.raises(InputError, match=r"RSVQA's JSON, got KeyError\(90\)"):
        read_rsvqa(tmp_path)
    with pytest.raises(InputError, match="found none"):
        read_rsvqa(tmp_path, splits=["test"])
    with pytest.raises(InputError, match="found neither"):
        read_rsvqa(tmp_path / "Images_LR")


@pytest.mark.data
def test_real_rsicd_has_its_counts(data_root: Path) -> None:
    images = read_rsicd(data_root / "rsicd", "test")
    assert len(images) == 547
    assert {len(image.captions) for image in images} == {5}
    assert {image.theme for image in images} == set(RSICD_THEMES)
    assert all(image.path.is_file() for image in images)


@pytest.mark.data
def test_real_class_folders_have_their_counts(data_root: Path) -> None:
    images = read_class_folders(data_root / "rsscn7" / "test")
    assert len(images) == 140
    assert len({image.label for image in images}) == 7
