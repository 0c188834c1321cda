"""Step 3: the projector, on captions and theme questions, through the frozen language model. Resumable every few steps.

Several samples share one row of tokens. Inside a sample all answers branch off one image: each branch sees the image and itself,
so an image is paid for once however many sentences it has.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, CaptionedImage
from rsvlm_infer.layers.projector import Projector
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.text.chat import encode_prompt
from rsvlm_infer.text.tokenizer import Tokenizer

from .dataset import distinct_captions

_log = logging.getLogger(__name__)

THEME_QUESTION = "What kind of place is this?"
PRESENCE_QUESTION = "Is there a {theme} in this image? Answer yes or no."


@dataclass(frozen=True)
class Sample:
    """One image: the prompt up to its last placeholder, the caption question without its last token, and the branches.

    A branch is (token ids, how many of them at the end are the answer, weight of the answer).
    Captions follow the caption question; the last branch, when `asks`, holds its own question and follows the image directly.
    """

    image: int
    leaves: int  # row in the leaf features, -1 = base tile only
    prefix: list[int]
    stem: list[int]
    branches: list[tuple[list[int], int, float]]
    asks: bool

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.stem) + sum(len(ids) for ids, _, _ in self.branches)


@dataclass(frozen=True)
class Row:
    """A packed row: token ids, rotation positions, targets (-100 = none), target weights, mask, and the samples in it."""

    token_ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor
    samples: list[Sample]


class SampleMaker:
    """Draws samples: captions of one image, plus a theme or a presence question whose answer is certain from the label."""

    def __init__(
        self, tokenizer: Tokenizer, config: RsvlmConfig, records: list[CaptionedImage], leaf_rows: dict[int, int], seed: int
    ):
        self.tokenizer, self.config, self.records, self.leaf_rows = tokenizer, config, records, leaf_rows
        self.rng = np.random.default_rng(seed)
        self.themes = sorted(set(RSICD_THEMES.values()))
        self.end = list(config.eos_token_ids[:1])
        shuffle = config.projector.pixel_shuffle if config.projector is not None else 1
        self.base_tokens = config.tile_grid**2 // shuffle**2

    def draw(self, image: int, max_captions: int, leaf_tokens: int) -> Sample:
        """One sample of one image; half of the images that have leaf features show them."""
        record = self.records[image]
        leaves = self.leaf_rows.get(image, -1) if self.rng.random() < 0.5 else -1
        visual = self.base_tokens + (leaf_tokens if leaves >= 0 else 0)
        captions = distinct_captions(record.captions)
        order = self.rng.permutation(len(captions))[:max_captions]
        total = sum(captions[place][1] for place in order)
        prefix, stem = self._split(CAPTION_PROMPT, visual)
        answers = [self.tokenizer.encode(captions[place][0]) + self.end for place in order]
        # The question's last token predicts the first word, so each branch has its own copy of it.
        branches = [(stem[-1:] + ids, len(ids), captions[place][1] / total) for ids, place in zip(answers, order, strict=True)]
        asks = bool(self.rng.random() < 0.5)
        if asks:
            question, answer = self._question(RSICD_THEMES[record.theme])
            ids = self.tokenizer.encode(answer) + self.end
            branches.append((self._split(question, visual)[1] + ids, len(ids), 0.5))
        return Sample(image, leaves, prefix, stem[:-1], branches, asks)

    def _question(self, theme: str) -> tuple[str, str]:
        """A question whose answer is certain from the theme."""
        if self.rng.random() < 0.5:
            return THEME_QUESTION, theme[:1].upper() + theme[1:]
        if self.rng.random() < 0.5:
            return PRESENCE_QUESTION.replace("{theme}", theme), "Yes"
        other = str(self.rng.choice([name for name in self.themes if name != theme]))
        return PRESENCE_QUESTION.replace("{theme}", other), "No"

    def _split(self, question: str, visual: int) -> tuple[list[int], list[int]]:
        """The prompt's ids up to its last placeholder, and the rest."""
        template, image_id, bos = self.config.chat_template, self.config.image_token_id, self.config.bos_token_id
        ids = [int(i) for i in encode_prompt(self.tokenizer, template, question, visual, image_id, bos)]
        start = len(ids) - ids[::-1].index(image_id)
        return ids[:start], ids[start:]

    def rows(self, row_tokens: int, max_captions: int, leaf_tokens: int) -> Iterator[Row]:
        """Endless epochs of packed rows, images in a new order each time."""
        waiting: list[Sample] = []
        while True:
            for image in self.rng.permutation(len(self.records)):
                sample = self.draw(int(image), max_captions, leaf_tokens)
                if sum(item.length for item in waiting) + sample.length > row_tokens:
                    yield pack_row(waiting, row_tokens)
                    waiting = []
                waiting.append(sample)


