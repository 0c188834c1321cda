"""The draft table: what the finished model says about images of the train split, counted as n-grams. Knows no weights.

It changes the speed of the native backend's answers and never an answer, so it needs no care beyond being the model's own words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsvlm_infer import RSVLM
from rsvlm_infer.models.draft_table import DraftTable

_log = logging.getLogger(__name__)


def chosen_images(paths: Sequence[Path], settings: dict[str, Any]) -> list[Path]:
    """`images` of the paths, drawn with the recipe's seed."""
    order = np.random.default_rng(settings["seed"]).permutation(len(paths))
    return [paths[i] for i in order[: settings["images"]]]


def collect_answers(model: RSVLM, paths: Sequence[Path], file: Path, batch: int) -> list[tuple[int, ...]]:
    """Greedy captions as token ids, each with its end token where it ended by itself; `file` gets a line for each and is resumed."""
    known = _read_answers(file)
    left = [path for path in paths if path.name not in known]
    with file.open("a", encoding="utf-8") as lines:
        for path, answer in zip(left, model.caption_many(left, batch_size=batch, strict=True), strict=True):
            end = model.config.eos_token_ids[:1] if answer.finish_reason == "stop_id" else ()
            known[path.name] = (*answer.token_ids, *end)
            lines.write(json.dumps({"image": path.name, "tokens": known[path.name]}) + "\n")
            lines.flush()
    return [known[path.name] for path in paths]


def _read_answers(file: Path) -> dict[str, tuple[int, ...]]:
    """What an earlier run wrote; a last line that was cut is dropped, in the file too."""
    if not file.is_file():
        return {}
    whole, _, cut = file.read_text(encoding="utf-8").rpartition("\n")
    if cut:
        file.write_text(whole + "\n" if whole else "", encoding="utf-8")
    entries = [json.loads(line) for line in whole.splitlines()]
    return {entry["image"]: tuple(entry["tokens"]) for entry in entries}


def write_table(answers: Sequence[Sequence[int]], longest: int, file: Path) -> DraftTable:
    """Counts and saves; `python -m training delta` names the file's hash."""
    table = DraftTable.from_answers(answers, longest)
    table.save(file)
    _log.info("drafts: %d answers, %d contexts, %d bytes", len(answers), len(table), file.stat().st_size)
    return table
