"""The graph `vision`: packed patches of tiles -> taps, as layers/vision_encoder.py. Knows no scene."""

from __future__ import annotations

from rsvlm_infer.config import VisionConfig
from rsvlm_infer.contract import tap_names

from . import functions
from .builder import Graph
from .parts import Source, activation


def build_vision(g: Graph, source: Source, config: VisionConfig) -> None:
    """Emits the nodes; blocks after the last tap do not exist."""
    x = source.linear(g, "patches", "vision.patch_embed")  # [S, Dv]
    table = source.vector(g, "vision_encoder.position_table")  # small beside the blocks, and every patch adds it
    grid_table = g.slice(table, 1, functions.FAR) if config.class_token else table
    (positions,) = g.own(functions.grid_positions(config.interpolation), grid_table, "cu_seqlens", "grids")
    x = g.op("Add", x, positions)
    cu_seqlens, patch_rows, class_rows = "cu_seqlens", None, None
    if config.class_token:
        x, cu_seqlens, patch_rows, class_rows = _with_class_tokens(g, source, x, table)
    if config.pre_norm:
        x = source.layer_norm(g, x, "vision_encoder.pre_norm", config.layer_norm_eps)
    states = [x]
    for index in range(max(config.taps)):
        states.append(_block(g, source, config, states[-1], index, cu_seqlens))
    for name, tap in zip(tap_names(), config.taps, strict=True):
        if patch_rows is None:
            g.rename(states[tap], name)
        else:
            g.many("Gather", states[tap], patch_rows, outputs=[name], axis=0)
    if class_rows is not None:
        g.many("Gather", states[config.taps[2]], class_rows, outputs=["class_tokens"], axis=0)


def _with_class_tokens(g: Graph, source: Source, x: str, table: str) -> tuple[str, str, str, str]:
    """[S, Dv] -> [S + T, Dv] with a class token before each tile, its cu_seqlens, and the rows of patches and of class tokens."""
    class_row = g.op("Add", g.unsqueeze(source.vector(g, "vision_encoder.class_token"), 0), g.slice(table, 0, 1))  # [1, Dv]
    starts, places, valid = functions.padded(g, "cu_seqlens", extra=1)  # [T], [1 + N], [T, 1 + N]
    after = g.op("Add", g.unsqueeze(starts, 1), g.unsqueeze(places, 0))  # row 0 is the class token, so patch i is row i + 1
    rows = g.op("Where", g.unsqueeze(g.op("Equal", places, g.integer(0)), 0), g.integer(0), after)
    kept = g.squeeze(g.op("NonZero", g.reshape(valid, -1)), 0)
    packed = g.op("Gather", g.reshape(rows, -1), kept, axis=0)  # [S + T]
    joined = g.op("Gather", g.op("Concat", class_row, x, axis=0), packed, axis=0)
    cu_seqlens = g.op("Add", g.int64("cu_seqlens"), g.range(g.side("cu_seqlens", 0)))
    is_class = g.op("Equal", packed, g.integer(0))
    patch_rows = g.squeeze(g.op("NonZero", g.op("Not", is_class)), 0)
    return joined, cu_seqlens, patch_rows, g.squeeze(g.op("NonZero", is_class), 0)


def _block(g: Graph, source: Source, config: VisionConfig, x: str, index: int, cu_seqlens: str) -> str:
    name, eps = f"vision_encoder.blocks.{index}", config.layer_norm_eps
    qkv = source.linear(g, source.layer_norm(g, x, f"{name}.norm1", eps), f"vision.{index}.qkv")  # [S, 3·Dv]
    heads = [
        g.reshape(part, 0, config.num_heads, config.head_dim) for part in g.many("Split", qkv, outputs=3, axis=1, num_outputs=3)
    ]
    attention = functions.varlen_tile_attention()
    (attended,) = g.own(attention, *heads, cu_seqlens, cu_seqlens, scale=float(config.head_dim**-0.5))
    attended = source.linear(g, g.reshape(attended, 0, config.hidden_size), f"vision.{index}.o")
    x = g.op("Add", x, _scaled(g, source, config, attended, f"{name}.scale1"))
    hidden = source.linear(g, source.layer_norm(g, x, f"{name}.norm2", eps), f"vision.{index}.fc1")
    expanded = source.linear(g, activation(g, hidden, config.activation), f"vision.{index}.fc2")
    return g.op("Add", x, _scaled(g, source, config, expanded, f"{name}.scale2"))


def _scaled(g: Graph, source: Source, config: VisionConfig, x: str, name: str) -> str:
    return g.op("Mul", x, source.vector(g, name)) if config.layer_scale else x
