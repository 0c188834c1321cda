"""The graphs `align`, `bridge` and `cue_search`: what happens to one scene between the vision encoder and the language model."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from rsvlm_infer.config import LEVELS, AlignmentConfig, RsvlmConfig
from rsvlm_infer.contract import cue_names, tap_names

from . import engine_functions, functions, plugin_functions
from .builder import Graph
from .parts import Source, activation, tile_attention, unit_length

LAYER_NORM_EPS = 1e-5  # torch's default, which augmentation, experts and projector use


def build_align(g: Graph, source: Source, config: AlignmentConfig, eps: float) -> None:
    """Emits the nodes of the heads that the config names; see layers/alignment.py."""
    places = g.int64("places") if any(item.name == "places" for item in g.contract.inputs) else None
    taps = dict(zip(LEVELS, tap_names(), strict=True))
    for level in config.levels:
        if level == LEVELS[0]:
            count = g.side("salient", 0) if source.form.engines else None
            states = _salient(g, taps[level], config.salient_patches, places, count)  # [T, k, Dv]
        elif level == LEVELS[1]:
            states = _tile_means(g, taps[level], "cu_seqlens", places)  # [T, Dv]
        elif config.pooling == "class":
            states = g.squeeze(g.slice("class_tokens", 0, 1), 0)
        else:
            base = g.slice(g.int64("cu_seqlens"), 0, 2)  # the base tile is tile 0
            states = g.squeeze(_tile_means(g, taps[level], base, places), 0)
        head = source.linear(g, source.layer_norm(g, states, f"alignment.{level}.norm", eps), f"align.{level}")
        g.rename(unit_length(g, head), level)


def _tiles(g: Graph, x: str, cu_seqlens: str, known: str | None) -> tuple[str, str, str]:
    """[S, D] -> [T, N, D] with zeros as padding, the tiles' lengths [T, 1] as floats, valid [T, N]."""
    starts, places, valid = functions.padded(g, cu_seqlens, known)
    rows = g.op("Where", valid, g.op("Add", g.unsqueeze(starts, 1), g.unsqueeze(places, 0)), g.integer(0))
    shown = g.cast(valid, TensorProto.FLOAT)
    tiles = g.op("Mul", g.op("Gather", x, rows, axis=0), g.unsqueeze(shown, 2))
    return tiles, g.sum(shown, 1, keep=True), valid


def _tile_means(g: Graph, x: str, cu_seqlens: str, places: str | None) -> str:
    tiles, lengths, _ = _tiles(g, x, cu_seqlens, places)
    return g.op("Div", g.sum(tiles, 1), lengths)


def _salient(g: Graph, tap: str, most: int, places: str | None, k: str | None) -> str:
    """The patches farthest from their tile's mean, [T, k, Dv]; k, unless given, is `most` or the shortest tile's length if that is less."""
    tiles, lengths, valid = _tiles(g, tap, "cu_seqlens", places)
    mean = g.op("Div", g.sum(tiles, 1, keep=True), g.unsqueeze(lengths, 2))
    distance = g.op("ReduceSumSquare", g.op("Sub", tiles, mean), g.ints(2), keepdims=0)  # [T, N]
    if k is None:
        k = g.op("Min", g.int64(g.op("ReduceMin", lengths, keepdims=0)), g.integer(most))
    ranked = g.op("Where", valid, distance, g.number(-1.0))
    _, order = g.many("TopK", ranked, g.unsqueeze(k, 0), outputs=2, axis=1, largest=1, sorted=1)  # [T, k]
    starts = g.slice(g.int64("cu_seqlens"), 0, -1)
    return g.op("Gather", tap, g.op("Add", g.unsqueeze(starts, 1), order), axis=0)


def build_cue_search(g: Graph, source: Source) -> None:
    """One node: the op with its body."""
    names = [item.name for item in g.contract.inputs]
    body = functions.cue_search(TensorProto.FLOAT if source.form.engines else TensorProto.DOUBLE)
    outputs = [item.name for item in g.contract.outputs]
    for name, value in zip(outputs, g.own(body, *names, outputs=len(outputs)), strict=True):
        g.rename(value, name)


def build_bridge(g: Graph, source: Source, config: RsvlmConfig) -> None:
    """Augmentation, experts and projector, as far as the config has them."""
    features = list(tap_names())
    base = features[2]
    if config.augmentation is not None:
        features = [_augmented(g, source, config, level) for level in range(len(LEVELS))]
    mixed = features[2] if config.experts is None else _experts(g, source, config, base, features)
    tokens = _projected(g, source, config, mixed)
    if config.grid_pinpoints:
        newline = g.unsqueeze(source.vector(g, "image_newline"), 0)
        g.many("Gather", g.op("Concat", tokens, newline, axis=0), "token_order", outputs=["tokens"], axis=0)
    else:
        g.rename(tokens, "tokens")


