"""The bodies of our own ops in plain ONNX, so that any runtime can run them; one that has a kernel of the name uses that instead.

Each follows the definition in `rsvlm_infer/ops/<op>.py`. Packed rows become a padded [T, N] view where plain ONNX has no loop worth
its price, and padding points to a row of zeros. All counts come from the inputs: nothing is fixed at export but the kind of expert.
Where it costs nothing a length comes from an input's shape and not from its values, because TensorRT knows only shapes; what has to
differ for it is in `engine_functions.py`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from rsvlm_infer.config import ExpertsConfig

from .builder import Nodes, Reference, function

FAR = np.iinfo(np.int64).max


def padded(b: Nodes, cu_seqlens: str, places: str | None = None) -> tuple[str, str, str]:
    """[U] -> starts [T], places [N] and valid [T, N]; N is the length of `places`, or is read from `cu_seqlens`."""
    bounds = b.int64(cu_seqlens)
    starts, ends = b.slice(bounds, 0, -1), b.slice(bounds, 1, FAR)
    lengths = b.op("Sub", ends, starts)
    if places is None:
        places = b.range(b.op("Max", b.op("ReduceMax", lengths, keepdims=0), b.integer(1)))
    valid = b.op("Less", b.unsqueeze(places, 0), b.unsqueeze(lengths, 1))
    return starts, places, valid


def tile_and_place(b: Nodes, cu_seqlens: str, rows: str) -> tuple[str, str]:
    """[U] and the number of packed rows S -> the tile of each and its place inside the tile, both [S]."""
    bounds = b.int64(cu_seqlens)
    row = b.range(rows)
    passed = b.op("LessOrEqual", b.unsqueeze(b.slice(bounds, 1, FAR), 0), b.unsqueeze(row, 1))  # [S, T]
    tile = b.sum(b.int64(passed), 1)
    return tile, b.op("Sub", row, b.op("Gather", bounds, tile, axis=0))


def padded_rows(b: Nodes, x: str, cu_seqlens: str, places: str | None = None) -> tuple[str, str]:
    """x [S, H, D] -> [T, N, H, D] with zeros as padding, and valid [T, N]."""
    starts, places, valid = padded(b, cu_seqlens, places)
    rows = b.op("Where", valid, b.op("Add", b.unsqueeze(starts, 1), b.unsqueeze(places, 0)), b.side(x, 0))
    zeros = b.op("Expand", b.op("CastLike", b.number(0.0), x), b.op("Concat", b.ints(1), b.op("Shape", x, start=1), axis=0))
    return b.op("Gather", b.op("Concat", x, zeros, axis=0), rows, axis=0), valid


def packed_rows(b: Nodes, tiles: str, cu_seqlens: str, like: str) -> str:
    """[T, N, H, D] -> the rows [S, H, D] of `like`, without the padding."""
    tile, place = tile_and_place(b, cu_seqlens, b.side(like, 0))
    flat = b.op("Reshape", tiles, b.op("Concat", b.ints(-1), b.op("Shape", like, start=1), axis=0))
    return b.op("Gather", flat, b.op("Add", b.op("Mul", tile, b.side(tiles, 1)), place), axis=0)


def varlen_tile_attention() -> onnx.FunctionProto:
    """q [S, H, D], k, v [Sk, H, D], cu_seqlens, cu_seqlens_k [U] -> [S, H, D]; a tile without keys gives zeros."""
    b = Nodes("varlen_tile_attention")
    scale = b.op("Constant", value_float=Reference("scale", AttributeProto.FLOAT))
    q, _ = padded_rows(b, b.op("Mul", "q", b.op("CastLike", scale, "q")), "cu_seqlens")
    k, valid_k = padded_rows(b, "k", "cu_seqlens_k")
    v, _ = padded_rows(b, "v", "cu_seqlens_k")
    scores = b.op("MatMul", b.op("Transpose", q, perm=[0, 2, 1, 3]), b.op("Transpose", k, perm=[0, 2, 3, 1]))  # [T, H, N, Nk]
    seen = b.unsqueeze(valid_k, 1, 2)
    # padding has the weight exp(-1e30) = 0; a tile of padding alone averages rows of zeros
    weights = b.softmax(b.op("Where", seen, scores, b.op("CastLike", b.number(-1e30), "q")))
    out = b.op("Transpose", b.op("MatMul", weights, b.op("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])  # [T, N, H, D]
    b.many("Identity", packed_rows(b, out, "cu_seqlens", "q"), outputs=["out"])
    return function("VarlenTileAttention", ["q", "k", "v", "cu_seqlens", "cu_seqlens_k"], ["out"], b, ["scale"])


def grid_positions(interpolation: str) -> onnx.FunctionProto:
    """table [G·G, Dv], cu_seqlens [U], grids [T, 2], rows [S, ..] -> the table interpolated at each patch of each tile, [S, Dv].

    As torch's interpolate with align_corners=False: bicubic with a = -0.75, or bilinear; a grid of G by G gives the table itself.
    """
    b = Nodes("grid_positions")
    tile, place = tile_and_place(b, "cu_seqlens", b.side("rows", 0))
    shapes = b.op("Gather", b.int64("grids"), tile, axis=0)  # [S, 2]
    rows, columns = b.squeeze(b.slice(shapes, 0, 1, 1), 1), b.squeeze(b.slice(shapes, 1, 2, 1), 1)
    total = b.cast(b.side("table", 0), TensorProto.FLOAT)
    side = b.op("Round", b.op("Sqrt", total))
    side_int = b.int64(side)
    taps = _cubic if interpolation == "bicubic" else _linear
    y_index, y_weight = taps(b, b.op("Div", place, columns), rows, side, side_int)  # [S, 4]
    x_index, x_weight = taps(b, b.op("Mod", place, columns), columns, side, side_int)
    index = b.op("Add", b.op("Mul", b.unsqueeze(y_index, 2), side_int), b.unsqueeze(x_index, 1))  # [S, 4, 4]
    weight = b.op("Mul", b.unsqueeze(y_weight, 2), b.unsqueeze(x_weight, 1))
    count = {"bicubic": 16}.get(interpolation, 4)
    near = b.op("Gather", "table", b.reshape(index, -1, count), axis=0)  # [S, 16, Dv]
    mixed = b.op("MatMul", b.reshape(weight, -1, 1, count), near)
    b.many("Squeeze", mixed, b.ints(1), outputs=["positions"])
    return function("GridPositions", ["table", "cu_seqlens", "grids", "rows"], ["positions"], b)


def _source(b: Nodes, place: str, length: str, side: str) -> str:
    """Where a patch lies on the table's axis: (place + 0.5) · side / length - 0.5."""
    floats = b.op("Add", b.cast(place, TensorProto.FLOAT), b.number(0.5))
    return b.op("Sub", b.op("Mul", floats, b.op("Div", side, b.cast(length, TensorProto.FLOAT))), b.number(0.5))


