"""From folder to model: what is equal after loading, and how all gaps are told at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import CheckpointError, ConfigError, RsvlmError
from rsvlm_infer.models.checkpoint import save_checkpoint
from rsvlm_infer.models.load import load_checkpoint, read_config
from tests.models.tiny import FULL, PLAIN, random_model, torch


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_saved_and_loaded_is_the_same_model(tmp_path: Path, config: RsvlmConfig) -> None:
    model = random_model(config)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m", config, model.state_dict()))
    assert loaded.config == config
    assert loaded.layout == "rsvlm"
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not loaded.model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.model.parameters())


def test_loading_in_inference_mode_gives_ordinary_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", PLAIN, random_model(PLAIN).state_dict())
    with torch.inference_mode():
        model = load_checkpoint(folder).model
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.projector.requires_grad_(True)
    sum(tile.sum() for tile in model.projector(torch.ones(4, 16), torch.tensor([[2, 2]]), None)).backward()
    assert model.projector.fc1.weight.grad is not None


def test_parts_that_are_off_own_no_weights() -> None:
    names = set(random_model(PLAIN).state_dict())
    assert not [
        name for name in names if name.startswith(("alignment", "augmentation", "experts", "text_encoder", "image_newline"))
    ]
    assert {name.split(".")[0] for name in random_model(FULL).state_dict()} == {
        "vision_encoder", "language_model", "projector", "image_newline", "text_encoder", "alignment", "augmentation", "experts",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_applied_to_every_weight(tmp_path: Path, dtype: str) -> None:
    model = random_model(FULL)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m", FULL, model.state_dict()), dtype=dtype)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(getattr(torch, dtype)))


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dtype must be one of .*got 'int8'"):
        load_checkpoint(tmp_path, dtype="int8")


def test_all_gaps_are_told_at_once(tmp_path: Path) -> None:
    state = {name: value.numpy() for name, value in random_model(PLAIN).state_dict().items()}
    del state["language_model.norm.weight"], state["projector.fc2.bias"]
    state["projector.fc1.weight"] = state["projector.fc1.weight"].T
    state["vision_encoder.class_token"] = np.zeros(16, np.int64)
    state["surprise.weight"] = np.zeros(3, np.float32)
    folder = save_checkpoint(tmp_path / "m", PLAIN, state)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "2 missing: language_model.norm.weight, projector.fc2.bias;" in message
    assert "1 unexpected: surprise.weight;" in message
    assert "2 mis-shaped: projector.fc1.weight (expected [20, 16], got [16, 20]), " in message
    assert "vision_encoder.class_token (expected floating point, got torch.int64);" in message
    assert message.endswith("run `rsvlm pull` again, or correct config.json")


def test_long_lists_of_gaps_are_cut(tmp_path: Path) -> None:
    state = {f"surprise.{index:03d}": np.zeros(1, np.float32) for index in range(100)}
    with pytest.raises(CheckpointError, match=r"100 unexpected: surprise\.000, .*surprise\.019, \.\.\.;") as caught:
        load_checkpoint(save_checkpoint(tmp_path / "m", PLAIN, state))
    assert "surprise.020" not in str(caught.value)


def test_blocks_after_the_last_tap_are_known_and_not_loaded(tmp_path: Path) -> None:
    deeper = dataclasses.replace(PLAIN, vision=dataclasses.replace(PLAIN.vision, taps=(1, 2, 4)))
    state = {**random_model(deeper).state_dict(), "vision_encoder.final_norm.weight": torch.ones(16)}
    folder = save_checkpoint(tmp_path / "m", PLAIN, state)  # taps end at 3 of 4 layers
    loaded = load_checkpoint(folder).model
    assert len(loaded.vision_encoder.blocks) == 3
    state = {name.replace("blocks.3.", "blocks.4."): value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"16 unexpected: vision_encoder\.blocks\.4\."):
        load_checkpoint(save_checkpoint(tmp_path / "n", PLAIN, state))  # a fifth block is not this encoder's


def test_unknown_config_keys(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", PLAIN, random_model(PLAIN).state_dict())
    values = json.loads((folder / "config.json").read_text())
    values["vision"]["surprise"] = 1
    values["extra"] = {}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"unknown keys \['extra'\].*config\.vision has unknown keys \['surprise'\]"):
        load_checkpoint(folder)


def test_read_config_needs_no_torch(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", FULL, random_model(FULL).state_dict())
    assert read_config(folder) == FULL
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of torch fails
        "from rsvlm_infer.errors import MissingDependencyError\n"
        "from rsvlm_infer.models.load import load_checkpoint, read_config\n"
        "print(read_config(sys.argv[1]).tiling)\n"
        "try: load_checkpoint(sys.argv[1])\n"
        "except MissingDependencyError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == "anyres"
    assert "rsvlm-infer[torch]" in out.splitlines()[1]


def test_all_files_of_a_folder_are_read_together(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", PLAIN, random_model(PLAIN).state_dict())
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in ("vision_encoder", "language_model", "projector"):
        save_file({name: value for name, value in state.items() if name.startswith(part)}, folder / f"{part}.safetensors")
    loaded = load_checkpoint(folder)
    assert set(loaded.files) == {
        "config.json",
        "vision_encoder.safetensors",
        "language_model.safetensors",
        "projector.safetensors",
    }
    assert np.array_equal(loaded.model.state_dict()["projector.fc1.bias"].numpy(), state["projector.fc1.bias"])


def _paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON values, containers too."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _paths(value, (*path, key))


def _replaced(values: Any, path: tuple[Any, ...], junk: Any) -> Any:
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return copy


def test_junk_in_our_own_config_is_told_in_our_words() -> None:
    values = FULL.to_dict()
    for path in _paths(values):
        for junk in (None, "x", -1, 0, 10**30, 10**400, 1.5, float("nan"), float("inf"), True, [], {}, [[]], ["x"]):
            with contextlib.suppress(RsvlmError):  # a config or our own error, nothing else
                assert isinstance(RsvlmConfig.from_dict(_replaced(values, path, junk)), RsvlmConfig)


def test_sizes_that_are_allowed_but_do_not_fit(tmp_path: Path) -> None:
    """Numbers that a config may hold: the model is never built in memory before its weights fit."""
    folder = save_checkpoint(tmp_path / "m", FULL, random_model(FULL).state_dict())
    values = FULL.to_dict()
    for path in _paths(values):
        for number in (1, 3, 10**12, 10**30):
            (folder / "config.json").write_text(json.dumps(_replaced(values, path, number)))
            with contextlib.suppress(RsvlmError):
                load_checkpoint(folder)


@pytest.mark.parametrize(("part", "layers"), [("vision", 10**9), ("language", 1025), ("text_encoder", 10**30)])
def test_absurd_depths_are_refused_before_anything_is_built(tmp_path: Path, part: str, layers: int) -> None:
    config = dataclasses.replace(FULL, **{part: dataclasses.replace(getattr(FULL, part), num_layers=layers)})
    folder = save_checkpoint(tmp_path / "m", config, random_model(FULL).state_dict())
    with pytest.raises(CheckpointError, match=rf"{part}\.num_layers must be at most 1024, got {layers}"):
        load_checkpoint(folder)
