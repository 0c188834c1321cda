"""Owns the model of a job: loads it when the first scene is opened, and opens scenes with it. Knows no journal and no terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import CheckpointError, ConfigError, InputError
from ..pipeline import RSVLM, default_checkpoint
from ..scenes.identity import json_hash
from ..scenes.record import SceneRun
from ..scenes.run import open_scene_run
from ..scenes.settings import RunSettings
from ..tasks.scene import plan_image

_BLANK = np.zeros((8, 8, 3), np.uint8)


class ModelOpener:
    """A `SceneOpener` over a checkpoint or a package. A job that has nothing left to do never loads it.

    Raises (when a scene is opened for the first time):
        CheckpointError, BackendError, MissingDependencyError: the model cannot be loaded. ConfigError: the settings do not fit it.
    """

    def __init__(self, settings: RunSettings, checkpoint: Path | None, backend: str, precision: str) -> None:
        self._settings = settings
        self._place = (checkpoint, backend, precision)
        self._model: RSVLM | None = None
        self.budget = self.least_budget = 0  # known with the model

    def load(self) -> RSVLM:
        """The model, loaded once."""
        if self._model is None:
            model = RSVLM.from_pretrained(*self._place)
            self.budget, self.least_budget = _budgets(model, self._settings)
            self._model = model
        return self._model

    def open(self, source: str, budget: int | None) -> SceneRun:
        """See `SceneOpener`."""
        model = self.load()
        own = budget is None or budget == self._settings.max_visual_tokens
        settings = self._settings if own else dataclasses.replace(self._settings, max_visual_tokens=budget)
        return open_scene_run(model, source, settings)


def load_opener(settings: Mapping[str, Any], checkpoint: str | None, backend: str, precision: str) -> ModelOpener:
    """An opener with its model, from plain values: what a worker on another machine calls."""
    opener = ModelOpener(RunSettings(**settings), None if checkpoint is None else Path(checkpoint), backend, precision)
    opener.load()
    return opener


def job_hash(settings: RunSettings, checkpoint: Path | None, backend: str, precision: str) -> str:
    """Hex sha256 of what decides a job's answers beside its scenes, without reading weights: files count by name, bytes and time.

    Raises:
        CheckpointError: no such folder.
    """
    folder = default_checkpoint() if checkpoint is None else checkpoint
    if not folder.is_dir():
        step = (
            "run `rsvlm pull` to make the default checkpoint" if checkpoint is None else "pass a folder that holds config.json"
        )
        raise CheckpointError(f"checkpoint folder {folder} does not exist; {step}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json_hash([settings.identity(), stamps, backend, precision, __version__])


def _budgets(model: RSVLM, settings: RunSettings) -> tuple[int, int]:
    """Visual tokens for a window as the settings and the checkpoint say, and the fewest that it takes.

    A blank picture tells both whether the settings fit the checkpoint, which would else be said of every scene, and what the base tile
    costs. Only the planner `dris` keeps to a budget: with another tiling nothing can be lowered.
    """
    anywhere = dataclasses.replace(settings, bands=None, stretch="auto", window_px=None, overlap_px=0, deterministic=False)
    try:
        open_scene_run(model, _BLANK, anywhere).close()
        config = settings.scene.apply(model.config)
        least = plan_image(_BLANK, model.config, anywhere.scene).num_tokens
    except InputError as error:
        raise ConfigError(str(error)) from None
    if config.tiling == "dris":
        return config.dris.max_visual_tokens, least
    fixed = settings.max_visual_tokens or least
    return fixed, fixed
