"""The predictions file: what is written is read again, a torn end is cut, anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.predictions import PredictionWriter, header_differences, read_predictions

HEADER: dict[str, Any] = {"task": "vqa", "set": {"digest": "d"}}


def write(file: Path) -> Path:
    with PredictionWriter(file, HEADER, None) as writer:
        writer.add("a", "ein Fluß")
        writer.fail("b", "cannot be read")
        writer.add("c", [0.5, -1.0])
    return file


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "new" / "p.jsonl")
    found = read_predictions(file)
    assert found.header == {"schema": "rsvlm-predictions/1", **HEADER}
    assert found.values == {"a": "ein Fluß", "c": [0.5, -1.0]}
    assert found.errors == {"b": "cannot be read"}
    assert found.end == file.stat().st_size


def test_each_line_is_in_the_file_before_the_next(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with PredictionWriter(file, HEADER, None) as writer:
        writer.add("a", "x")
        assert read_predictions(file).values == {"a": "x"}


@pytest.mark.parametrize("cut", range(1, 36))
def test_a_torn_end_is_cut_and_the_run_goes_on(tmp_path: Path, cut: int) -> None:
    file = write(tmp_path / "p.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    found = read_predictions(file)
    assert ("c" in found.values) == (cut == 1)  # only the line's end is missing
    with PredictionWriter(file, HEADER, found) as writer:
        writer.add("c", [0.5, -1.0])
        writer.add("b", "now it works")
    after = read_predictions(file)
    assert after.values == {"a": "ein Fluß", "b": "now it works", "c": [0.5, -1.0]}
    assert after.errors == {}
    for line in file.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_a_torn_header_starts_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl")
    for length in (0, 5, 40):
        file.write_bytes(file.read_bytes()[:length])
        found = read_predictions(file)
        assert (found.header, found.end) == (None, 0)
        with PredictionWriter(file, HEADER, found) as writer:
            writer.add("a", "x")
        assert read_predictions(file).header == {"schema": "rsvlm-predictions/1", **HEADER}


def test_a_file_of_another_program_has_no_header(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"key": "a", "prediction": "x"}\n\n{"key": "b", "prediction": "y"}', encoding="utf-8")
    found = read_predictions(file)
    assert (found.header, found.values) == (None, {"a": "x", "b": "y"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("notes of mine, one line", "line 1 must be"),
        ('{"key": "a", "prediction": "x"}\n{"key"\n{"key": "b", "prediction": "y"}\n', "line 2 must be"),
        ('{"key": "a"}\n{"key": "b", "prediction": "y"}\n', "line 1 must be"),
        ('{"schema": "other/3"}\n', "must have the schema"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_predictions(file)
    assert file.read_text(encoding="utf-8") == text


def test_unusable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        PredictionWriter(tmp_path, HEADER, None)


def test_differences_are_by_name() -> None:
    header = {"task": "vqa", "set": {"digest": "d", "items": 3}, "model": None}
    assert header_differences(header, {"task": "vqa", "set": {"digest": "d"}}) == []
    assert header_differences(header, {"set": {"digest": "e"}, "model": {"digest": "m"}}) == [
        "set.digest was 'd', is 'e'",
        "model was None, is {'digest': 'm'}",
    ]
