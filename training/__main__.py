"""`python -m training`: makes the trained delta of the default checkpoint, stage by stage; each stage resumes where it stopped.

Needs RSICD, EuroSAT and RSSCN7 (RSVLM_DATA, or shared/data beside the repository) and the pulled base parts (`rsvlm pull`);
RSVQA-LR is used when it is there (RSVLM_RSVQA, or rsvqa beside the other sets).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsvlm_infer.config import ExpertsConfig, RsvlmConfig
from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.knowledge.mine import mine, read_lexicon, read_scenes
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.pull import BASE_PARTS, DELTA_FOLDER
from rsvlm_infer.text.tokenizer import Tokenizer

from .dataset import Labelled, read_labelled, read_questions, read_split
from .delta import state_drafts, write_delta
from .drafts import chosen_images, collect_answers, write_table
from .language import Student, low_rank_names, student, train_language
from .loop import trained_weights
from .reward import train_reward
from .samples import SampleMaker, consensus
from .texts import (
    caption_table,
    kept_states,
    label_texts,
    refit_text_projection,
    text_embeddings,
    text_states,
    theme_words,
    themes_of,
)
from .vision import VisionData, train_vision

_log = logging.getLogger(__name__)

STAGES = ("vision", "language", "reward", "texts", "delta")
EXTRA = ("variants", "drafts")  # asked for by name; drafts after `rsvlm pull` has made the checkpoint of the new delta

# Variants of the experts, all of equal active size: two of 256 hidden units, or one of 512. Modules are left out without training:
# `python -m benchmarks.modules` switches them off.
VARIANTS: dict[str, ExpertsConfig | None] = {
    "full": None,
    "dense": ExpertsConfig(num_experts=3, top_k=1, intermediate_size=512),  # its three experts stay one network
    "level": ExpertsConfig(num_experts=3, top_k=1, intermediate_size=512),
}


@dataclass(frozen=True)
class Run:
    """One recipe on one machine: where things are, and the data that stages share."""

    recipe: dict[str, Any]
    base: Path
    fresh: bool
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the config, for a variant of the model
    without: tuple[str, ...] = ()  # beginnings of weight names that the packaged delta does not give: they start anew

    @cached_property
    def folder(self) -> Path:
        folder = Path(self.recipe["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def config(self) -> RsvlmConfig:
        return dataclasses.replace(RsvlmConfig.from_json(DELTA_FOLDER / "config.json"), **self.changes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.base)

    @cached_property
    def sets(self) -> dict[str, Labelled]:
        return {name: read_labelled(name) for name in ("eurosat", "rsscn7")}

    def settings(self, stage: str) -> dict[str, Any]:
        return {**self.recipe[stage], "seed": self.recipe["seed"]}

    def model(self, *stages: str) -> RsvlmModel:
        """The base parts, the packaged delta unless `fresh`, and what `stages` of this run trained; the rest is random."""
        torch.manual_seed(self.recipe["seed"])
        model = RsvlmModel(self.config)
        weights = {**load_file(self.base / "vision.safetensors"), **load_file(self.base / "language.safetensors")}
        known = set(model.state_dict())
        if not self.fresh:
            delta = load_file(DELTA_FOLDER / "delta.safetensors")
            kept = {name: tensor for name, tensor in delta.items() if not name.startswith(self.without)}
            weights |= {name: tensor.float() for name, tensor in kept.items() if name in known}
        for stage in stages:
            weights |= {name: tensor for name, tensor in trained_weights(self.folder, stage).items() if name in known}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        trained = ("projector.", "alignment.", "augmentation.", "experts.", "image_newline")
        wrong = [name for name in missing if not name.startswith(trained)] + list(unexpected)
        if wrong:
            raise SystemExit(
                f"--base {self.base} must hold the base parts of the default checkpoint, these differ: {wrong[:8]}; run rsvlm pull"
            )
        return model.eval()

    def low_rank(self) -> dict[str, Tensor]:
        """The packaged low-rank updates, where a new run goes on."""
        delta = {} if self.fresh else load_file(DELTA_FOLDER / "delta.safetensors")
        return {name: tensor.float() for name, tensor in delta.items() if name in low_rank_names(delta)}


def main() -> None:
    """Runs the stages that are asked for, in order."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"of {', '.join(STAGES)} (default: all, in this order), or {', '.join(EXTRA)}",
    )
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.json"))
    parser.add_argument("--base", type=Path, default=default_checkpoint(), help="folder with the pulled base parts")
    parser.add_argument("--fresh", action="store_true", help="start from the base parts, not from the packaged delta")
    chosen = parser.parse_args()
    unknown = [stage for stage in chosen.stages if stage not in (*STAGES, *EXTRA)]
    if unknown:
        parser.error(f"STAGE must be of {', '.join((*STAGES, *EXTRA))}, got {', '.join(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    run = Run(json.loads(chosen.recipe.read_text(encoding="utf-8")), chosen.base, chosen.fresh)
    actions: dict[str, Callable[[Run], None]] = {
        "vision": vision_stage,
        "language": language_stage,
        "reward": reward_stage,
        "texts": texts_stage,
        "delta": delta_stage,
        "variants": variants_stage,
        "drafts": drafts_stage,
    }
    for stage in chosen.stages or STAGES:
        actions[stage](run)


def vision_stage(run: Run) -> None:
    """Text states once, then the encoder's last blocks and the heads."""
    model = run.model()
    assert model.language_model is not None
    model.language_model.to(torch.bfloat16)
    records = read_split("train")
    sentences, owners = caption_table(records, vary=True)
    states = {
        "train": kept_states(run.folder / "states_train.npy", model, run.tokenizer, sentences),
        "rsicd": text_states(model, run.tokenizer, label_texts(theme_words(records))),
    }
    states |= {name: text_states(model, run.tokenizer, label_texts(part.words)) for name, part in run.sets.items()}
    model.language_model = None  # its memory is worth more than its company
    themes = themes_of(records)
    settings = run.settings("vision")
    data = VisionData(
        [record.path for record in records],
        owners,
        [themes.index(record.theme) for record in records],
        run.sets,
        settings["seed"],
    )
    train_vision(model, settings, data, states, run.folder)


def language_stage(run: Run) -> None:
    """Augmentation, experts, projector and low-rank updates."""
    train_language(*prepared(run, run.model("vision"), run.settings("language"), "language", run.low_rank()))


def reward_stage(run: Run) -> None:
    """The same parameters once more, by the reward of sampled captions."""
    trained = trained_weights(run.folder, "language")
    low_rank = {name: trained[name] for name in low_rank_names(trained)}
    settings = {**run.settings("language"), **run.recipe["reward"]}
    train_reward(*prepared(run, run.model("vision", "language"), settings, "reward", low_rank))


def prepared(
    run: Run, model: RsvlmModel, settings: dict[str, Any], name: str, low_rank_start: dict[str, Tensor]
) -> tuple[Student, SampleMaker]:
    """Embeds the knowledge base and all queries once; what the stages after `vision` train, and what draws their samples."""
    assert model.language_model is not None and model.alignment is not None
    model.language_model.to(torch.bfloat16)
    records = read_split("train")
    maker = SampleMaker(
        run.tokenizer, run.config, settings, records, consensus(records), run.sets, read_questions("train"), settings["seed"]
    )
    entries = mine([(record.theme, record.captions) for record in records], read_lexicon(), read_scenes())
    texts = [*maker.queries, *(entry.text for entry in entries)]
    vectors = text_embeddings(model, run.tokenizer, model.alignment, texts)
    asked = len(maker.queries)
    knowledge = KnowledgeBase(texts[asked:], np.array([entry.level for entry in entries], np.int8), vectors[asked:])
    embeddings = dict(zip(maker.queries, vectors[:asked], strict=True))
    return student(model, run.tokenizer, settings, knowledge, embeddings, run.folder, low_rank_start, name), maker


def variants_stage(run: Run) -> None:
    """Each variant of the experts trained for the same few steps from the same start.

    Experts start anew in all of them, the full model too; augmentation, projector and low-rank updates go on from the reward stage.
    Each becomes a checkpoint folder for `python -m benchmarks.modules --variant`.
    """
    trained = trained_weights(run.folder, "reward")
    kept = {
        name: tensor for name, tensor in trained.items() if name.startswith(("augmentation.", "projector.", "image_newline"))
    }
    low_rank = {name: trained[name] for name in low_rank_names(trained)}
    for name, experts in VARIANTS.items():
        changes = {} if experts is None else {"experts": experts}
        variant = dataclasses.replace(run, changes=changes, without=("experts.",))
        model = variant.model("vision")
        model.load_state_dict(kept, strict=False)
        if name == "dense" and model.experts is not None:
            with torch.no_grad():
                for weight in (model.experts.w_gate, model.experts.w_up, model.experts.w_down):
                    assert weight is not None
                    weight.copy_(weight[:1].expand_as(weight))
        settings = {**run.settings("language"), **run.recipe["variants"], "tied_experts": name == "dense"}
        train_language(*prepared(variant, model, settings, f"variant-{name}", low_rank))
        weights = load_file(DELTA_FOLDER / "delta.safetensors")
        weights = {key: value for key, value in weights.items() if not key.startswith("experts.")}
        weights |= trained_weights(run.folder, f"variant-{name}")
        folder = run.folder / "variants" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in run.base.iterdir():
            if path.is_file() and not path.name.startswith("delta") and not (folder / path.name).exists():
                os.link(path, folder / path.name)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(variant.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_delta(weights, folder, BASE_PARTS)


def texts_stage(run: Run) -> None:
    """The text projection again, because the low-rank updates moved the language model's states."""
    settings = run.settings("texts")
    sentences, _ = caption_table(read_split("train"), vary=True)
    rows = np.random.default_rng(settings["seed"]).permutation(len(sentences))[: settings["sentences"]]
    labels = label_texts([*theme_words(read_split("train")), *(word for part in run.sets.values() for word in part.words)])
    chosen = [sentences[row] for row in rows]
    model = run.model("vision")
    assert model.language_model is not None and model.alignment is not None
    model.language_model.to(torch.bfloat16)
    kept = kept_states(run.folder / "states_train.npy", model, run.tokenizer, sentences)
    before = np.concatenate((kept[rows], text_states(model, run.tokenizer, labels)))
    merge_low_rank(model, trained_weights(run.folder, "reward"))
    after = text_states(model, run.tokenizer, [*chosen, *labels])
    cosine = refit_text_projection(model.alignment, before, after, settings["ridge"])
    _log.info("texts: mean cosine between old and new embeddings %.4f", cosine)
    weights = {f"alignment.{name}": tensor.contiguous() for name, tensor in model.alignment.state_dict().items()}
    save_file(
        {f"weight.{name}": tensor for name, tensor in weights.items() if ".text_proj." in name},
        run.folder / "texts.safetensors",
    )
    (run.folder / "texts.jsonl").write_text(json.dumps({"sentences": len(after), "cosine": round(cosine, 4)}) + "\n")


def merge_low_rank(model: RsvlmModel, weights: dict[str, Tensor]) -> None:
    """W += B·A for every pair."""
    for name in low_rank_names(weights):
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            weight = model.get_parameter(f"{module}.weight")
            update = weights[f"{module}.lora_b"].float() @ weights[name].float()
            with torch.no_grad():
                weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))


