"""LLaVA-1.5 and LLaVA-NeXT in transformers' format, from 4.36 to 5.x. Knows no weights beyond their names."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...config import PreprocessConfig, ProjectorConfig, RsvlmConfig
from ..checkpoint import CheckpointFolder
from ..weight_tables import hf_llava
from .base import Layout, model_type, one_table
from .hf_parts import integer, language_config, preprocess_config, require, section, token_ids, vision_config

_VISION_DEFAULTS = {  # LlavaConfig's own: CLIP ViT-L/14 at 336 px
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CHAT_TEMPLATES = {"llama": "vicuna_v1", "mistral": "mistral_inst", "qwen2": "chatml"}


def _config(folder: CheckpointFolder) -> RsvlmConfig:
    values = folder.config or {}
    require("quantization_config" not in values, "quantization_config", "absent", values.get("quantization_config"))
    image_token = integer({"image_token_index": values.get("image_token_id", 32000), **values}, "image_token_index", "config")
    text, vision_values = section(values, "text_config"), section(values, "vision_config")
    if not vision_values or vision_values.get("model_type", "clip_vision_model") == "clip_vision_model":
        # an explicit vision config is complete up to CLIPVisionConfig's defaults, an absent one is LLaVA's
        vision_values = {**({} if vision_values else _VISION_DEFAULTS), "model_type": "clip_vision_model", **vision_values}
    layer = values.get("vision_feature_layer", -2)
    require(type(layer) is int, "vision_feature_layer", "one hidden state", layer)
    vision = vision_config(vision_values, layer)
    strategy = values.get("vision_feature_select_strategy", "default")
    wanted = "default" if vision.class_token else "full"  # "default" drops the first token, whatever it is
    require(strategy == wanted, "vision_feature_select_strategy", f'"{wanted}" with {vision.family}', strategy)
    require(
        values.get("projector_hidden_act", "gelu") == "gelu",
        "projector_hidden_act",
        '"gelu"',
        values.get("projector_hidden_act"),
    )
    require(bool(values.get("multimodal_projector_bias", True)), "multimodal_projector_bias", "true", False)
    tied = bool(text.get("tie_word_embeddings", False) or values.get("tie_word_embeddings", False))
    head = any(name in folder.tensors for name in ("lm_head.weight", "language_model.lm_head.weight"))
    language = language_config(text, head, tied)
    anyres = values["model_type"] == "llava_next"
    preprocess = preprocess_config(folder, vision)
    generation = folder.read_json("generation_config.json") or {}
    kind = text.get("model_type", "llama")
    return RsvlmConfig(
        vision=vision,
        preprocess=anyres_preprocess(preprocess) if anyres else preprocess,
        language=language,
        projector=ProjectorConfig(hidden_size=language.hidden_size),
        tiling="anyres" if anyres else "fixed",
        grid_pinpoints=pinpoints(values.get("image_grid_pinpoints") or _PINPOINTS) if anyres else (),
        image_token_id=image_token,
        bos_token_id=next(iter(token_ids(generation.get("bos_token_id", text.get("bos_token_id")), "bos_token_id")), None),
        eos_token_ids=token_ids(generation.get("eos_token_id", text.get("eos_token_id")), "eos_token_id"),
        chat_template=CHAT_TEMPLATES[kind],  # type: ignore[arg-type]  # language_config checked the kind
    )


def anyres_preprocess(preprocess: PreprocessConfig) -> PreprocessConfig:
    """LLaVA-NeXT resizes its base tile straight to a square and pads the others with black, whatever the processor says."""
    return dataclasses.replace(preprocess, fit="stretch", pad_value=(0, 0, 0))


def pinpoints(values: Any) -> tuple[tuple[int, int], ...]:
    """Checked (height, width) pairs."""
    valid = isinstance(values, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair) for pair in values
    )
    require(valid, "image_grid_pinpoints", "a list of [height, width]", values)
    return tuple((pair[0], pair[1]) for pair in values)


LAYOUT = Layout(
    name="hf_llava",
    matches=lambda folder: model_type(folder) in ("llava", "llava_next") and "mm_vision_tower" not in (folder.config or {}),
    config=_config,
    weights=lambda folder, config: one_table(folder, hf_llava(config.vision.family)),
)
