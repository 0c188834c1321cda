"""The trained delta inside the package is whole, fits the model and the base parts, and the checkpoint made from it is right."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from rsvlm_infer import pull
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.engine.step_times import StepTimes
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, read_rsicd
from rsvlm_infer.models.draft_table import DraftTable
from tests.native import needs_native

BASE_PREFIXES = ("language_model.", "vision_encoder.")
THEMES = ("airport", "baseballfield", "beach", "desert", "forest", "parking")
IMAGES_PER_THEME = 2
LIMIT_BYTES = 60_000_000
DRAFTS_LIMIT_BYTES = 300_000


@pytest.fixture(scope="module")
def delta() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((pull.DELTA_FOLDER / "delta.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def config() -> RsvlmConfig:
    return RsvlmConfig.from_json(pull.DELTA_FOLDER / "config.json")


def test_weights_have_the_stated_hash_and_are_small(delta: dict[str, Any]) -> None:
    assert delta["weights"] == "delta.safetensors"
    weights = (pull.DELTA_FOLDER / "delta.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == delta["sha256"]
    assert len(weights) < LIMIT_BYTES


def test_draft_table_has_the_stated_hash_is_small_and_of_this_vocabulary(delta: dict[str, Any], config: RsvlmConfig) -> None:
    assert list(delta["files"]) == [DRAFTS]
    file = pull.DELTA_FOLDER / DRAFTS
    assert hashlib.sha256(file.read_bytes()).hexdigest() == delta["files"][DRAFTS]
    assert file.stat().st_size < DRAFTS_LIMIT_BYTES
    assert config.language is not None
    table = DraftTable.load(file, config.language.vocab_size)
    assert len(table) > 1000
    assert table.longest >= 3


def test_delta_was_trained_on_the_parts_that_pull_makes(delta: dict[str, Any]) -> None:
    assert delta["base"] == [
        {"part": part.part, "source": f"{part.requirement} {part.member}", "sha256": part.member_sha256}
        for part in pull.BASE_PARTS
    ]


def test_every_tensor_belongs_to_the_model_and_none_is_missing(config: RsvlmConfig) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from rsvlm_infer.models.rsvlm import RsvlmModel

    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in RsvlmModel(config).state_dict().items()}
    with safe_open(pull.DELTA_FOLDER / "delta.safetensors", "numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safetensors file is no dict
    shapes = {name: tensor.shape for name, tensor in found.items()}
    low_rank = {name: shape for name, shape in shapes.items() if name.endswith((".lora_a", ".lora_b"))}
    for name, shape in low_rank.items():  # a pair updates the weight of its module: B [out, r] times A [r, in]
        module, _, part = name.rpartition(".")
        rank = low_rank[f"{module}.lora_a"][0]
        rows, columns = wanted[f"{module}.weight"]
        assert shape == ((rank, columns) if part == "lora_a" else (rows, rank)), name
        assert f"{module}.lora_b" in low_rank
    shapes = {name: shape for name, shape in shapes.items() if name not in low_rank}
    assert {name: wanted.get(name) for name in shapes} == shapes
    assert {name for name in wanted if not name.startswith(BASE_PREFIXES)} - set(shapes) == set()
    assert {"projector.fc1.weight", "projector.fc2.weight", "alignment.text_proj.weight"} <= set(shapes)
    assert {name for name in wanted if name.startswith(("projector.", "alignment."))} <= set(shapes)
    assert [name for name, tensor in found.items() if not np.isfinite(tensor.astype(np.float32)).all()] == []


@pytest.fixture(scope="module")
def model(default_checkpoint: Path) -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    for name in ("delta.safetensors", "config.json"):
        same = (default_checkpoint / name).read_bytes() == (pull.DELTA_FOLDER / name).read_bytes()
        assert same, f"{name} of the default checkpoint is not that of the package; run `rsvlm pull` again"
    from rsvlm_infer import RSVLM

    return RSVLM.from_pretrained(default_checkpoint)


@pytest.fixture(scope="module")
def images(data_root: Path) -> dict[str, list[Path]]:
    """The first test images of each theme."""
    chosen: dict[str, list[Path]] = defaultdict(list)
    for image in read_rsicd(data_root / "rsicd", "test"):
        if image.theme in THEMES and image.path.is_file() and len(chosen[image.theme]) < IMAGES_PER_THEME:
            chosen[image.theme].append(image.path)
    assert {theme: len(paths) for theme, paths in chosen.items()} == dict.fromkeys(THEMES, IMAGES_PER_THEME)
    return chosen


@pytest.mark.wheels
@pytest.mark.data
@pytest.mark.slow
def test_real_checkpoint_knows_six_themes(model: Any, images: dict[str, list[Path]], config: RsvlmConfig) -> None:
    assert model.config == config
    labels = [RSICD_THEMES[theme] for theme in THEMES]
    answers = [
        (path.name, RSICD_THEMES[theme], model.classify(path, labels).label) for theme in THEMES for path in images[theme]
    ]
    right = [name for name, truth, answer in answers if truth == answer]
    assert len(right) >= 9, answers


@pytest.mark.wheels
@pytest.mark.data
@pytest.mark.slow
def test_real_checkpoint_speaks_in_sentences(model: Any, images: dict[str, list[Path]]) -> None:
    for theme in THEMES[:3]:
        text = model.caption(images[theme][0]).text
        assert re.fullmatch(r"[A-Z][a-z]*( [\w',-]+)+\.", text), (theme, text)


@pytest.mark.wheels
@pytest.mark.data
@pytest.mark.slow
@needs_native
def test_the_draft_table_changes_the_speed_and_no_answer(
    default_checkpoint: Path, images: dict[str, list[Path]], config: RsvlmConfig, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="packages are made with torch")
    from rsvlm_export.native import export_native
    from rsvlm_infer import RSVLM
    from rsvlm_infer.engine import Engine

    assert config.language is not None
    model = RSVLM.from_pretrained(export_native(default_checkpoint, tmp_path / "int8", "int8"))
    paths = [path for group in images.values() for path in group]
    model.engine = Engine(model.backend, draft_tokens=0)
    plain = [model.caption(path).token_ids for path in paths]
    model.engine = Engine(
        model.backend,
        draft_table=DraftTable.load(pull.DELTA_FOLDER / DRAFTS, config.language.vocab_size),
        step_times=StepTimes(learn=False),
    )
    assert [model.caption(path).token_ids for path in paths] == plain
    assert model.engine.drafts.acceptance > 0.5
    assert model.engine.drafts.tokens_per_step > 1.5
