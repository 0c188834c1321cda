"""What a layout is: how to recognise it, its config and its weight table. Knows no particular one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import RsvlmConfig
from ..checkpoint import CheckpointFolder
from ..weight_tables import Rule


def _folder_files(folder: CheckpointFolder) -> Sequence[Path]:
    return folder.base_files


@dataclass(frozen=True)
class Layout:
    """One checkpoint format.

    `matches` looks at the raw config and at most at weight names; `config` gives the checked config; `rules` the weight table of a
    config. `extra_files` and `extra_rules` belong to weights that lie in another folder (original LLaVA's vision encoder).
    `hint` is the next step in the message about weights that do not fit.
    """

    name: str
    matches: Callable[[CheckpointFolder], bool]
    config: Callable[[CheckpointFolder], RsvlmConfig]
    rules: Callable[[RsvlmConfig], Sequence[Rule]]
    hint: str = "download the checkpoint again, or correct config.json"
    files: Callable[[CheckpointFolder], Sequence[Path]] = _folder_files

    def weights(self, folder: CheckpointFolder, config: RsvlmConfig) -> list[tuple[Path, Sequence[Rule]]]:
        """The weight files in reading order, each with its table."""
        rules = self.rules(config)
        return [(path, rules) for path in self.files(folder)]
