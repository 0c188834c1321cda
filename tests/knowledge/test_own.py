"""own: JSON lines and CSV give the same entries; a wrong line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.knowledge.mine import Entry
from rsvlm_infer.knowledge.own import read_own_entries

EXPECTED = [Entry("salt evaporation ponds, in rows", 1), Entry("a mine\u2028pit".replace("\u2028", " "), 2), Entry("kiln", 0)]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"text": "salt evaporation  ponds, in rows", "level": "region"}\n\n'
        '{"level": "scene", "text": "a mine\u2028pit"}\n{"text": " kiln ", "level": "object"}',
        encoding="utf-8",
    )
    assert read_own_entries(file) == EXPECTED


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "own.CSV"
    file.write_text('level,text\nregion,"salt evaporation ponds, in rows"\nscene, a mine pit\n\nobject,kiln\n', "utf-8-sig")
    assert read_own_entries(file) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", b"", r"must end in \.jsonl or \.csv, got 'own\.txt'"),
        ("own.jsonl", b"\n", "must hold at least one entry"),
        ("own.csv", b"text,level\n", "must hold at least one entry"),
        ("own.jsonl", b"\xff", "cannot be read"),
        ("own.jsonl", b'{"text": "a", "level": "scene"}\n{', "line 2 must be a JSON object"),
        ("own.jsonl", b"[1]", "line 1 must have exactly the keys text and level, got list"),
        ("own.jsonl", b'{"text": "a"}', r"got \['text'\]"),
        ("own.jsonl", b'{"text": "a", "level": "scene", "id": 1}', r"got \['id', 'level', 'text'\]"),
        ("own.jsonl", b'{"text": "a", "level": 2}', r"level must be one of \['object', 'region', 'scene'\], got 2"),
        ("own.jsonl", b'{"text": " ", "level": "scene"}', "text must be 1 to 400 characters, got ' '"),
        ("own.jsonl", b'{"text": 5, "level": "scene"}', "got 5"),
        ("own.csv", b"text,level\na,scene\nb,place\n", "line 3: level must be one of .* got 'place'"),
        ("own.csv", b"text,level\na,scene,c\n", "line 2 must have exactly the keys"),
        ("own.csv", b"text,level\na\n", "line 2: level must be one of .* got None"),
        ("own.csv", b'text,level\n"a,scene\n', "must be CSV"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_own_entries(tmp_path / name)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_own_entries(tmp_path / "absent.csv")
