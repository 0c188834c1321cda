"""What a layout is: how to recognise it, its config and its weight table. Knows no particular one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import RsvlmConfig
from ..checkpoint import CheckpointFolder
from ..weight_tables import Rule

Weights = list[tuple[Path, Sequence[Rule]]]


@dataclass(frozen=True)
class Layout:
    """One checkpoint format.

    `matches` looks at the raw config and at most at weight names; `config` gives the checked config; `weights` the files in
    reading order, each with its table; `hint` is the next step in the message about weights that do not fit.
    """

    name: str
    matches: Callable[[CheckpointFolder], bool]
    config: Callable[[CheckpointFolder], RsvlmConfig]
    weights: Callable[[CheckpointFolder, RsvlmConfig], Weights]
    hint: str = "download the checkpoint again, or correct config.json"


def one_table(folder: CheckpointFolder, rules: Sequence[Rule]) -> Weights:
    """The same table for every file of the folder."""
    return [(path, rules) for path in folder.base_files]


def model_type(folder: CheckpointFolder) -> str | None:
    """`model_type` of the raw config; None without one."""
    value = (folder.config or {}).get("model_type")
    return None if value is None else str(value)