def _clamped(b: Nodes, first: str, offsets: list[int], side_int: str) -> str:
    index = b.op("Add", b.unsqueeze(b.int64(first), 1), b.unsqueeze(b.ints(*offsets), 0))
    return b.op("Max", b.op("Min", index, b.op("Sub", side_int, b.integer(1))), b.integer(0))


def _cubic(b: Nodes, place: str, length: str, side: str, side_int: str) -> tuple[str, str]:
    source = _source(b, place, length, side)
    first = b.op("Floor", source)
    t = b.op("Sub", source, first)
    a = -0.75

    def polynomial(x: str, *coefficients: float) -> str:
        """Horner, in the order torch uses, so that whole numbers give exactly 0 or 1."""
        value = b.number(coefficients[0])
        for coefficient in coefficients[1:]:
            value = b.op("Add", b.op("Mul", value, x), b.number(coefficient))
        return value

    def near(x: str) -> str:  # |x| <= 1
        return polynomial(x, a + 2, -(a + 3), 0.0, 1.0)

    def far(x: str) -> str:  # 1 < |x| < 2
        return polynomial(x, a, -5 * a, 8 * a, -4 * a)

    one = b.number(1.0)
    other = b.op("Sub", one, t)
    weights = [far(b.op("Add", t, one)), near(t), near(other), far(b.op("Add", other, one))]
    return _clamped(b, first, [-1, 0, 1, 2], side_int), b.op("Concat", *(b.unsqueeze(w, 1) for w in weights), axis=1)


