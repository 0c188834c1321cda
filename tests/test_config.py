"""Configs: complete, frozen, and every problem of a file named at once."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer.config import (
    AlignmentConfig,
    AugmentationConfig,
    ExpertsConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    TextEncoderConfig,
    VisionConfig,
)
from rsvlm_infer.errors import ConfigError, RsvlmError

VISION = VisionConfig("clip", 24, 48, 3, 2, 14, 16, (1, 2, 3), "quick_gelu", "bicubic", 1e-5, True, True, False, False)
LANGUAGE = LanguageConfig("qwen2", 60, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 512, True, False)
PREPROCESS = PreprocessConfig(224, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FULL = RsvlmConfig(
    vision=VISION,
    preprocess=PREPROCESS,
    language=LANGUAGE,
    projector=ProjectorConfig(40),
    text_encoder=TextEncoderConfig(60, 16, 32, 2, 2, 77, "quick_gelu", 1e-5, 2),
    alignment=AlignmentConfig(16, text_source="text_encoder"),
    augmentation=AugmentationConfig(2),
    experts=ExpertsConfig(6, 2, 16),
    tiling="anyres",
    grid_pinpoints=((224, 448), (448, 224)),
)


def _changed(**changes: Any) -> dict[str, Any]:
    """FULL as JSON values with some keys (dots go deeper) set."""
    values = copy.deepcopy(FULL.to_dict())
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = values
        for parent in parents:
            target = target[parent]
        target[key] = value
    return values


def test_json_round_trip_gives_the_equal_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(FULL.to_dict()), encoding="utf-8")
    assert RsvlmConfig.from_json(file) == FULL
    assert FULL.tile_grid == 16
    assert VISION.head_dim == 12


def test_defaults_may_be_left_out_and_absent_parts_stay_absent() -> None:
    values = {"vision": dataclasses.asdict(VISION), "preprocess": dataclasses.asdict(PREPROCESS)}
    config = RsvlmConfig.from_dict(json.loads(json.dumps(values)))
    assert config.language is config.projector is config.alignment is config.experts is None
    assert config.tiling == "fixed"
    assert config.dris.leaf_grids == (4, 8, 16)


def test_all_problems_of_a_file_are_named_at_once() -> None:
    values = _changed(vision__hidden_size="24", language__rope_thetta=1.0, tiling="quilted", preprocess__mean=[0.5])
    del values["vision"]["patch_size"]
    with pytest.raises(ConfigError) as raised:
        RsvlmConfig.from_dict(values)
    message = str(raised.value)
    for part in (
        "config.vision lacks the keys ['patch_size']",
        "config.vision.hidden_size must be int, got '24'",
        "config.language has unknown keys ['rope_thetta']",
        "config.tiling must be one of ['fixed', 'anyres', 'dris'], got 'quilted'",
        "config.preprocess.mean must be",
        "fix config.json",
    ):
        assert part in message
    assert isinstance(raised.value, RsvlmError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision__hidden_size": 25}, "vision.hidden_size must be a multiple of vision.num_heads, got 25 and 2"),
        ({"vision__taps": [2, 1, 3]}, r"vision.taps must be three ascending hidden-state indices in 0..3, got \(2, 1, 3\)"),
        ({"vision__taps": [1, 2, 4]}, "vision.taps must be three ascending"),
        ({"language__num_kv_heads": 3}, "language.num_heads must be a multiple of language.num_kv_heads, got 4 and 3"),
        ({"projector__pixel_shuffle": 3}, "projector.pixel_shuffle must be 1 or 2, got 3"),
        ({"dris__leaf_thresholds": [0.1]}, "dris.leaf_thresholds must be ascending and one fewer"),
        ({"dris__max_tiles": 0}, "dris budgets must be at least 1, got max_tiles=0"),
        ({"experts__num_experts": 7}, "experts.num_experts must be a positive multiple of 3, got 7"),
        ({"experts__top_k": 3}, r"experts.top_k must be in 1..2 \(one group\), got 3"),
        ({"language": None}, "language and projector belong together"),
        ({"grid_pinpoints": []}, 'tiling "anyres" needs grid_pinpoints, got none'),
        ({"preprocess__tile_px": 225}, "preprocess.tile_px must be a multiple of vision.patch_size 14, got 225"),
        ({"projector__pixel_shuffle": 2, "dris__leaf_grids": [3, 8, 16]}, r"even patch grids, got \(16, 3, 8, 16\)"),
        ({"alignment": None}, "augmentation needs alignment"),
        ({"alignment__text_template": "no place"}, "alignment.text_template must hold"),
        ({"text_encoder": None}, 'alignment.text_source is "text_encoder" but that part is absent'),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RsvlmConfig.from_dict(_changed(**changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; pass a checkpoint folder"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        RsvlmConfig.from_json(file)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.tiling = "fixed"  # type: ignore[misc]