def _augmented(g: Graph, source: Source, config: RsvlmConfig, level: int) -> str:
    """H_l = F_l + tanh(g_l) · CrossAttn_l(LN F_l ; [cues_l ; query]) of one scene."""
    assert config.augmentation is not None
    width, heads = config.vision.hidden_size, config.augmentation.num_heads
    name, tap = f"augmentation.levels.{level}", tap_names()[level]
    cues = source.linear(g, cue_names()[level], "bridge.cue_proj")
    context = g.op("Concat", cues, source.linear(g, "query", "bridge.query_proj"), axis=0)  # [K + Q, Dv]
    q = source.linear(g, source.layer_norm(g, tap, f"{name}.norm", LAYER_NORM_EPS), f"bridge.{level}.q")
    k, v = g.many("Split", source.linear(g, context, f"bridge.{level}.kv"), outputs=2, axis=1, num_outputs=2)
    # in full: reshape cannot infer a side where a scene has neither cues nor query
    split = [
        g.op("Reshape", each, g.op("Concat", g.op("Shape", each, start=0, end=1), g.ints(heads, width // heads), axis=0))
        for each in (source.narrow(g, part) for part in (q, k, v))
    ]
    bounds = [g.op("Concat", g.ints(0), g.op("Shape", each, start=0, end=1), axis=0) for each in (tap, context)]
    if source.form.engines:  # one tile: its length is a shape here
        bounds += [g.range(g.op("Max", g.side(each, 0), g.integer(1))) for each in (tap, context)]
    attended = tile_attention(g, source, split, bounds, heads, width // heads)
    out = source.linear(g, g.reshape(attended, 0, width), f"bridge.{level}.o")
    gate = g.op("Tanh", source.vector(g, f"{name}.gate"))
    return g.op("Add", tap, g.op("Mul", out, gate))


def _experts(g: Graph, source: Source, config: RsvlmConfig, base: str, features: list[str]) -> str:
    """Y = F_2 + Σ_l tanh(a_l) · MoE_l(LN H_l); the router stays in float32 at every precision."""
    assert config.experts is not None
    settings, levels = config.experts, len(LEVELS)
    group = settings.num_experts // levels
    normed, logits = [], []
    for level, x in enumerate(features):
        name = f"experts.levels.{level}"
        normed.append(source.layer_norm(g, x, f"{name}.norm", LAYER_NORM_EPS))
        router = g.stored(f"{name}.router", np.ascontiguousarray(source.weights.others[f"{name}.router.weight"].T))
        own = g.op("MatMul", normed[-1], router)  # [S, E/L]
        logits.append(g.op("Pad", own, g.ints(0, level * group, 0, (levels - 1 - level) * group)))
    stacked = g.op("Concat", *normed, axis=0)  # [3·S, Dv]
    offsets = g.op("Mul", g.range(g.integer(levels + 1)), g.side(base, 0))
    routed = g.own(functions.route(), g.op("Concat", *logits, axis=0), offsets, outputs=3, k=settings.top_k)
    weights = [source.factor(g, f"experts.{name}") for name in functions.expert_weight_names(settings)]
    if source.form.plugins:
        body = plugin_functions.grouped_experts(settings, config.vision.hidden_size)
    else:
        body = engine_functions.grouped_experts(settings) if source.form.engines else functions.grouped_experts(settings)
    (mixed,) = g.own(body, source.narrow(g, stacked), *routed, *weights)
    mixed = source.widen(g, mixed)
    out = base
    for level, part in enumerate(g.many("Split", mixed, outputs=levels, axis=0, num_outputs=levels)):
        gate = g.op("Tanh", source.vector(g, f"experts.levels.{level}.gate"))
        out = g.op("Add", out, g.op("Mul", part, gate))
    return out


def _projected(g: Graph, source: Source, config: RsvlmConfig, x: str) -> str:
    """Y [S, Dv] -> tokens of the tiles, one after another."""
    assert config.projector is not None
    settings = config.projector
    if settings.input_norm:
        x = source.layer_norm(g, x, "projector.input_norm", LAYER_NORM_EPS)
    if settings.pixel_shuffle == 2:
        (x,) = g.own(functions.pixel_shuffle(), x, "cu_seqlens", "grids")
    tokens = source.linear(g, activation(g, source.linear(g, x, "bridge.fc1"), settings.activation), "bridge.fc2")
    if not settings.box_embedding:
        return tokens
    bounds = g.op("Div", g.int64("cu_seqlens"), g.integer(settings.pixel_shuffle**2))
    tile, _ = functions.tile_and_place(g, bounds, g.side(tokens, 0))
    return g.op("Add", tokens, g.op("Gather", source.linear(g, "boxes", "bridge.box"), tile, axis=0))
