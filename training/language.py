"""Stage 2: augmentation, experts, projector and low-rank updates of the language model, on what `samples` teaches.

The vision encoder and the heads are frozen here, yet run live, so every image is seen in new windows and tilings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsvlm_infer.backends.base import Query
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.layers.experts import Experts, LevelRouter
from rsvlm_infer.layers.language_model import LanguageModel
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.text.tokenizer import Tokenizer

from .loop import Group, Loop, ahead
from .samples import Row, Sample, SampleMaker


class LowRank(nn.Module):
    """A frozen Linear plus B·A; B starts at 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return self.base(x) + low  # type: ignore[no-any-return]


def add_low_rank(language: LanguageModel, rank: int) -> dict[str, nn.Parameter]:
    """Wraps every Linear of the decoder layers in place; the new parameters by the names that a delta gives them."""
    found: dict[str, nn.Parameter] = {}
    for name, module in [(name, module) for name, module in language.layers.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        wrapped = LowRank(module, rank)
        setattr(language.layers.get_submodule(parent), leaf, wrapped)
        found[f"language_model.layers.{name}.lora_a"] = wrapped.lora_a
        found[f"language_model.layers.{name}.lora_b"] = wrapped.lora_b
    return found


def low_rank_names(weights: Iterable[str]) -> set[str]:
    """The names of low-rank updates among a delta's weights."""
    return {name for name in weights if name.endswith((".lora_a", ".lora_b"))}


class Balance:
    """The load-balancing loss of the last forward pass: experts · Σ share of tokens · mean probability, per group, 1 = even."""

    def __init__(self, experts: Experts) -> None:
        self.loss: Tensor | None = None
        experts.register_forward_pre_hook(self._measure)

    def _measure(self, experts: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(experts, Experts)
        total = torch.zeros((), device=inputs[0].device)
        for level, features in zip(experts.levels, inputs[1], strict=True):
            assert isinstance(level, LevelRouter)
            size = level.router.out_features
            logits = level.norm(features).float() @ level.router.weight.float().T
            chosen = logits.topk(experts.config.top_k, dim=-1).indices
            share = F.one_hot(chosen, size).float().sum(dim=1).mean(dim=0) / experts.config.top_k
            total = total + size * (share * logits.softmax(dim=-1).mean(dim=0)).sum()
        self.loss = total / len(experts.levels)


def _tie(experts: Experts) -> None:
    """One gradient for all experts: those that start equal stay one dense network."""
    for weight in (experts.w_gate, experts.w_up, experts.w_down):
        if weight is not None and weight.grad is not None:
            weight.grad.copy_(weight.grad.mean(dim=0, keepdim=True).expand_as(weight.grad))


def trainable(model: RsvlmModel) -> dict[str, nn.Parameter]:
    """Everything between the vision encoder and the language model, by its name in the model."""
    prefixes = ("projector.", "augmentation.", "experts.", "image_newline")
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}


@dataclass
class Student:
    """What stages 2 and 3 train: a model made ready, its loop, and what turns samples into visual tokens."""

    backend: EagerBackend
    tokenizer: Tokenizer
    embeddings: dict[str, npt.NDArray[np.float32]]  # alignment embedding [De] of each query
    loop: Loop
    balance: Balance | None

    @property
    def language(self) -> LanguageModel:
        assert self.backend.model.language_model is not None
        return self.backend.model.language_model

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    def visual_tokens(self, samples: Sequence[Sample]) -> Tensor:
        """Visual tokens of all samples in order [N, Dl], with gradients down to the taps."""
        encode = self.tokenizer.encode
        queries = [Query(np.array(encode(item.query), np.int32), self.embeddings[item.query]) for item in samples]
        scenes = [sample.scene for sample in samples]
        with torch.no_grad():
            taps, aligned = self.backend.encode_levels(scenes)
        with torch.autocast(self.device.type, torch.bfloat16):
            tokens, _, _ = self.backend.visual_tokens([tap.float() for tap in taps], aligned, scenes, queries)
        return torch.cat([part for part in tokens if part is not None])

    def embed(self, ids: Tensor, visual: Tensor) -> Tensor:
        """Token ids [R, N] whose placeholders take the rows of `visual` in order -> [R, N, Dl]."""
        places = ids == self.backend.config.image_token_id
        embeds = self.language.embed_tokens(ids.masked_fill(places, 0))
        return embeds.masked_scatter(places[..., None].expand_as(embeds), visual.to(embeds.dtype))  # type: ignore[no-any-return]

    def weighted_loss(self, rows: Sequence[Row], visual: Tensor) -> Tensor:
        """Cross-entropy of all targets, each times its weight, summed."""
        names = ("token_ids", "positions", "mask", "targets", "weights")
        ids, positions, mask, targets, weights = (
            torch.stack([getattr(row, name) for row in rows]).to(self.device) for name in names
        )
        hidden = self.language(self.embed(ids, visual), positions, None, mask)
        wanted = targets >= 0
        losses = F.cross_entropy(self.language.logits(hidden[wanted]).float(), targets[wanted], reduction="none")
        return (losses * weights[wanted]).sum()

    def step(self, loss: Tensor, tied: bool, **shown: float) -> None:
        """Gradients of the loss plus the experts' balance, and one step of the loop."""
        total = loss
        if self.balance is not None and self.balance.loss is not None:
            total = loss + self.loop.settings["balance_weight"] * self.balance.loss
            shown = {"balance": float(self.balance.loss.detach()), **shown}
        total.backward()  # type: ignore[no-untyped-call]
        if tied and self.backend.model.experts is not None:
            _tie(self.backend.model.experts)
        self.loop.update(loss=float(loss.detach()), **shown)


def student(
    model: RsvlmModel,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    knowledge: KnowledgeBase | None,
    embeddings: dict[str, npt.NDArray[np.float32]],
    folder: Path,
    low_rank_start: dict[str, Tensor],
    name: str,
) -> Student:
    """Freezes the encoder and the heads, opens closed gates, adds low-rank updates, and compiles the decoder layers.

    Args:
        low_rank_start: earlier low-rank updates of the same rank to go on from; those absent start at no change.
        name: of the loop's files in `folder`.
    """
    language = model.language_model
    assert language is not None and model.projector is not None and model.alignment is not None
    model.requires_grad_(False)
    model.vision_encoder.to(torch.bfloat16)
    model.alignment.to(torch.bfloat16)
    language.to(torch.bfloat16)
    middle = trainable(model)
    for parameter in middle.values():
        parameter.requires_grad_(True).data = parameter.data.float()
    gates = {key: parameter for key, parameter in middle.items() if key.endswith(".gate")}
    slow = {key: p for key, p in middle.items() if key.startswith(("projector.", "image_newline"))}
    fresh = {key: p for key, p in middle.items() if key not in gates and key not in slow}
    with torch.no_grad():
        for gate in gates.values():
            # A module behind a closed gate gets no gradient, and its gate only noise.
            if abs(float(gate)) < settings["gate_start"]:
                gate.fill_(settings["gate_start"])
    low_rank = add_low_rank(language, settings["rank"]) if settings["rank"] else {}
    with torch.no_grad():
        for key in low_rank.keys() & low_rank_start.keys():
            low_rank[key].copy_(low_rank_start[key])
    groups = [
        Group(low_rank, settings["low_rank_rate"]),
        Group(slow, settings["projector_rate"]),
        Group(fresh, settings["bridge_rate"], settings["weight_decay"]),
        Group(gates, settings["gate_rate"]),
    ]
    loop = Loop(folder, name, [group for group in groups if group.parameters], settings)
    for layer in language.layers:
        layer.compile(dynamic=False)
    balance = Balance(model.experts) if model.experts is not None else None
    return Student(EagerBackend(model, "bfloat16", knowledge), tokenizer, embeddings, loop, balance)


def train_language(pupil: Student, maker: SampleMaker) -> None:
    """Trains in place until the steps or the minutes are used up."""
    loop, settings = pupil.loop, pupil.loop.settings
    knowledge = pupil.backend.knowledge
    rng = np.random.default_rng(settings["seed"] + loop.step)
    maker.rng = np.random.default_rng(settings["seed"] + loop.step)  # a resumed run does not repeat what was seen
    batches = ahead(batches_of(maker, settings))
    for _ in loop:
        rows = next(batches)
        pupil.backend.knowledge = knowledge if rng.random() >= settings["knowledge_dropout"] else None
        samples = [sample for row in rows for sample in row.samples]
        loss = pupil.weighted_loss(rows, pupil.visual_tokens(samples)) / sum(float(row.weights.sum()) for row in rows)
        pupil.step(loss, settings.get("tied_experts", False), images=len(samples))


def batches_of(maker: SampleMaker, settings: dict[str, Any]) -> Iterator[list[Row]]:
    """Rows of one step, endlessly; every `long_every`-th step has fewer, longer rows, which hold larger budgets."""
    short = maker.rows(settings["row_tokens"], settings["budgets"])
    long = maker.rows(settings["long_row_tokens"], settings["long_budgets"])
    while True:
        for place in range(settings["long_every"]):
            is_long = place == settings["long_every"] - 1
            yield [next(long if is_long else short) for _ in range(settings["long_rows" if is_long else "rows"])]
