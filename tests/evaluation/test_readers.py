"""Readers of public annotation files, on tiny files in their layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.readers import (
    read_answered,
    read_geochat_bench,
    read_instructions,
    read_karpathy,
    read_lines,
    read_nwpu,
)
from tests.evaluation.annotation_files import karpathy, save, touch


def test_karpathy_gives_one_split(tmp_path: Path) -> None:
    found = read_karpathy(karpathy(tmp_path), "test")
    assert [(image.path, image.theme, image.captions) for image in found] == [
        (tmp_path / "images" / "b.tif", "", ("b .", "x")),
        (tmp_path / "images" / "c.tif", "", ("c .", "x")),
    ]
    with pytest.raises(InputError, match=r"\['test', 'train'\].*'val'"):
        read_karpathy(karpathy(tmp_path), "val")


def test_images_are_found_beside_the_file_or_where_told(tmp_path: Path) -> None:
    file = karpathy(tmp_path)
    beside = touch(tmp_path / "imgs" / "b.tif")
    assert read_karpathy(file, "test")[0].path == beside
    told = touch(tmp_path / "elsewhere" / "b.jpg")  # the set has the suffix wrong
    found = read_karpathy(file, "test", told.parent)
    assert [image.path for image in found] == [told, told.parent / "c.tif"]
    with pytest.raises(InputError, match="--images must name a folder"):
        read_karpathy(file, "test", tmp_path / "absent")


def test_nwpu_has_classes_and_five_sentences(tmp_path: Path) -> None:
    entry = {
        "filename": "airport_001.jpg",
        "split": "test",
        "raw": "s0",
        "raw_1": "s1",
        "raw_2": "s2",
        "raw_3": "s3",
        "raw_4": "s4",
    }
    file = save(tmp_path / "dataset_nwpu.json", {"airport": [entry, {**entry, "split": "val"}], "beach": []})
    (image,) = read_nwpu(file, "test")
    assert image.path == tmp_path / "images" / "airport" / "airport_001.jpg"
    assert (image.theme, image.captions) == ("airport", ("s0", "s1", "s2", "s3", "s4"))
    with pytest.raises(InputError, match=r"\['test', 'val'\]"):
        read_nwpu(file, "train")


def test_instructions_are_pairs_of_turns_without_marks(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\n[vqa] Is there a river?"},
        {"from": "gpt", "value": "Yes"},
        {"from": "human", "value": "How many ships?"},
        {"from": "gpt", "value": "3"},
    ]
    entries = [{"id": "q7", "image": "p/1.png", "conversations": turns}, {"id": "text", "conversations": turns}]
    found = read_instructions(save(tmp_path / "list.json", entries))
    assert [(each.key, each.kind, each.question, each.answer) for each in found] == [
        ("q7#0", "vqa", "Is there a river?", "Yes"),
        ("q7#1", "", "How many ships?", "3"),
    ]
    assert found[0].path == tmp_path / "images" / "p" / "1.png"
    with pytest.raises(InputError, match="found none"):
        read_instructions(save(tmp_path / "none.json", entries[1:]))


def test_vrsbench_evaluation_lists_are_read(tmp_path: Path) -> None:
    entry = {"image_id": "P0.png", "question": "What colour?", "ground_truth": "red", "question_id": 4, "type": "object color"}
    (found,) = read_instructions(save(tmp_path / "VRSBench_EVAL_vqa.json", [entry]))
    assert (found.key, found.kind, found.question, found.answer) == ("4", "object color", "What colour?", "red")


def test_geochat_bench_takes_a_scene_class_from_its_question_id(tmp_path: Path) -> None:
    lines = [
        {"question_id": "beach/beach_1", "image": "beach_1.png", "text": "Classify.", "ground_truth": "beachgt"},
        {"question_id": 5, "image": "5.tif", "text": "Is it rural?", "category": "rural_urban", "ground_truth": "rural"},
    ]
    found = read_geochat_bench(save(tmp_path / "bench.jsonl", lines))
    assert [(each.kind, each.answer, each.key) for each in found] == [
        ("scene", "beach", "beach/beach_1"),
        ("rural_urban", "rural", "5"),
    ]
    without = save(tmp_path / "lrben.jsonl", [{"question_id": 1, "image": "1.tif", "text": "?", "category": "comp"}])
    with pytest.raises(InputError, match=r"line 1 has no ground_truth.*--reader rsvqa"):
        read_geochat_bench(without)


def test_released_answers_carry_their_truth(tmp_path: Path) -> None:
    captioned = save(tmp_path / "a.jsonl", [{"question": "?", "answer": "a road", "caption1": "two", "caption0": "one"}])
    (found,) = read_answered(captioned)
    assert (found.key, found.answer, found.truths) == ("1", "a road", ("one", "two"))
    classified = save(tmp_path / "b.jsonl", [{"answer": "river", "annotation": "forest"}])
    assert read_answered(classified)[0].truths == ("forest",)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda file: read_karpathy(file, "test"), [{"filename": "a"}]),
        (lambda file: read_karpathy(file, "test"), {"images": [{"split": "test"}]}),
        (lambda file: read_nwpu(file, "test"), {"airport": [{"raw": "x"}]}),
        (lambda file: read_nwpu(file, "test"), [1]),
        (read_instructions, [{"image": "a", "conversations": [{"from": "human"}, {}]}]),
        (read_instructions, [3]),
        (read_instructions, [{"image": "a"}]),
        (read_instructions, [{"image_id": 3, "question": "?", "ground_truth": "x"}]),
        (read_instructions, [{"image": ["a", "b"], "conversations": [{"value": "?"}, {"value": "x"}]}]),
    ],
)
def test_another_format_names_file_and_expectation(tmp_path: Path, read: Callable[[Path], Any], value: Any) -> None:
    with pytest.raises(InputError, match=r"set.json must hold .* --reader"):
        read(save(tmp_path / "set.json", value))


@pytest.mark.parametrize(
    ("read", "line"), [(read_geochat_bench, {"ground_truth": "x"}), (read_answered, {"answer": 1}), (read_answered, 7)]
)
def test_another_line_format_names_the_file(tmp_path: Path, read: Callable[[Path], Any], line: Any) -> None:
    with pytest.raises(InputError, match=r"set.jsonl must hold lines of"):
        read(save(tmp_path / "set.jsonl", [line]))


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with pytest.raises(InputError, match="does not exist"):
        read_lines(file)
    file.write_text("{}\n\n[\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_lines(file)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="empty file"):
        read_lines(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_lines(file)
