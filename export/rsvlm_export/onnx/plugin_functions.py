"""Bodies that are nodes of our own TensorRT plugins, one for each kernel; only a TensorRT where they are registered reads such a graph.

Names, inputs and attributes are those that `tensorrt/plugins.py` registers. Knows no kernel.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from rsvlm_infer.config import ExpertsConfig
from rsvlm_infer.contract import DOMAIN
from rsvlm_infer.errors import CheckpointError

from .builder import Nodes, Reference, function
from .functions import expert_weight_names


def _plugin(b: Nodes, name: str, *inputs: str, **attributes: Any) -> str:
    """A node that TensorRT's parser looks up by name, version and namespace."""
    return b.op(name, *inputs, domain=DOMAIN, plugin_namespace=DOMAIN, plugin_version="1", **attributes)


def varlen_tile_attention(heads: int, head_dim: int) -> onnx.FunctionProto:
    """q [S, H, D], k, v in half precision, cu_seqlens, cu_seqlens_k [U] -> [S, H, D]; places are taken and not needed."""
    b = Nodes("plugin_attention")
    bounds = (b.cast(name, TensorProto.INT32) for name in ("cu_seqlens", "cu_seqlens_k"))
    schedule = _plugin(b, "tile_schedule", "q", *bounds, head_dim=head_dim)
    scale = Reference("scale", AttributeProto.FLOAT)
    out = _plugin(b, "tile_attention", "q", "k", "v", schedule, heads=heads, head_dim=head_dim, scale=scale)
    b.many("Identity", out, outputs=["out"])
    inputs = ["q", "k", "v", "cu_seqlens", "cu_seqlens_k", "places", "places_k"]
    return function("VarlenTileAttention", inputs, ["out"], b, ["scale"])


def grouped_experts(config: ExpertsConfig, width: int) -> onnx.FunctionProto:
    """As `functions.grouped_experts`, for gated experts.

    Raises:
        CheckpointError: another kind of expert, which has no plugin.
    """
    if config.kind != "glu_silu":
        raise CheckpointError(f"experts.kind must be 'glu_silu' for plugins, got {config.kind!r}; export without plugins")
    b = Nodes("plugin_experts")
    sizes = {"experts": config.num_experts, "slots": config.top_k, "width": width, "hidden": config.intermediate_size}
    routed = ("expert_offsets", "permutation")
    rows = _plugin(b, "experts_up", "x", "w_gate", "w_up", *routed, **sizes)
    parts = _plugin(b, "experts_down", rows, "w_down", *routed, **sizes)
    out = _plugin(b, "experts_combine", parts, "weights", slots=config.top_k, width=width)
    b.many("Identity", out, outputs=["out"])
    return function("GroupedExperts", ["x", *routed, "weights", *expert_weight_names(config)], ["out"], b)