def _linear(b: Nodes, place: str, length: str, side: str, side_int: str) -> tuple[str, str]:
    source = b.op("Max", _source(b, place, length, side), b.number(0.0))
    first = b.op("Floor", source)
    t = b.op("Sub", source, first)
    weights = [b.op("Sub", b.number(1.0), t), t]
    return _clamped(b, first, [0, 1], side_int), b.op("Concat", *(b.unsqueeze(w, 1) for w in weights), axis=1)


def pixel_shuffle() -> onnx.FunctionProto:
    """features [S, D], cu_seqlens [U], grids [T, 2] with even sides -> [S/4, 4·D], 2 x 2 patches of one tile, row-major."""
    b = Nodes("pixel_shuffle")
    bounds = b.int64("cu_seqlens")
    tokens = b.op("Div", b.side("features", 0), b.integer(4))
    tile, place = tile_and_place(b, b.op("Div", bounds, b.integer(4)), tokens)
    columns = b.squeeze(b.op("Gather", b.slice(b.int64("grids"), 1, 2, 1), tile, axis=0), 1)  # [S/4]
    half = b.op("Div", columns, b.integer(2))
    row = b.op("Mul", b.op("Div", place, half), b.integer(2))
    column = b.op("Mul", b.op("Mod", place, half), b.integer(2))
    first = b.op("Add", b.op("Gather", bounds, tile, axis=0), b.op("Add", b.op("Mul", row, columns), column))
    below = b.op("Add", first, columns)
    one = b.integer(1)
    four = [first, b.op("Add", first, one), below, b.op("Add", below, one)]
    index = b.op("Concat", *(b.unsqueeze(each, 1) for each in four), axis=1)  # [S/4, 4]
    merged = b.op("Gather", "features", index, axis=0)
    width = b.op("Mul", b.op("Shape", "features", start=1, end=2), b.integer(4))
    b.many("Reshape", merged, b.op("Concat", b.ints(-1), width, axis=0), outputs=["merged"])
    return function("PixelShuffle", ["features", "cu_seqlens", "grids"], ["merged"], b)


def route() -> onnx.FunctionProto:
    """logits [N, E], level_offsets [L + 1] -> expert_offsets int32 [E + 1], permutation int32 [N·k], weights [N, k]; see ops/route.py."""
    b = Nodes("route")
    k = b.reshape(b.op("Constant", value_int=Reference("k", AttributeProto.INT)), 1)
    tokens, experts = b.side("logits", 0), b.side("logits", 1)
    levels = b.op("Sub", b.side("level_offsets", 0), b.integer(1))
    group = b.op("Div", experts, levels)
    ends = b.slice(b.int64("level_offsets"), 1, FAR)
    reached = b.op("LessOrEqual", b.unsqueeze(ends, 0), b.unsqueeze(b.range(tokens), 1))  # [N, L]
    first = b.op("Mul", b.sum(b.int64(reached), 1, keep=True), group)  # [N, 1]
    columns = b.op("Add", first, b.unsqueeze(b.range(group), 0))
    inside = b.op("GatherElements", "logits", columns, axis=1)
    best, order = b.many("TopK", inside, k, outputs=2, axis=1, largest=1, sorted=1)  # equal values: the lowest index first
    b.many("Softmax", best, outputs=["weights"], axis=1)
    chosen = b.reshape(b.op("Add", first, order), -1)  # [N·k]
    hits = b.int64(b.op("Equal", b.unsqueeze(chosen, 1), b.unsqueeze(b.range(experts), 0)))  # [N·k, E]
    counts = b.sum(hits, 0)  # [E]
    ends = b.op("CumSum", counts, b.integer(0))
    offsets = b.op("Concat", b.ints(0), ends, axis=0)
    b.many("Cast", offsets, outputs=["expert_offsets"], to=TensorProto.INT32)
    # a slot's place = the start of its expert + the slots before it that chose the same: no sort, so no tie to break
    earlier = b.op("CumSum", hits, b.integer(0), exclusive=1)
    start = b.op("Gather", offsets, chosen, axis=0)
    place = b.op("Add", start, b.sum(b.op("Mul", earlier, hits), 1))  # [N·k]
    slots = b.range(b.side(chosen, 0))
    permutation = b.op("ScatterElements", b.op("Mul", slots, b.integer(0)), place, slots, axis=0)
    b.many("Cast", permutation, outputs=["permutation"], to=TensorProto.INT32)
    return function("Route", ["logits", "level_offsets"], ["expert_offsets", "permutation", "weights"], b, ["k"])