def delta_stage(run: Run) -> None:
    """Everything that was trained, over the packaged delta."""
    weights = {} if run.fresh else load_file(DELTA_FOLDER / "delta.safetensors")
    for stage in ("vision", "reward", "texts"):
        weights |= trained_weights(run.folder, stage)
    write_delta(weights, DELTA_FOLDER, BASE_PARTS)
    logs = Path(__file__).with_name("logs")
    logs.mkdir(exist_ok=True)
    for path in sorted(run.folder.glob("*.jsonl")):
        shutil.copyfile(path, logs / path.name)


def drafts_stage(run: Run) -> None:
    """The table that guesses next tokens, from captions of train images by the pulled checkpoint as a native package."""
    from rsvlm_export.native import export_native
    from rsvlm_infer import RSVLM

    settings = run.settings("drafts")
    with tempfile.TemporaryDirectory(dir=run.folder) as scratch:
        model = RSVLM.from_pretrained(export_native(run.base, Path(scratch) / "package", settings["precision"]))
        paths = chosen_images([record.path for record in read_split("train")], settings)
        answers = collect_answers(model, paths, run.folder / "drafts.jsonl", settings["batch"])
    write_table(answers, settings["longest"], DELTA_FOLDER / DRAFTS)
    state_drafts(DELTA_FOLDER)


if __name__ == "__main__":
    main()
