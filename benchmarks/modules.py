"""`python -m benchmarks.modules`: what each module of the default checkpoint is worth, on RSICD's val split and EuroSAT's test folder.

A module is switched off in the trained model (its gate set to 0, or its option changed) and everything is measured again. That flatters a
module a little, because the rest was trained beside it. Models with other experts (`python -m training variants`) come by `--variant`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rsvlm_infer import RSVLM
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.evaluation.captions import caption_scores
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, class_words, read_class_folders, read_rsicd
from rsvlm_infer.evaluation.retrieval import retrieval_scores, retrieval_texts
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.tasks.classify import LABEL_TEMPLATE
from rsvlm_infer.tasks.retrieve import alignment_scores
from training.samples import THEME_QUESTION

from .rows import RESULTS, about, append_rows

# (scene, region, object) weights of the retrieval score
WEIGHTS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.5, 0.0), (0.6, 0.3, 0.1))


def without_augmentation(model: RSVLM) -> None:
    """Gates of the cross-attention to 0."""
    for gate in _gated(_backend(model).model.augmentation):
        gate.zero_()


def without_experts(model: RSVLM) -> None:
    """Gates of the experts to 0."""
    for gate in _gated(_backend(model).model.experts):
        gate.zero_()


def without_knowledge(model: RSVLM) -> None:
    """The query alone augments."""
    _backend(model).knowledge = None


def one_expert(model: RSVLM) -> None:
    """The best expert of each group instead of the best two."""
    experts = _backend(model).model.experts
    assert experts is not None
    experts.config = dataclasses.replace(experts.config, top_k=1)


def _backend(model: RSVLM) -> EagerBackend:
    assert isinstance(model.backend, EagerBackend)
    return model.backend


def _gated(module: nn.Module | None) -> list[torch.Tensor]:
    assert module is not None
    return [parameter.data for name, parameter in module.named_parameters() if name.endswith(".gate")]


def unchanged(model: RSVLM) -> None:
    """The trained model."""


VARIANTS: dict[str, tuple[Callable[[RSVLM], None], dict[str, Any]]] = {
    "full": (unchanged, {}),
    "without DRIS (fixed tiling)": (unchanged, {"tiling": "fixed"}),
    "without cues (query only)": (without_knowledge, {}),
    "without augmentation": (without_augmentation, {}),
    "without experts": (without_experts, {}),
    "top-1 of each group": (one_expert, {}),
}


def answers(model: RSVLM, data: Path, images: int, options: dict[str, Any]) -> dict[str, float]:
    """Captions and closed answers of the language model on evenly spaced images."""
    records = spaced(read_rsicd(data / "rsicd", "val"), images)
    started = time.perf_counter()
    texts = [
        answer.text for answer in model.caption_many([r.path for r in records], batch_size=4, max_new_tokens=32, **options)
    ]
    seconds = (time.perf_counter() - started) / len(records)
    references = {str(record.path): record.captions for record in records}
    scores = caption_scores(dict(zip(references, texts, strict=True)), references)
    themes = [word[:1].upper() + word[1:] for word in RSICD_THEMES.values()]
    right = [
        model.ask(record.path, THEME_QUESTION, choices=themes, **options).text.lower() == RSICD_THEMES[record.theme]
        for record in records
    ]
    shown = spaced(read_class_folders(data / "eurosat" / "test"), images)
    classes = {image.label: class_words(image.label) for image in read_class_folders(data / "eurosat" / "test")}
    words = [word[:1].upper() + word[1:] for word in classes.values()]
    named = [
        model.ask(image.path, THEME_QUESTION, choices=words, **options).text.lower() == classes[image.label] for image in shown
    ]
    return {
        "cider": round(scores.cider, 4),
        "bleu_4": round(scores.bleu_4, 4),
        "theme_answer": round(float(np.mean(right)), 4),
        "eurosat_answer": round(float(np.mean(named)), 4),
        "caption_seconds": round(seconds, 3),
    }


def level_weights(model: RSVLM, data: Path, images: int) -> list[dict[str, float]]:
    """Closed-set accuracy and retrieval for several weights of scene, region and object, from one pass over the images."""
    alignment = model.config.alignment
    assert alignment is not None
    records = spaced(read_rsicd(data / "rsicd", "val"), images)
    shown = spaced(read_class_folders(data / "eurosat" / "test"), images)
    themes = sorted(RSICD_THEMES)
    classes = sorted({image.label for image in read_class_folders(data / "eurosat" / "test")})
    sentences, positives = retrieval_texts({str(record.path): record.captions for record in records})
    texts = {
        "theme": model.embed_text([LABEL_TEMPLATE.replace("{label}", RSICD_THEMES[theme]) for theme in themes]),
        "eurosat": model.embed_text([LABEL_TEMPLATE.replace("{label}", class_words(name)) for name in classes]),
        "sentences": model.embed_text(sentences),
    }
    found = {
        "theme": [model.embed_levels(record.path) for record in records],
        "eurosat": [model.embed_levels(image.path) for image in shown],
    }
    truth = {
        "theme": np.array([themes.index(record.theme) for record in records]),
        "eurosat": np.array([classes.index(image.label) for image in shown]),
    }
    rows = []
    for weights in WEIGHTS:
        weighted = dataclasses.replace(alignment, weights=weights)
        row: dict[str, float] = dict(zip(("scene", "region", "object"), (round(w, 3) for w in weights), strict=True))
        row["images"] = len(records)
        for name in ("theme", "eurosat"):
            scores = np.stack([alignment_scores(image, texts[name], weighted) for image in found[name]])
            row[name] = round(float((scores.argmax(axis=1) == truth[name]).mean()), 4)
        similarity = np.stack([alignment_scores(image, texts["sentences"], weighted) for image in found["theme"]])
        row["mean_recall"] = round(retrieval_scores(similarity, positives).mean_recall, 4)
        rows.append(row)
    return rows


def spaced(items: list[Any], count: int) -> list[Any]:
    """`count` items at even distances: the sets are sorted by class."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def main() -> None:
    """Both tables, printed and appended to modules.csv and level-weights.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modules", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with rsicd and eurosat")
    parser.add_argument("--images", type=int, default=300, help="of each set")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--variant", type=Path, nargs="*", default=[], help="more checkpoint folders to measure beside it")
    parser.add_argument("--knowledge", type=Path, help="folder of a built knowledge base; without one the query alone augments")
    parser.add_argument("--precision", default="auto")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print("| variant | CIDEr | BLEU-4 | theme answer | EuroSAT answer | s/caption |\n|---|---:|---:|---:|---:|---:|")
    jobs = [(name, chosen.checkpoint, change, options) for name, (change, options) in VARIANTS.items()]
    jobs += [(folder.name, folder, unchanged, {}) for folder in chosen.variant]
    for name, folder, change, options in jobs:
        model = RSVLM.from_pretrained(folder, "auto", chosen.precision)
        if chosen.knowledge:
            _backend(model).knowledge = KnowledgeBase.load(chosen.knowledge)
        change(model)
        values = answers(model, chosen.data, chosen.images, options)
        rows.append({**about(model, folder), "variant": name, "images": chosen.images, **values})
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |", flush=True)
    append_rows(RESULTS / "modules.csv", rows)
    model = RSVLM.from_pretrained(chosen.checkpoint, "auto", chosen.precision)
    weights = level_weights(model, chosen.data, chosen.images)
    print("\n| scene | region | object | theme | EuroSAT | mean recall |\n|---:|---:|---:|---:|---:|---:|")
    for row in weights:
        print(
            f"| {row['scene']} | {row['region']} | {row['object']} | {row['theme']} | {row['eurosat']} | {row['mean_recall']} |"
        )
    append_rows(RESULTS / "level-weights.csv", [{**about(model, chosen.checkpoint), **row} for row in weights])


if __name__ == "__main__":
    main()
