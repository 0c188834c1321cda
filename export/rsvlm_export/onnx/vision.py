"""The graph `vision`: packed patches of tiles -> taps, as layers/vision_encoder.py. Knows no scene."""

from __future__ import annotations

from rsvlm_infer.config import VisionConfig
from rsvlm_infer.contract import tap_names

from . import functions
from .builder import Graph
from .parts import Source, activation, tile_attention


def build_vision(g: Graph, source: Source, config: VisionConfig) -> None:
    """Emits the nodes; blocks after the last tap do not exist."""
    x = source.linear(g, "patches", "vision.patch_embed")  # [S, Dv]
    table = source.vector(g, "vision_encoder.position_table")  # small beside the blocks, and every patch adds it
    grid_table = g.slice(table, 1, functions.FAR) if config.class_token else table
    (positions,) = g.own(functions.grid_positions(config.interpolation), grid_table, "cu_seqlens", "grids", x)
    x = g.op("Add", x, positions)
    cu_seqlens, patch_rows, class_rows = "cu_seqlens", None, None
    if config.class_token:
        x, cu_seqlens, patch_rows, class_rows = _with_class_tokens(g, source, x, table)
    if config.pre_norm:
        x = source.layer_norm(g, x, "vision_encoder.pre_norm", config.layer_norm_eps)
    places: tuple[str, ...] = ()
    if source.form.engines:
        longest = g.side("places", 0)
        places = (g.range(g.op("Add", longest, g.integer(1)) if config.class_token else longest),) * 2
    states = [x]
    for index in range(max(config.taps)):
        states.append(_block(g, source, config, states[-1], index, cu_seqlens, places))
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
    bounds = g.int64("cu_seqlens")
    cu_seqlens = g.op("Add", bounds, g.range(g.side("cu_seqlens", 0)))
    tile, place = functions.tile_and_place(g, cu_seqlens, g.op("Add", g.side(x, 0), g.side("grids", 0)))  # [S + T]
    # behind the class token's row 0, patch i is row i + 1
    after = g.op("Add", g.op("Gather", bounds, tile, axis=0), place)
    rows = g.op("Where", g.op("Equal", place, g.integer(0)), g.integer(0), after)
    joined = g.op("Gather", g.op("Concat", class_row, x, axis=0), rows, axis=0)
    own_tile, _ = functions.tile_and_place(g, "cu_seqlens", g.side(x, 0))
    patch_rows = g.op("Add", g.op("Add", g.range(g.side(x, 0)), own_tile), g.integer(1))  # [S]
    return joined, cu_seqlens, patch_rows, g.slice(cu_seqlens, 0, -1)


def _block(g: Graph, source: Source, config: VisionConfig, x: str, index: int, cu_seqlens: str, places: tuple[str, ...]) -> str:
    name, eps = f"vision_encoder.blocks.{index}", config.layer_norm_eps
    qkv = source.linear(g, source.layer_norm(g, x, f"{name}.norm1", eps), f"vision.{index}.qkv")  # [S, 3·Dv]
    parts = g.many("Split", source.narrow(g, qkv), outputs=3, axis=1, num_outputs=3)
    heads = [g.reshape(part, 0, config.num_heads, config.head_dim) for part in parts]
    attended = tile_attention(g, source, heads, (cu_seqlens, cu_seqlens, *places), config.num_heads, config.head_dim)
    attended = source.linear(g, g.reshape(attended, 0, config.hidden_size), f"vision.{index}.o")
    x = g.op("Add", x, _scaled(g, source, config, attended, f"{name}.scale1"))
    hidden = source.linear(g, source.layer_norm(g, x, f"{name}.norm2", eps), f"vision.{index}.fc1")
    expanded = source.linear(g, activation(g, hidden, config.activation), f"vision.{index}.fc2")
    return g.op("Add", x, _scaled(g, source, config, expanded, f"{name}.scale2"))


def _scaled(g: Graph, source: Source, config: VisionConfig, x: str, name: str) -> str:
    return g.op("Mul", x, source.vector(g, name)) if config.layer_scale else x
