"""`python -m training`: makes the trained delta of the default checkpoint, step by step; each step resumes where it stopped.

Needs RSICD (RSVLM_DATA, or shared/data beside the repository) and the pulled base parts (`rsvlm pull`).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.pull import BASE_PARTS, DELTA_FOLDER
from rsvlm_infer.text.tokenizer import Tokenizer

from .dataset import read_split
from .delta import write_delta
from .features import compute_features, compute_leaf_features
from .heads import caption_table, text_states, theme_texts, train_heads
from .projector import FeatureStore, train_projector

STEPS = ("features", "heads", "projector", "delta")


def main() -> None:
    """Runs the steps that are asked for, in order."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all, in this order)")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.json"))
    parser.add_argument("--base", type=Path, default=default_checkpoint(), help="folder with the pulled base parts")
    chosen = parser.parse_args()
    unknown = [step for step in chosen.steps if step not in STEPS]
    if unknown:
        parser.error(f"STEP must be of {', '.join(STEPS)}, got {', '.join(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = json.loads(chosen.recipe.read_text(encoding="utf-8"))
    run = Path(recipe["folder"])
    run.mkdir(parents=True, exist_ok=True)
    config = RsvlmConfig.from_json(DELTA_FOLDER / "config.json")
    torch.manual_seed(recipe["seed"])
    model = base_model(config, chosen.base)
    tokenizer = Tokenizer.from_folder(chosen.base)
    actions: dict[str, Callable[[], None]] = {
        "features": lambda: features_step(model, config, recipe, run),
        "heads": lambda: heads_step(model, tokenizer, recipe, run),
        "projector": lambda: projector_step(model, tokenizer, recipe, run),
        "delta": lambda: write_delta(run, DELTA_FOLDER, BASE_PARTS),
    }
    for step in chosen.steps or STEPS:
        actions[step]()


def base_model(config: RsvlmConfig, folder: Path) -> RsvlmModel:
    """The model with its base parts loaded and everything that training makes still at its random start."""
    model = RsvlmModel(config)
    weights = {**load_file(folder / "vision.safetensors"), **load_file(folder / "language.safetensors")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if not name.startswith(("projector.", "alignment."))] + list(unexpected)
    if wrong:
        raise SystemExit(
            f"--base {folder} must hold the base parts of the default checkpoint, these differ: {wrong[:8]}; run rsvlm pull"
        )
    return model.eval()


def features_step(model: RsvlmModel, config: RsvlmConfig, recipe: dict[str, Any], run: Path) -> None:
    """Vision features of train and val, and of the quadrants of a share of train."""
    settings = recipe["features"]
    encoder = model.vision_encoder.to(torch.bfloat16)
    for split in ("val", "train"):
        compute_features(
            encoder,
            config,
            read_split(split),
            run / split,
            salient=settings["salient_patches"],
            batch_images=settings["batch_images"],
        )
    train = read_split("train")
    count = int(len(train) * settings["multi_tile_share"])
    rows = sorted(np.random.default_rng(recipe["seed"]).permutation(len(train))[:count].tolist())
    compute_leaf_features(
        encoder,
        config,
        [train[row] for row in rows],
        run / "train_leaves",
        leaf_grid=settings["leaf_grid"],
        batch_images=settings["batch_images"],
    )
    (run / "train_leaves" / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def heads_step(model: RsvlmModel, tokenizer: Tokenizer, recipe: dict[str, Any], run: Path) -> None:
    """Text states once, then the heads."""
    assert model.alignment is not None and model.language_model is not None
    records = {split: read_split(split) for split in ("train", "val")}
    texts = {
        "themes": theme_texts(records["train"]),
        "val": caption_table(records["val"], vary=False)[0],
        "train": caption_table(records["train"], vary=True)[0],
    }
    model.language_model.to(torch.bfloat16)
    states = {}
    for name, part in texts.items():
        path = run / f"states_{name}.npy"
        if not path.exists():
            found = text_states(model, tokenizer, model.alignment.config.text_template, part)
            with (run / "states.tmp").open("wb") as file:
                np.save(file, found)
            (run / "states.tmp").replace(path)
        states[name] = np.load(path).astype(np.float32)
    metrics = train_heads(model.alignment, {**recipe["heads"], "seed": recipe["seed"]}, run, states, records)
    save_file(model.alignment.state_dict(), run / "heads.safetensors", metadata={"val": json.dumps(metrics)})


def projector_step(model: RsvlmModel, tokenizer: Tokenizer, recipe: dict[str, Any], run: Path) -> None:
    """The projector on the precomputed features."""
    rows = json.loads((run / "train_leaves" / "rows.json").read_text(encoding="utf-8"))
    store = FeatureStore(run, model.config.tile_grid, recipe["features"]["leaf_grid"])
    leaf_rows = {image: row for row, image in enumerate(rows)}
    settings = {**recipe["projector"], "seed": recipe["seed"]}
    train_projector(model, tokenizer, settings, store, read_split("train"), leaf_rows, run)


if __name__ == "__main__":
    main()
