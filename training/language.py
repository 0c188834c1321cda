"""Stage 2: augmentation, experts, projector and low-rank updates of the language model, on what `samples` teaches.

The vision encoder and the heads are frozen here, yet run live, so every image is seen in new windows and tilings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from .samples import Row, SampleMaker


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


def train_language(
    model: RsvlmModel,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    maker: SampleMaker,
    knowledge: KnowledgeBase | None,
    embeddings: dict[str, npt.NDArray[np.float32]],
    folder: Path,
    low_rank_start: dict[str, Tensor],
    name: str = "language",
) -> None:
    """Trains in place until the steps or the minutes are used up.

    Args:
        embeddings: alignment embedding [De] of each text in `maker.queries`.
        low_rank_start: earlier low-rank updates of the same rank to go on from; those absent start at no change.
    """
    language = model.language_model
    assert language is not None and model.projector is not None
    model.requires_grad_(False)
    model.vision_encoder.to(torch.bfloat16)
    assert model.alignment is not None
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
            if float(gate) == 0.0:  # a module behind a closed gate gets no gradient, and its gate only noise
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
    backend = EagerBackend(model, "bfloat16", knowledge)
    balance = Balance(model.experts) if model.experts is not None else None
    rng = np.random.default_rng(settings["seed"] + loop.step)
    maker.rng = np.random.default_rng(settings["seed"] + loop.step)  # a resumed run does not repeat what was seen
    batches = ahead(_batches(maker, settings))
    for _ in loop:
        rows = next(batches)
        backend.knowledge = knowledge if rng.random() >= settings["knowledge_dropout"] else None
        loss = _loss(backend, tokenizer, rows, embeddings)
        total = loss if balance is None or balance.loss is None else loss + settings["balance_weight"] * balance.loss
        total.backward()
        if settings.get("tied_experts") and model.experts is not None:
            _tie(model.experts)
        shown = {} if balance is None or balance.loss is None else {"balance": float(balance.loss.detach())}
        loop.update(loss=float(loss.detach()), **shown, images=sum(len(row.samples) for row in rows))


def _batches(maker: SampleMaker, settings: dict[str, Any]) -> Iterator[list[Row]]:
    """Rows of one step, endlessly; every `long_every`-th step has fewer, longer rows, which hold larger budgets."""
    short = maker.rows(settings["row_tokens"], settings["budgets"])
    long = maker.rows(settings["long_row_tokens"], settings["long_budgets"])
    while True:
        for place in range(settings["long_every"]):
            is_long = place == settings["long_every"] - 1
            yield [next(long if is_long else short) for _ in range(settings["long_rows" if is_long else "rows"])]


def _loss(
    backend: EagerBackend, tokenizer: Tokenizer, rows: list[Row], embeddings: dict[str, npt.NDArray[np.float32]]
) -> Tensor:
    language = backend.model.language_model
    assert language is not None
    device = language.embed_tokens.weight.device
    ids = torch.stack([row.token_ids for row in rows]).to(device)  # [R, N]
    places = ids == backend.config.image_token_id
    samples = [sample for row in rows for sample in row.samples]
    scenes = [sample.scene for sample in samples]
    queries = [Query(np.array(tokenizer.encode(sample.query), dtype=np.int32), embeddings[sample.query]) for sample in samples]
    with torch.no_grad():
        taps, aligned = backend.encode_levels(scenes)
    with torch.autocast(device.type, torch.bfloat16):
        tokens, _, _ = backend.visual_tokens([tap.float() for tap in taps], aligned, scenes, queries)
    embeds = language.embed_tokens(ids.masked_fill(places, 0))
    visual = torch.cat([part for part in tokens if part is not None]).to(embeds.dtype)
    embeds = embeds.masked_scatter(places[..., None].expand_as(embeds), visual)
    positions, mask = (torch.stack([getattr(row, name) for row in rows]).to(device) for name in ("positions", "mask"))
    hidden = language(embeds, positions, None, mask)
    targets, weights = (torch.stack([getattr(row, name) for row in rows]).to(device) for name in ("targets", "weights"))
    wanted = targets >= 0
    losses = F.cross_entropy(language.logits(hidden[wanted]).float(), targets[wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()
