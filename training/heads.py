"""Step 2: the three MS-VLAM heads and the text projection, one InfoNCE per level, on frozen features of images and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from rsvlm_infer.evaluation.datasets import RSICD_THEMES, CaptionedImage
from rsvlm_infer.evaluation.retrieval import retrieval_scores, retrieval_texts
from rsvlm_infer.layers.alignment import Alignment
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.tasks.classify import LABEL_TEMPLATE
from rsvlm_infer.text.tokenizer import Tokenizer


@torch.inference_mode()
def text_states(model: RsvlmModel, tokenizer: Tokenizer, template: str, texts: list[str], batch: int = 64) -> np.ndarray:
    """The language model's last-token state of each text inside the template, [N, Dl] fp16, shortest texts first for speed."""
    encoded = [tokenizer.encode(template.replace("{}", text)) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    assert model.language_model is not None
    states = np.zeros((len(texts), model.language_model.config.hidden_size), np.float16)
    for start in track(range(0, len(order), batch), description="text states"):
        rows = order[start : start + batch]
        lengths = torch.tensor([len(encoded[row]) for row in rows])
        padded = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
        for place, row in enumerate(rows):
            padded[place, : len(encoded[row])] = torch.tensor(encoded[row])
        states[rows] = model.text_states(padded, lengths).float().numpy()
    return states


def caption_table(records: list[CaptionedImage], vary: bool) -> tuple[list[str], list[list[int]]]:
    """All distinct sentences, and for each image the indices of its sentences.

    RSICD ends sentences with " ."; people do not. With `vary` every other sentence is given as a person would type it.
    """
    texts, positives = retrieval_texts({str(record.path): record.captions for record in records})
    index: dict[str, int] = {}
    column = [index.setdefault(text, len(index)) for text in texts]
    owners = [sorted({column[place] for place in np.flatnonzero(row)}) for row in positives]
    shown = [text.replace(" .", "").rstrip() if vary and place % 2 else text for place, text in enumerate(index)]
    return shown, owners


def train_heads(
    alignment: Alignment,
    settings: dict[str, Any],
    features: Path,
    states: dict[str, np.ndarray],
    records: dict[str, list[CaptionedImage]],
) -> dict[str, float]:
    """Trains in place on "train", keeps the weights that do best on "val".

    Args:
        states: "train", "val": text states [N, Dl] in the order of `caption_table`; "themes": [30, Dl].

    Returns:
        Metrics on "val" of the kept weights. Each validation is a line of heads.jsonl in `features`.
    """
    rng = np.random.default_rng(settings["seed"])
    torch.manual_seed(settings["seed"])
    parts = {split: _load(features / split) for split in ("train", "val")}
    tables = {split: caption_table(records[split], split == "train")[1] for split in ("train", "val")}
    themes = themes_of(records["train"])
    theme_of = {split: torch.tensor([themes.index(record.theme) for record in records[split]]) for split in ("train", "val")}
    train_text, theme_text = torch.from_numpy(states["train"]).float(), torch.from_numpy(states["themes"]).float()
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["learning_rate"], total_steps=settings["steps"], pct_start=0.1
    )
    scale = alignment.config.logit_scale
    best: tuple[float, dict[str, Tensor], dict[str, float]] | None = None
    for step in track(range(settings["steps"]), description="heads"):
        rows = rng.choice(len(parts["train"]["regions"]), settings["batch_images"], replace=False)
        chosen = torch.tensor([int(rng.choice(tables["train"][row])) for row in rows])
        images = {name: F.dropout(part[rows], settings["dropout"]) for name, part in parts["train"].items()}
        text = alignment.embed_text(F.dropout(train_text[chosen], settings["dropout"]))  # [B, De]
        theme = alignment.embed_text(theme_text)  # [30, De]
        owns = (chosen[:, None] == chosen[None]).float()  # the same sentence on another image is no negative
        labels = theme_of["train"][rows]
        loss = torch.zeros(())
        for level in level_scores(alignment, images, text), level_scores(alignment, images, theme):
            for score in level:
                if score.shape[1] == len(rows):
                    targets = owns / owns.sum(dim=1, keepdim=True)
                    loss = loss + F.cross_entropy(scale * score, targets) + F.cross_entropy(scale * score.T, targets.T)
                else:
                    loss = loss + settings["theme_weight"] * F.cross_entropy(scale * score, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            metrics = validate(
                alignment, parts["val"], torch.from_numpy(states["val"]).float(), tables["val"], theme_text, theme_of["val"]
            )
            with (features / "heads.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "loss": round(float(loss.detach()), 3), **metrics}) + "\n")
            value = metrics["theme_accuracy"] + metrics["text_to_image_r10"]
            if best is None or value > best[0]:
                best = (value, {name: weight.detach().clone() for name, weight in alignment.state_dict().items()}, metrics)
    assert best is not None
    alignment.load_state_dict(best[1])
    return best[2]


def level_scores(alignment: Alignment, images: dict[str, Tensor], text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [images, texts] of one-tile images at object, region and scene level, as the retrieval score defines them."""
    assert alignment.object is not None and alignment.region is not None and alignment.scene is not None
    objects = torch.einsum("ikd,td->itk", alignment.object(images["objects"]), text).mean(dim=2)
    return objects, alignment.region(images["regions"]) @ text.T, alignment.scene(images["scenes"]) @ text.T


@torch.inference_mode()
def validate(
    alignment: Alignment,
    images: dict[str, Tensor],
    states: Tensor,
    owners: list[list[int]],
    theme_states: Tensor,
    theme: Tensor,
) -> dict[str, float]:
    """Theme accuracy per level and of the weighted score, and R@10 of text to image on the split, with the config's weights."""
    w_scene, w_region, w_object = alignment.config.weights

    def combined(scores: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return w_object * scores[0] + w_region * scores[1] + w_scene * scores[2]

    by_level = level_scores(alignment, images, alignment.embed_text(theme_states))
    accuracy = [float((score.argmax(dim=1) == theme).float().mean()) for score in (*by_level, combined(by_level))]
    similarity = combined(level_scores(alignment, images, alignment.embed_text(states))).numpy()  # [images, texts]
    positives = np.zeros(similarity.shape, np.bool_)
    for image, texts in enumerate(owners):
        positives[image, texts] = True
    recalls = retrieval_scores(similarity, positives)
    return {
        "object_accuracy": accuracy[0],
        "region_accuracy": accuracy[1],
        "scene_accuracy": accuracy[2],
        "theme_accuracy": accuracy[3],
        "text_to_image_r10": recalls.text_to_image_r10,
        "mean_recall": recalls.mean_recall,
    }


def themes_of(records: list[CaptionedImage]) -> list[str]:
    """The themes in sorted order."""
    return sorted({record.theme for record in records})


def theme_texts(records: list[CaptionedImage]) -> list[str]:
    """The label prompts that `classify` uses, in sorted theme order."""
    return [LABEL_TEMPLATE.replace("{label}", RSICD_THEMES[theme]) for theme in themes_of(records)]


def _load(folder: Path) -> dict[str, Tensor]:
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    scenes = np.stack([np.asarray(tokens[row], np.float32).mean(axis=0) for row in range(len(tokens))])
    return {
        "objects": torch.from_numpy(np.load(folder / "objects.npy").astype(np.float32)),
        "regions": torch.from_numpy(np.load(folder / "regions.npy").astype(np.float32)),
        "scenes": torch.from_numpy(scenes),
    }
