"""The draft table's captions: a run that was cut goes on, and the table is counted from what the model said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.models.draft_table import START, DraftTable
from training.delta import state_drafts
from training.drafts import chosen_images, collect_answers, write_table

PATHS = [Path(f"{i}.jpg") for i in range(6)]


class _Model:
    """Says the image's number and one word; image 4 never ends."""

    config = SimpleNamespace(eos_token_ids=(0, 1))

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[str] = []
        self._fails_at = fails_at

    def caption_many(self, paths: Sequence[Path], *, batch_size: int, strict: bool) -> Iterator[Any]:
        assert strict
        for path in paths:
            if int(path.stem) == self._fails_at:
                raise RuntimeError("killed")
            self.seen.append(path.name)
            yield SimpleNamespace(token_ids=(10 + int(path.stem), 7), finish_reason="length" if path.stem == "4" else "stop_id")


def test_answers_are_resumed_and_the_end_is_counted_only_where_it_came(tmp_path: Path) -> None:
    file = tmp_path / "drafts.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        collect_answers(_Model(fails_at=3), PATHS, file, 2)  # type: ignore[arg-type]
    with file.open("a") as lines:
        lines.write('{"image": "3.jpg", "tok')  # cut in the middle of a line
    model = _Model()
    answers = collect_answers(model, PATHS, file, 2)  # type: ignore[arg-type]
    assert model.seen == ["3.jpg", "4.jpg", "5.jpg"]
    assert answers == [(14, 7) if i == 4 else (10 + i, 7, 0) for i in range(6)]
    assert [json.loads(line)["image"] for line in file.read_text().splitlines()] == [path.name for path in PATHS]
    table = write_table(answers, 2, tmp_path / DRAFTS)
    loaded = DraftTable.load(tmp_path / DRAFTS, 32)
    assert loaded.follow([START, 12, 7]) == table.follow([START, 12, 7]) == (0, pytest.approx(1 / 2, abs=0.01))


def test_images_are_drawn_once_with_the_seed() -> None:
    settings = {"seed": 3, "images": 4}
    chosen = chosen_images(PATHS, settings)
    assert len(set(chosen)) == 4
    assert chosen == chosen_images(PATHS, settings) != chosen_images(PATHS, {**settings, "seed": 4})


def test_the_delta_names_its_table(tmp_path: Path) -> None:
    (tmp_path / "delta.json").write_text('{"format": 1}')
    state_drafts(tmp_path)
    assert json.loads((tmp_path / "delta.json").read_text()) == {"format": 1}
    write_table([(1, 2, 3)], 1, tmp_path / DRAFTS)
    state_drafts(tmp_path)
    assert list(json.loads((tmp_path / "delta.json").read_text())["files"]) == [DRAFTS]
