"""Bodies that TensorRT takes where those of `functions.py` size a tensor by values: its own attention, experts without slices.

Knows no layer. A plugin of the node's name would run instead; these are the path without plugins.
"""

from __future__ import annotations

import onnx
from onnx import AttributeProto, TensorProto

from rsvlm_infer.config import ExpertsConfig

from .builder import Nodes, Reference, function
from .functions import expert_weight_names, packed_rows, padded_rows

# added to the scores of padding: far below any score, and inside float16 together with one
PADDING_SCORE = -3e4
# heads for which tensorrt-rtx 1.7 has attention kernels (sizes 8 to 256 tried on sm_80, sm_89 and sm_120; one key head is refused);
# others are written as plain products
FUSED_HEAD_MULTIPLE, FUSED_HEAD_LEAST = 8, 16


def fuses(products: str, head_dim: int, key_heads: int) -> bool:
    """Whether TensorRT has attention kernels for this; it refuses to build the node without one."""
    sized = head_dim >= FUSED_HEAD_LEAST and head_dim % FUSED_HEAD_MULTIPLE == 0
    return products != "float32" and sized and key_heads > 1


def attention(b: Nodes, q: str, k: str, v: str, mask: str, scale: float | Reference, fused: bool, group: int = 1) -> str:
    """q [B, H, N, D], k, v [B, H/group, M, D], mask [B, 1, N, M] that is added to the scores -> [B, H, N, D]."""
    if fused:
        return b.op("Attention", q, k, v, mask, scale=scale)
    factor = b.op("CastLike", b.op("Constant", value_float=scale), q)
    if group > 1:  # heads that share a key head become rows of one product
        shape = b.op("Concat", b.side_vector(q, 0), b.side_vector(k, 1), b.ints(group), b.op("Shape", q, start=2), axis=0)
        q, (k, v) = b.op("Reshape", q, shape), (b.unsqueeze(each, 2) for each in (k, v))
        mask = b.unsqueeze(mask, 1)
    turned = b.op("Transpose", k, perm=[0, 1, 2, 4, 3] if group > 1 else [0, 1, 3, 2])
    scores = b.op("MatMul", b.op("Mul", q, factor), turned)
    scores = b.op("Add", b.cast(scores, TensorProto.FLOAT), b.cast(mask, TensorProto.FLOAT))
    out = b.op("MatMul", b.op("CastLike", b.softmax(scores), v), v)
    if group == 1:
        return out
    heads = b.op("Mul", b.side_vector(out, 1), b.ints(group))
    return b.op("Reshape", out, b.op("Concat", b.side_vector(out, 0), heads, b.op("Shape", out, start=3), axis=0))


def varlen_tile_attention(fused: bool) -> onnx.FunctionProto:
    """As `functions.varlen_tile_attention`; the length of `places`, `places_k` (0..longest-1) is the longest tile's number of rows."""
    b = Nodes("varlen_tile_attention")
    q, _ = padded_rows(b, "q", "cu_seqlens", b.int64("places"))
    k, valid_k = padded_rows(b, "k", "cu_seqlens_k", b.int64("places_k"))
    v, _ = padded_rows(b, "v", "cu_seqlens_k", b.int64("places_k"))
    # a tile of padding alone averages rows of zeros, so the mask adds a number and never says "nothing"
    mask = b.op("CastLike", b.op("Where", valid_k, b.number(0.0), b.number(PADDING_SCORE)), "q")  # [T, Nk]
    shape = b.op("Concat", b.side_vector(q, 0), b.ints(1), b.side_vector(q, 1), b.side_vector(k, 1), axis=0)
    mask = b.op("Expand", b.unsqueeze(mask, 1, 2), shape)  # [T, 1, N, Nk]
    scale = Reference("scale", AttributeProto.FLOAT)
    heads = [b.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (q, k, v)]
    attended = attention(b, heads[0], heads[1], heads[2], mask, scale, fused)  # [T, H, N, D]
    tiles = b.op("Transpose", attended, perm=[0, 2, 1, 3])
    b.many("Identity", packed_rows(b, tiles, "cu_seqlens", "q"), outputs=["out"])
    inputs = ["q", "k", "v", "cu_seqlens", "cu_seqlens_k", "places", "places_k"]
    return function("VarlenTileAttention", inputs, ["out"], b, ["scale"])


def grouped_experts(config: ExpertsConfig) -> onnx.FunctionProto:
    """As `functions.grouped_experts`: every expert sees every row, and a row's share of it is 0 where it was not chosen.

    How many rows an expert has is a value, so rows cannot be gathered by expert; the plugins do that, this costs E/k times the work.
    """
    b = Nodes("grouped_experts")
    inputs = ["x", "expert_offsets", "permutation", "weights", *expert_weight_names(config)]
    permutation, ends = b.int64("permutation"), b.slice(b.int64("expert_offsets"), 1, config.num_experts + 1)
    places = b.range(b.side(permutation, 0))
    own = b.sum(b.int64(b.op("LessOrEqual", b.unsqueeze(ends, 0), b.unsqueeze(places, 1))), 1)  # expert of each place [N·k]
    by_slot = b.op("ScatterElements", b.op("Mul", own, b.integer(0)), permutation, own, axis=0)
    chosen = b.op("Reshape", by_slot, b.op("Shape", "weights"))  # [N, k]
    total = ""
    for expert in range(config.num_experts):
        hit = b.cast(b.op("Equal", chosen, b.integer(expert)), TensorProto.FLOAT)
        share = b.sum(b.op("Mul", hit, b.cast("weights", TensorProto.FLOAT)), 1, keep=True)  # [N, 1]

        def times(value: str, name: str, expert: int = expert) -> str:
            weight = b.op("Transpose", b.op("Gather", name, b.integer(expert), axis=0), perm=[1, 0])
            product = b.cast(b.op("MatMul", b.op("CastLike", value, "x"), weight), TensorProto.FLOAT)
            bias = name.replace("w_", "b_")
            if bias not in inputs:
                return product
            return b.op("Add", product, b.cast(b.op("Gather", bias, b.integer(expert), axis=0), TensorProto.FLOAT))

        hidden = "x"
        if config.kind == "glu_silu":
            gate = times("x", "w_gate")
            hidden = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), times("x", "w_up"))
        elif config.kind == "gelu_mlp":
            hidden = b.op("Gelu", times("x", "w_up"))
        part = b.op("Mul", times(hidden, "w_down"), share)
        total = b.op("Add", total, part) if total else part
    b.many("CastLike", total, "x", outputs=["out"])
    return function("GroupedExperts", inputs, ["out"], b)
