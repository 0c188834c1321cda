"""Rounds a language model to 4 bits layer by layer, each layer on what the rounded ones before it give. Knows no image and no file.

A layer that is fitted to exact inputs cannot answer for the layers before it. So calibration texts walk through the exact model and
through its rounded twin side by side: the twin's inputs give the sums for compensation, and its weights first move to where they
give the exact outputs from these inputs (least squares). Only whole texts go through, once each; no token is generated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rsvlm_infer.layers.language_model import DecoderLayer, LanguageModel
from rsvlm_infer.ops.weight_matmul import GROUP, PackedWeight, dequantise, pack_weight

from .onnx.parts import BlockCodes
from .rounding import DAMPING, round_blocks
from .text_projection import TextProjection

ATTENTION = ("attention.q", "attention.k", "attention.v")
OUTPUT = ("attention.o",)
GATED = ("mlp.gate", "mlp.up")
DOWN = ("mlp.down",)
STEPS = (ATTENTION, OUTPUT, GATED, DOWN)  # what reads one input is one matrix of the runtime, and of one kind
NAMES = {ATTENTION: "attention.qkv", OUTPUT: "attention.o", GATED: "mlp.gate_up", DOWN: "mlp.down"}
EMBEDDINGS, HEAD = "language_model.embed_tokens", "language_model.lm_head"
HELD_OUT = 4  # every fourth image's texts fit nothing and measure everything
TEXTS_AT_ONCE = 8  # a backward pass keeps 2 MB a token of the default model
Step = tuple[str, ...]


@dataclass(frozen=True)
class CalibrationText:
    """Embeddings [n, D] of one text, exact ones; `answer` is its place of the first token that the model chose itself, n for none.

    `held_out`: it only measures.
    """

    embeddings: npt.NDArray[np.float32]
    answer: int
    held_out: bool


@dataclass
class _Batch:
    """Texts that walk together. exact, rounded [B, N, D]; `real` [B, N] is False on padding, `asked` True where a token is chosen."""

    exact: Tensor
    rounded: Tensor
    real: Tensor
    asked: Tensor
    held_out: bool


@dataclass(frozen=True)
class Measure:
    """What one measure says of a twin: its value, what it may be at most, and how much of it each int4 matrix answers for."""

    value: float
    limit: float
    damages: Mapping[str, float]

    @property
    def excess(self) -> float:
        return self.value - self.limit


@dataclass
class RoundedLanguage:
    """What came of it.

    Attributes:
        twin: the model with the values that the codes stand for.
        kinds: precision by the runtime's matrix name.
        packed: codes by parameter name without `.weight`.
        finer: the int8 codes of what int4 ones were fitted to, of the int4 ones.
        measures: "divergence", the mean over held-out answers' tokens of KL(exact, twin) in nats, and, of a model that embeds texts,
            "turn", the mean over held-out embedded texts of 1 - cosine(exact, twin), the twin's projection fitted to the others.
        damages: by measure what each matrix answers for, when all were int4.
    """

    twin: LanguageModel
    kinds: dict[str, str]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    finer: dict[str, PackedWeight] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    damages: dict[str, Mapping[str, float]] = field(default_factory=dict)
    embedded: tuple[Tensor, Tensor] | None = (
        None  # exact and own states [n, D] of the texts that are embedded and may be fitted
    )


def round_language(
    model: LanguageModel,
    texts: Sequence[CalibrationText],
    limits: Mapping[str, float],
    report: Callable[[str], None] = lambda line: None,
    *,
    projection: TextProjection | None = None,
) -> RoundedLanguage:
    """Rounds every layer to int4, and again with int8 for the matrices that do most damage, until all measures are within `limits`.

    The word table and the head are int8: each token reads one row of the former, and 8 bits of the latter lose nothing that a
    greedy choice could show. Layers are rounded anew in each round, because later ones make up for what earlier ones do.

    Args:
        texts: with held-out answers among them, and texts without one, some held out, where there is a projection.
        limits: by the names of `RoundedLanguage.measures`; "turn" is only asked for with a projection.
        projection: the model's, from the states of last tokens to embeddings.
    """
    tables = (EMBEDDINGS,) if model.lm_head is None else (EMBEDDINGS, HEAD)
    kinds = dict.fromkeys(tables, "bf16" if model.config.hidden_size % GROUP else "int8")
    for index, layer in enumerate(model.layers):
        kinds |= {f"{_layer_name(index)}{NAMES[step]}": "int4" for step in STEPS if _in_groups(layer, step)}
    damages: dict[str, Mapping[str, float]] = {}
    at_least = 1
    while True:
        found = _walk(model, texts, kinds, report)
        found.measures = _measure(found, model, texts, limits, projection)
        damages = damages or {name: measure.damages for name, measure in found.measures.items()}
        found.damages = damages
        report(
            ", ".join(f"{name} {measure.value:.4g} of at most {measure.limit:g}" for name, measure in found.measures.items())
        )
        if "int4" not in kinds.values() or all(measure.excess <= 0 for measure in found.measures.values()):
            return found
        kinds = kinds | _finer_kinds(model, found.measures.values(), at_least)
        at_least *= 2  # damages are guesses: where they guess too low, rounds must still come to an end


def _finer_kinds(model: LanguageModel, measures: Iterable[Measure], at_least: int) -> dict[str, str]:
    """int8 for what answers for most per byte that this costs, until every measure's excess is covered."""
    finer: dict[str, str] = {}
    for measure in measures:
        damages, excess = measure.damages, measure.excess
        if excess <= 0:
            continue
        excess -= sum(max(damages[name], 0.0) for name in finer)
        for name in sorted(damages.keys() - finer, key=lambda name: (-damages[name] / _size(model, name), name)):
            if excess <= 0 and len(finer) >= at_least:
                break
            finer[name] = "int8"
            excess -= max(damages[name], 0.0)
    return finer