def pack_row(samples: list[Sample], row_tokens: int) -> Row:
    """Lays samples side by side; a token sees what comes before it on its own branch and nothing else."""
    ids = np.zeros(row_tokens, np.int64)
    positions = np.zeros(row_tokens, np.int64)
    targets = np.full(row_tokens, -100, np.int64)
    weights = np.zeros(row_tokens, np.float32)
    mask = np.eye(row_tokens, dtype=np.bool_)  # unused places see themselves: a softmax over nothing is NaN
    at = 0
    for sample in samples:
        image = np.arange(at, at + len(sample.prefix))
        stem = np.arange(image.size + at, image.size + at + len(sample.stem))
        parts = [(sample.prefix, 0, 0.0, []), (sample.stem, 0, 0.0, [image])]
        parts += [(part, answer, weight, [image, stem]) for part, answer, weight in sample.branches]
        if sample.asks:
            parts[-1] = (*parts[-1][:3], [image])
        for part, answer, weight, before in parts:
            stop = at + len(part)
            seen = sum(len(places) for places in before)
            ids[at:stop] = part
            positions[at:stop] = np.arange(len(part)) + seen
            for places in before:
                mask[at:stop, places] = True
            mask[at:stop, at:stop] = np.tri(len(part), dtype=np.bool_)
            if answer:
                targets[stop - answer - 1 : stop - 1] = part[-answer:]
                weights[stop - answer - 1 : stop - 1] = weight
            at = stop
    return Row(*(torch.from_numpy(part) for part in (ids, positions, targets, weights, mask)), samples)