def grouped_experts(config: ExpertsConfig) -> onnx.FunctionProto:
    """x [N, D], what `Route` gives, the experts' weights -> [N, D]; see ops/grouped_experts.py. Every expert has its branch."""
    b = Nodes("grouped_experts")
    inputs = ["x", "expert_offsets", "permutation", "weights", *expert_weight_names(config)]
    k = b.side("weights", 1)
    permutation, offsets = b.int64("permutation"), b.int64("expert_offsets")
    parts = []
    for expert in range(config.num_experts):
        bounds = [b.slice(offsets, expert + step, expert + step + 1) for step in (0, 1)]
        slots = b.op("Slice", permutation, *bounds, b.ints(0))
        rows = b.op("Gather", "x", b.op("Div", slots, k), axis=0)  # [n_e, D]

        def times(value: str, name: str, expert: int = expert) -> str:
            own = b.op("Gather", name, b.integer(expert), axis=0)
            product = b.op("MatMul", value, b.op("Transpose", own, perm=[1, 0]))
            bias = name.replace("w_", "b_")
            return b.op("Add", product, b.op("Gather", bias, b.integer(expert), axis=0)) if bias in inputs else product

        hidden = rows
        if config.kind == "glu_silu":
            gate = times(rows, "w_gate")
            hidden = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), times(rows, "w_up"))
        elif config.kind == "gelu_mlp":
            hidden = b.op("Gelu", times(rows, "w_up"))
        parts.append(times(hidden, "w_down"))
    by_expert = b.op("Concat", *parts, axis=0)  # [N·k, D], grouped by expert
    zeros = b.op("Mul", permutation, b.integer(0))
    inverse = b.op("ScatterElements", zeros, permutation, b.range(b.side(permutation, 0)), axis=0)
    slots = b.op("Gather", by_expert, inverse, axis=0)
    shape = b.op("Concat", b.op("Shape", "weights"), b.op("Shape", "x", start=1), axis=0)
    weighted = b.op("Mul", b.op("Reshape", slots, shape), b.unsqueeze("weights", 2))  # [N, k, D]
    b.many("ReduceSum", weighted, b.ints(1), outputs=["out"], keepdims=0)
    return function("GroupedExperts", inputs, ["out"], b)


def expert_weight_names(config: ExpertsConfig) -> tuple[str, ...]:
    """The stacked weights that experts of this kind have."""
    kinds = {
        "glu_silu": ("w_gate", "w_up", "w_down"),
        "gelu_mlp": ("w_up", "w_down", "b_up", "b_down"),
        "affine": ("w_down", "b_down"),
    }
    return kinds[config.kind]


def cue_search(sums: int = TensorProto.DOUBLE) -> onnx.FunctionProto:
    """visual [V, De], query [De], entries fp16 [M, De], k, beta -> scores [min(k, M)], rows; sums in float64 as ops/cue_search.py.

    sums: the type of `beta` and of the sums; TensorRT has no float64.
    """
    b = Nodes("cue_search")
    entries = b.cast("entries", sums)
    near = b.op("MatMul", entries, b.op("Transpose", b.cast("visual", sums), perm=[1, 0]))  # [M, V]
    asked = b.op("MatMul", entries, b.op("Mul", b.cast("query", sums), "beta"))  # [M]
    score = b.op("Add", b.op("ReduceMax", near, b.ints(1), keepdims=0), asked)
    count = b.op("Min", b.reshape("k", 1), b.op("Shape", "entries", start=0, end=1))
    rounded = b.cast(score, TensorProto.FLOAT)  # ties are decided between float32 scores
    b.many("TopK", rounded, count, outputs=["scores", "rows"], axis=0, largest=1, sorted=1)
    return function("CueSearch", ["visual", "query", "entries", "k", "beta"], ["scores", "rows"], b)