def _walk(
    model: LanguageModel, texts: Sequence[CalibrationText], kinds: dict[str, str], report: Callable[[str], None]
) -> RoundedLanguage:
    """One pass over the layers."""
    with torch.no_grad():
        twin = copy.deepcopy(model)
        twin.embed_tokens.weight.copy_(_eight_bits(model.embed_tokens.weight))
        if twin.lm_head is not None:
            twin.lm_head.weight.copy_(_eight_bits(twin.lm_head.weight))
        batches = [_batch(part) for part in _together(texts)]
        found = RoundedLanguage(twin, kinds)
        for index, (layer, own) in enumerate(zip(model.layers, twin.layers, strict=True)):
            assert isinstance(layer, DecoderLayer)
            assert isinstance(own, DecoderLayer)
            _round_layer(layer, own, batches, found, _layer_name(index))
            report(f"rounded layer {index + 1} of {len(model.layers)}, {_distance(batches):.2%} from the exact states")
        found.embedded = _embedded(model, twin, batches)
    return found


def _embedded(model: LanguageModel, twin: LanguageModel, batches: list[_Batch]) -> tuple[Tensor, Tensor] | None:
    """States after the last tokens of what may be fitted and is embedded, when texts have walked through all layers."""
    chosen = [batch for batch in batches if not batch.held_out]
    exact = [model.norm(_last(batch.exact, batch))[~batch.asked.any(dim=1)] for batch in chosen]
    own = [twin.norm(_last(batch.rounded, batch))[~batch.asked.any(dim=1)] for batch in chosen]
    return (torch.cat(exact), torch.cat(own)) if sum(map(len, exact)) else None


def _layer_name(index: int) -> str:
    return f"language_model.layers.{index}."


def _in_groups(layer: nn.Module, step: Step) -> bool:
    """Whether the matrices of a step can be laid out in groups."""
    return all(_weight(layer, name).shape[1] % GROUP == 0 for name in step)


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _eight_bits(weight: Tensor) -> Tensor:
    return dequantise(pack_weight(weight, "int8")) if weight.shape[1] % GROUP == 0 else weight.to(torch.bfloat16).float()


def _together(texts: Sequence[CalibrationText]) -> Iterator[list[CalibrationText]]:
    """Texts of like length and use, so that little is padding."""
    for held_out in (False, True):
        chosen = sorted((text for text in texts if text.held_out is held_out), key=lambda text: len(text.embeddings))
        for start in range(0, len(chosen), TEXTS_AT_ONCE):
            yield chosen[start : start + TEXTS_AT_ONCE]


def _batch(texts: list[CalibrationText]) -> _Batch:
    longest, width = max(len(text.embeddings) for text in texts), texts[0].embeddings.shape[1]
    exact = torch.zeros(len(texts), longest, width)
    real, asked = (torch.zeros(len(texts), longest, dtype=torch.bool) for _ in range(2))
    for row, text in enumerate(texts):
        count = len(text.embeddings)
        exact[row, :count] = torch.from_numpy(text.embeddings)
        real[row, :count] = True
        asked[row, max(text.answer - 1, 0) : count] = text.answer < count
    return _Batch(exact, exact.clone(), real, asked, texts[0].held_out)