class FeatureStore:
    """Precomputed vision features on disk, read as needed."""

    def __init__(self, folder: Path, grid: int, leaf_grid: int) -> None:
        self.tokens = np.load(folder / "train" / "tokens.npy", mmap_mode="r")
        self.leaves = np.load(folder / "train_leaves" / "leaves.npy", mmap_mode="r")
        self.grid, self.leaf_grid = grid, leaf_grid

    def gather(self, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [S, Dv], grids [T, 2], boxes [T, 4] of all tiles of all samples, in order."""
        features, grids, boxes = [], [], []
        for sample in samples:
            features.append(np.asarray(self.tokens[sample.image], np.float32))
            grids.append((self.grid, self.grid))
            boxes.append((0.5, 0.5, 1.0, 1.0))
            if sample.leaves >= 0:
                features.extend(np.asarray(self.leaves[sample.leaves], np.float32))
                grids.extend([(self.leaf_grid, self.leaf_grid)] * 4)
                boxes.extend([(x, y, 0.5, 0.5) for y in (0.25, 0.75) for x in (0.25, 0.75)])
        return torch.from_numpy(np.concatenate(features)), torch.tensor(grids), torch.tensor(boxes)


def train_projector(
    model: RsvlmModel,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    store: FeatureStore,
    records: list[CaptionedImage],
    leaf_rows: dict[int, int],
    folder: Path,
) -> None:
    """Trains model.projector in fp32 through the language model in bf16, until the steps or the minutes are used up."""
    assert model.language_model is not None and model.projector is not None
    config, projector = model.config, model.projector.float()
    language = model.language_model.to(torch.bfloat16).requires_grad_(False)
    forward = torch.compile(language, dynamic=False)
    step, seconds = _resume(folder, projector)
    if step == 0:
        _calibrate(projector, language, store)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    _resume_optimizer(folder, projector, optimizer)
    shuffle = projector.pixel_shuffle**2
    leaf_tokens = 4 * store.leaf_grid**2 // shuffle
    # Each run of the loop starts at a fresh place of the random stream, so a resumed run does not repeat what was seen.
    rows = SampleMaker(tokenizer, config, records, leaf_rows, settings["seed"] + step).rows(
        settings["row_tokens"], settings["max_captions"], leaf_tokens
    )
    log = folder / "projector.jsonl"
    started = time.monotonic() - seconds
    with Progress() as progress:
        task = progress.add_task("projector", total=settings["steps"], completed=step)
        while step < settings["steps"] and time.monotonic() - started < settings["minutes"] * 60:
            # The rate follows whichever is nearer to its end, steps or minutes, so that it always decays to 0.
            done = max(step / settings["steps"], (time.monotonic() - started) / (settings["minutes"] * 60))
            rate = (
                settings["learning_rate"]
                * min(1.0, (step + 1) / settings["warmup_steps"])
                * 0.5
                * (1 + math.cos(math.pi * done))
            )
            optimizer.param_groups[0]["lr"] = rate
            loss = _step([next(rows) for _ in range(settings["rows"])], config, projector, language, forward, store)
            norm = torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update(task, completed=step, description=f"projector loss {loss:.3f}")
            with log.open("a", encoding="utf-8") as file:
                row = {"step": step, "loss": round(loss, 4), "rate": rate, "norm": round(float(norm), 3)}
                file.write(json.dumps({**row, "seconds": round(time.monotonic() - started)}) + "\n")
            if step % settings["save_every"] == 0 or step == settings["steps"]:
                _save(folder, projector, optimizer, step, time.monotonic() - started)
    _save(folder, projector, optimizer, step, time.monotonic() - started)


def _step(
    rows: list[Row], config: RsvlmConfig, projector: Projector, language: Any, forward: Any, store: FeatureStore
) -> float:
    ids = torch.stack([row.token_ids for row in rows])  # [R, N]
    places = ids == config.image_token_id
    embeds = language.embed_tokens(ids.masked_fill(places, 0))
    features, grids, boxes = store.gather([sample for row in rows for sample in row.samples])
    visual = torch.cat(projector(features, grids, boxes)).to(embeds.dtype)
    embeds = embeds.masked_scatter(places[..., None].expand_as(embeds), visual)
    hidden = forward(embeds, torch.stack([row.positions for row in rows]), None, torch.stack([row.mask for row in rows]))
    targets, weights = torch.stack([row.targets for row in rows]), torch.stack([row.weights for row in rows])
    wanted = targets >= 0
    logits = language.logits(hidden[wanted]).float()
    losses = F.cross_entropy(logits, targets[wanted], reduction="none")
    loss = (losses * weights[wanted]).sum() / weights.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


@torch.no_grad()
def _calibrate(projector: Projector, language: Any, store: FeatureStore) -> None:
    """Scales the output so that visual tokens start as long as word embeddings are."""
    features = torch.from_numpy(np.asarray(store.tokens[:32], np.float32)).flatten(0, 1)
    tokens = torch.cat(projector(features, torch.full((32, 2), store.grid), None))
    factor = language.embed_tokens.weight.float().square().mean().sqrt() / tokens.square().mean().sqrt()
    projector.fc2.weight.mul_(factor)
    projector.fc2.bias.mul_(factor)


def _save(folder: Path, projector: Projector, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    names = {parameter: name for name, parameter in projector.named_parameters()}
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in projector.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}.{names[parameter]}"] = state[key].detach().clone()
    temporary = folder / "projector.tmp"
    save_file(tensors, temporary, metadata={"step": str(step), "seconds": str(seconds)})
    temporary.replace(folder / "projector.safetensors")


def _resume(folder: Path, projector: Projector) -> tuple[int, float]:
    path = folder / "projector.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    projector.load_state_dict({name: tensors[f"weight.{name}"] for name in projector.state_dict()})
    _log.info("resumed at step %s", metadata["step"])
    return int(metadata["step"]), float(metadata["seconds"])


def _resume_optimizer(folder: Path, projector: Projector, optimizer: torch.optim.Optimizer) -> None:
    path = folder / "projector.safetensors"
    if path.exists():
        tensors = load_file(path)
        for name, parameter in projector.named_parameters():
            if f"exp_avg.{name}" in tensors:
                optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
