"""One form for every set: keys, truths and labels of each task, and which reader is chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.sets import READERS, EvaluationSet, Item, detect_reader, read_set
from tests.evaluation.annotation_files import karpathy, save, touch


def rsicd(tmp_path: Path) -> Path:
    entries = [
        {"filename": f"{theme}.jpg", "split": "test", "theme": theme, "captions": [f"{theme} .", "x ."]}
        for theme in ("port", "playfields")
    ]
    save(tmp_path / "rsicd" / "captions.json", entries)
    return tmp_path / "rsicd"


def instructions(tmp_path: Path) -> Path:
    entries = [
        {
            "id": i,
            "image": image,
            "conversations": [{"from": "human", "value": f"[{kind}] Say."}, {"from": "gpt", "value": answer}],
        }
        for i, (image, kind, answer) in enumerate(
            [("1.png", "caption", "One."), ("1.png", "caption", "Two."), ("1.png", "vqa", "3"), ("2.png", "vqa", "no")]
        )
    ]
    return save(tmp_path / "train.json", entries)


def test_each_task_takes_its_own_truth(tmp_path: Path) -> None:
    folder = rsicd(tmp_path)
    captions = read_set(folder, "caption")
    assert (captions.reader, captions.split, captions.name) == ("rsicd", "test", "rsicd")
    assert captions.items[0] == Item("port.jpg", folder / "images" / "port.jpg", ("port .", "x ."))
    themes = read_set(folder / "captions.json", "classify")
    assert [item.truths for item in themes.items] == [("port",), ("playfields",)]
    assert themes.labels["playfields"] == "playground"
    assert len(themes.labels) == 30
    assert captions.digest != themes.digest
    assert read_set(folder, "caption", images=tmp_path).items[0].image == tmp_path / "port.jpg"


def test_class_folders_describe_their_names(tmp_path: Path) -> None:
    touch(tmp_path / "test" / "AnnualCrop" / "1.jpg")
    touch(tmp_path / "test" / "sea_lake" / "1.jpg")
    data = read_set(tmp_path / "test", "classify")
    assert [item.key for item in data.items] == ["AnnualCrop/1.jpg", "sea_lake/1.jpg"]
    assert data.labels == {"AnnualCrop": "annual crop", "sea_lake": "sea lake"}
    assert data.name == f"{tmp_path.name} test"


def test_captions_of_one_image_in_a_list_become_one_item(tmp_path: Path) -> None:
    data = read_set(instructions(tmp_path), "caption").of_kinds(["caption"])
    assert [(item.key, item.truths) for item in data.items] == [("1.png", ("One.", "Two."))]
    questions = read_set(instructions(tmp_path), "vqa")
    assert questions.kinds == ["caption", "vqa"]
    assert [item.key for item in questions.of_kinds(["vqa"]).items] == ["2#0", "3#0"]
    with pytest.raises(InputError, match=r"--kind must be among \['caption', 'vqa'\].*\['refer'\]"):
        questions.of_kinds(["vqa", "refer"])
    assert read_set(instructions(tmp_path), "classify").labels.keys() == {"One.", "Two.", "3", "no"}


def test_a_file_that_stands_twice_is_one_item_and_equal_keys_are_numbered(tmp_path: Path) -> None:
    folder = rsicd(tmp_path)
    entry = {"filename": "a.jpg", "split": "test", "theme": "port", "captions": ["x ."]}
    other = save(folder / "own.json", [entry, {**entry, "captions": ["y .", " "]}])
    assert [item.truths for item in read_set(other, "retrieval").items] == [("x .", "y .")]
    flat = {"image_id": "a.png", "question": "?", "ground_truth": "1", "question_id": 0}
    questions = read_set(save(tmp_path / "q.json", [flat, {**flat, "ground_truth": "2"}]), "vqa")
    assert [item.key for item in questions.items] == ["0", "0#2"]


def test_rsvqa_has_splits_and_types(tmp_path: Path) -> None:
    for part, values in (
        ("questions", [{"id": 3, "img_id": 1, "type": "comp", "question": "More?", "answers_ids": [4], "active": True}]),
        ("answers", [{"id": 0, "active": False}, {"id": 4, "answer": "no", "active": True}]),
        ("images", [{"id": 1, "active": True}]),
    ):
        save(tmp_path / f"LR_split_test_{part}.json", {part: values})
    (tmp_path / "Images_LR").mkdir()
    data = read_set(tmp_path, "vqa")
    assert data.items == (Item("test/3", tmp_path / "Images_LR" / "1.tif", ("no",), "More?", "comp"),)
    assert read_set(tmp_path, "vqa", images=tmp_path).items[0].image == tmp_path / "1.tif"
    with pytest.raises(InputError, match=r"of \['val'\], found none"):
        read_set(tmp_path, "vqa", split="val")
    save(tmp_path / "LR_split_test_images.json", {"images": [{"id": 1, "active": False}]})
    with pytest.raises(InputError, match="img_id 1"):
        read_set(tmp_path, "vqa")


@pytest.mark.parametrize(
    ("name", "value", "reader"),
    [
        ("a.json", {"images": []}, "karpathy"),
        ("a.json", {"airport": []}, "nwpu"),
        ("a.json", [{"filename": "x", "captions": []}], "rsicd"),
        ("a.json", [{"id": 1, "conversations": []}], "instructions"),
        ("a.json", [{"image_id": "x"}], "instructions"),
        ("a.jsonl", [{"image": "x", "text": "?"}], "geochat-bench"),
        ("a.jsonl", [{"answer": "x", "caption0": "y"}], "answered"),
    ],
)
def test_the_reader_is_told_from_the_file(tmp_path: Path, name: str, value: Any, reader: str) -> None:
    assert detect_reader(save(tmp_path / name, value)) == reader
    assert reader in READERS


def test_limit_keeps_the_order_and_changes_the_digest() -> None:
    items = tuple(Item(str(i), None, ("x",)) for i in range(20))
    data = EvaluationSet("vqa", "s", "r", None, items)
    few = data.limited(5)
    assert len(few.items) == 5
    assert [item.key for item in few.items] == sorted((item.key for item in few.items), key=int)
    assert few == data.limited(5)
    assert few.digest != data.digest
    assert data.limited(20) is data


def test_the_digest_sees_truths_and_labels_but_no_folder() -> None:
    data = EvaluationSet("classify", "s", "r", None, (Item("a", Path("x/a"), ("t",)),), {"t": "t"})
    assert dataclasses.replace(data, name="other", items=(Item("a", Path("y/a"), ("t",)),)).digest == data.digest
    assert dataclasses.replace(data, labels={"t": "tee"}).digest != data.digest
    assert dataclasses.replace(data, items=(Item("a", Path("x/a"), ("u",)),)).digest != data.digest


def test_missing_images_are_told(tmp_path: Path) -> None:
    there = Item("a", touch(tmp_path / "a.jpg"), ("t",))
    absent = Item("b", tmp_path / "b.jpg", ("t",))
    data = EvaluationSet("vqa", "s", "r", None, (there, absent, Item("c", None, ("t",))))
    assert data.missing() == [absent]
    assert [item.key for item in data.without([absent]).items] == ["a", "c"]


def test_wrong_choices_name_what_there_is(tmp_path: Path) -> None:
    file = karpathy(tmp_path)
    with pytest.raises(InputError, match="task must be one of"):
        read_set(file, "detect")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        read_set(tmp_path / "absent", "vqa")
    with pytest.raises(InputError, match=r"--reader must be one of \['auto', 'rsicd'.*got 'coco'"):
        read_set(file, "caption", reader="coco")
    with pytest.raises(InputError, match=r"task 'vqa' cannot be scored.*'karpathy'.*'rsvqa'"):
        read_set(file, "vqa")
    with pytest.raises(InputError, match=r"--split does not apply.*'val'"):
        read_set(instructions(tmp_path), "vqa", split="val")
    with pytest.raises(InputError, match="no reader knows"):
        read_set(save(tmp_path / "odd.json", [1]), "caption")
    with pytest.raises(InputError, match="no reader knows"):
        read_set(save(tmp_path / "odd.jsonl", [[1]]), "caption")
    blank = {"image_id": "a.png", "question": "?", "ground_truth": " "}
    with pytest.raises(InputError, match="'0' of blank has no truth"):
        read_set(save(tmp_path / "blank.json", [blank]), "vqa")