def _positions(states: Tensor) -> Tensor:
    return torch.arange(states.shape[1]).expand(states.shape[0], -1)


def _attend(layer: DecoderLayer, states: Tensor) -> Tensor:
    return states + layer.attention(layer.input_norm(states), _positions(states), None, None)  # type: ignore[no-any-return]


def _feed(layer: DecoderLayer, states: Tensor) -> Tensor:
    return states + layer.mlp(layer.post_norm(states))  # type: ignore[no-any-return]


def _through(layer: DecoderLayer, step: Step, states: Tensor) -> tuple[Tensor, Tensor]:
    """What the matrices of a step multiply, and the states behind them; before the last matrix of a half the states stay."""
    if step is ATTENTION:
        return layer.input_norm(states), states
    if step is GATED:
        return layer.post_norm(states), states
    seen: list[Tensor] = []
    handle = layer.get_submodule(step[0]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        behind = (_attend if step is OUTPUT else _feed)(layer, states)
    finally:
        handle.remove()
    return seen[0], behind


def _round_layer(layer: DecoderLayer, own: DecoderLayer, batches: list[_Batch], found: RoundedLanguage, prefix: str) -> None:
    """Rounds the twin's layer in place, notes its codes, and takes all texts through both."""
    for step in STEPS:
        kind = found.kinds.get(f"{prefix}{NAMES[step]}", "bf16")
        hessian, cross, inputs = _pass(layer, own, step, batches)
        for name in step:
            if kind == "bf16":
                _weight(own, name).copy_(_weight(layer, name).to(torch.bfloat16))
                continue
            fitted = _fitted(_weight(layer, name), hessian, cross)
            packed = pack_weight(fitted, "int8")
            if kind == "int4":
                found.finer[f"{prefix}{name}"] = packed
                packed = packed_int4(round_blocks(fitted.numpy(), 4, hessian.numpy(), symmetric=True))
            found.packed[f"{prefix}{name}"] = packed
            _weight(own, name).copy_(dequantise(packed))
        if step in (OUTPUT, DOWN):  # the matrix that ends a half: what it gives is added to the states
            for batch, rows in zip(batches, inputs, strict=True):
                batch.rounded = batch.rounded + own.get_submodule(step[0])(rows)


def _pass(layer: DecoderLayer, own: DecoderLayer, step: Step, batches: list[_Batch]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Σ x'·x'ᵀ and Σ x'·xᵀ [in, in] of the twin's inputs x' and the exact ones x, over what may be fitted; and all of x'.

    Exact states are taken behind the step; the twin's wait for its codes.
    """
    width = _weight(layer, step[0]).shape[1]
    hessian, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    inputs = []
    for batch in batches:
        exact, batch.exact = _through(layer, step, batch.exact)
        rounded, _ = _through(own, step, batch.rounded)
        inputs.append(rounded)
        if not batch.held_out:
            own_rows, exact_rows = rounded[batch.real], exact[batch.real]
            hessian += own_rows.T @ own_rows
            cross += own_rows.T @ exact_rows
    return hessian, cross, inputs


def _fitted(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight [out, in] that gives the exact outputs from the twin's inputs, as nearly as one can; damped towards the exact one."""
    damping = DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    fitted: Tensor = torch.linalg.solve(hessian + damping, (cross + damping) @ weight.T.double())
    return fitted.T.float()


def packed_int4(codes: BlockCodes) -> PackedWeight:
    """Symmetric 4-bit codes as the runtime's packing names them."""
    assert codes.zeros is None
    packed = torch.from_numpy(codes.codes).reshape(len(codes.codes), -1).contiguous()
    return PackedWeight("int4", packed, torch.from_numpy(codes.scales).half())


def _distance(batches: list[_Batch]) -> float:
    """Of held-out states, relative."""
    chosen = [(batch.rounded[batch.real], batch.exact[batch.real]) for batch in batches if batch.held_out]
    difference = sum(float((own - exact).square().sum()) for own, exact in chosen)
    return float((difference / max(sum(float(exact.square().sum()) for _, exact in chosen), 1e-30)) ** 0.5)


def _size(model: LanguageModel, name: str) -> int:
    return sum(_parameter(model, parameter).numel() for parameter in parameters_of(name))


def parameters_of(name: str) -> tuple[str, ...]:
    """The parameters, without `.weight`, that a matrix of the runtime is made of."""
    for step, fused in NAMES.items():
        if name.endswith(fused):
            return tuple(f"{name.removesuffix(fused)}{part}" for part in step)
    return (name,)


def _parameter(model: LanguageModel, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name.removeprefix('language_model.')}.weight")


def _measure(
    found: RoundedLanguage,
    model: LanguageModel,
    texts: Sequence[CalibrationText],
    limits: Mapping[str, float],
    projection: TextProjection | None,
) -> dict[str, Measure]:
    """All measures of a twin, over the held-out texts."""
    held = [text for text in texts if text.held_out]
    answers = [text for text in held if text.answer < len(text.embeddings)]
    count = max(sum(int(batch.asked.sum()) for batch in map(_batch, _together(answers))), 1)

    def divergence(batch: _Batch) -> Tensor:
        with torch.no_grad():
            exact = _log_probabilities(model, batch)
        return (exact.exp() * (exact - _log_probabilities(found.twin, batch))).sum() / count

    measures = {"divergence": _graded(found, answers, divergence, limits["divergence"])}
    if projection is not None:
        embedded = [text for text in held if text.answer == len(text.embeddings)]
        own = projection if found.embedded is None else projection.refitted(*found.embedded)

        def turn(batch: _Batch) -> Tensor:
            with torch.no_grad():
                exact = projection.embed(_last_states(model, batch))
            return (1 - (exact * own.embed(_last_states(found.twin, batch))).sum(dim=1)).sum() / max(len(embedded), 1)

        measures["turn"] = _graded(found, embedded, turn, limits["turn"])
    return measures


def _graded(
    found: RoundedLanguage, texts: Sequence[CalibrationText], loss: Callable[[_Batch], Tensor], limit: float
) -> Measure:
    """One measure, and how much of it each int4 matrix answers for: half of its gradient along what rounding did to the matrix.

    Near its minimum a measure grows with the square of the changes. There the gradient along all changes together is twice the
    measure, so the halves add up to it, and a half is what it falls by when a matrix that errs on its own gets its finer codes.
    """
    own = {name: _parameter(found.twin, name) for name in found.finer}
    for value in own.values():
        value.requires_grad_(True)
    total = 0.0
    for batch in map(_batch, _together(texts)):
        with torch.enable_grad():
            part = loss(batch)
            if own:
                part.backward()  # type: ignore[no-untyped-call]
        total += float(part.detach())
    damages: dict[str, float] = {}
    for name in (name for name, kind in found.kinds.items() if kind == "int4"):
        damages[name] = 0.0
        for parameter in parameters_of(name):
            gradient = own[parameter].grad
            if gradient is not None:
                damages[name] += 0.5 * float((gradient * (own[parameter].detach() - dequantise(found.finer[parameter]))).sum())
    for value in own.values():
        value.requires_grad_(False).grad = None
    return Measure(total, limit, damages)


def _last_states(model: LanguageModel, batch: _Batch) -> Tensor:
    """[B, D] after each text's last token."""
    return _last(model(batch.exact, _positions(batch.exact)), batch)


def _last(states: Tensor, batch: _Batch) -> Tensor:
    """[B, N, D] -> [B, D]."""
    return states[torch.arange(len(states)), batch.real.sum(dim=1) - 1]


def _log_probabilities(model: LanguageModel, batch: _Batch) -> Tensor:
    """[asked tokens, vocabulary]."""
    return torch.log_softmax(model.logits(model(batch.exact, _positions(batch.exact))[batch.asked]), dim=1)


def layer_entries(found: RoundedLanguage) -> list[dict[str, Any]]:
    """One JSON object per matrix, as the manifest lists it."""
    entries = []
    for name, kind in found.kinds.items():
        asked = "int8" if name in (EMBEDDINGS, HEAD) else "int4"
        entry: dict[str, Any] = {"name": name, "asked": asked, "kept": kind}
        damages = {measure: float(f"{of[name]:.3g}") for measure, of in found.damages.items() if name in of}
        if damages:
            entry["damages"] = damages
        entries.append(entry)
    return entries


def calibration_summary(texts: Sequence[CalibrationText], found: RoundedLanguage) -> Mapping[str, Any]:
    """What a manifest says about how the codes came about."""
    return {
        "texts": len(texts),
        "held_out": sum(text.held_out for text in texts),
        "measures": {
            name: {"value": float(f"{measure.value:.4g}"), "limit": measure.limit} for name, measure in found.measures.items()
        },
    }
