"""The model's weights as exporters want them: fused Linear layers by name, everything else by our own parameter names.

Knows the model, no graph and no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rsvlm_infer.models.rsvlm import RsvlmModel

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Linear:
    """One matrix product of a graph: y = x · weightᵀ + bias.

    weight [out, in]; `group` is what it belongs to (vision, language, ...); `probe` is the module whose input x is.
    """

    name: str
    group: str
    weight: F32
    bias: F32 | None
    probe: str


@dataclass(frozen=True)
class ModelWeights:
    """`linears` by graph name, `others` by parameter name; all float32."""

    linears: dict[str, Linear]
    others: dict[str, F32]


def model_weights(model: RsvlmModel) -> ModelWeights:
    """Float32 copies of every weight, with the products that read the same input joined into one."""
    state: dict[str, Any] = {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}
    linears: dict[str, Linear] = {}

    def add(name: str, group: str, *modules: str) -> None:
        weight = np.concatenate([state.pop(f"{module}.weight") for module in modules])
        biases = [state.pop(f"{module}.bias", None) for module in modules]
        bias = None if any(part is None for part in biases) else np.concatenate(biases)
        linears[name] = Linear(name, group, weight, bias, modules[0])

    def attention(block: str, group: str, module: str) -> None:
        add(f"{block}.qkv", group, f"{module}.q", f"{module}.k", f"{module}.v")
        add(f"{block}.o", group, f"{module}.o")

    add("vision.patch_embed", "vision", "vision_encoder.patch_embed")
    for index in range(len(model.vision_encoder.blocks)):
        module = f"vision_encoder.blocks.{index}"
        attention(f"vision.{index}", "vision", f"{module}.attention")
        add(f"vision.{index}.fc1", "vision", f"{module}.mlp.fc1")
        add(f"vision.{index}.fc2", "vision", f"{module}.mlp.fc2")
    if model.text_encoder is not None:
        for index in range(len(model.text_encoder.layers)):
            module = f"text_encoder.layers.{index}"
            attention(f"text.{index}", "text", f"{module}.attention")
            add(f"text.{index}.fc1", "text", f"{module}.mlp.fc1")
            add(f"text.{index}.fc2", "text", f"{module}.mlp.fc2")
    if model.alignment is not None:
        for level in model.alignment.config.levels:
            add(f"align.{level}", "align", f"alignment.{level}.proj")
        add("align.text", "align", "alignment.text_proj")
    if model.augmentation is not None:
        add("bridge.cue_proj", "bridge", "augmentation.cue_proj")
        add("bridge.query_proj", "bridge", "augmentation.query_proj")
        for level_index in range(len(model.augmentation.levels)):
            module = f"augmentation.levels.{level_index}"
            add(f"bridge.{level_index}.q", "bridge", f"{module}.q")
            add(f"bridge.{level_index}.kv", "bridge", f"{module}.k", f"{module}.v")
            add(f"bridge.{level_index}.o", "bridge", f"{module}.o")
    if model.projector is not None:
        for layer in ("fc1", "fc2"):
            add(f"bridge.{layer}", "bridge", f"projector.{layer}")
        if model.projector.box is not None:
            add("bridge.box", "bridge", "projector.box")
    if model.language_model is not None:
        for index in range(len(model.language_model.layers)):
            module = f"language_model.layers.{index}"
            attention(f"language.{index}", "language", f"{module}.attention")
            add(f"language.{index}.gate_up", "language", f"{module}.mlp.gate", f"{module}.mlp.up")
            add(f"language.{index}.down", "language", f"{module}.mlp.down")
        if model.language_model.lm_head is not None:
            add("language.head", "language", "language_model.lm_head")
        else:  # tied: the table stays among the others too, and is written once
            table = state["language_model.embed_tokens.weight"]
            linears["language.head"] = Linear("language.head", "language", table, None, "language_model.norm")
    return ModelWeights(linears, state)
