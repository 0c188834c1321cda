"""LLaVA's own format (`mm_*` keys), and GeoChat's, which differs only in its 1297-row position table. Knows no transformers key.

The vision encoder's config is not in such a checkpoint: it comes from a folder `vision/` (a CLIPVisionModel's config.json)
or, for two public encoders, from the constants below. Its weights are in the checkpoint or in `vision/`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from ...config import PreprocessConfig, ProjectorConfig, RsvlmConfig, VisionConfig
from ...errors import CheckpointError
from ..checkpoint import CheckpointFolder, TensorHeader
from ..weight_tables import NOT_VISION, ORIGINAL_LLAVA_VISION, original_llava, vision
from .base import Layout, Weights, one_table
from .hf_llava import CHAT_TEMPLATES, anyres_preprocess, pinpoints
from .hf_parts import default_preprocess, fill_colour, language_config, require, token_ids, vision_config

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_KNOWN_ENCODERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
_POSITIONS = re.compile(r"(?:.*\.)?embeddings\.position_embedding\.weight")


def _vision_folder(folder: CheckpointFolder) -> CheckpointFolder | None:
    path = folder.path / "vision"
    return CheckpointFolder.open(path) if path.is_dir() else None


def _vision_in(folder: CheckpointFolder) -> bool:
    pattern = re.compile(ORIGINAL_LLAVA_VISION + ".*")
    return any(pattern.fullmatch(name) for name in folder.tensors)


def _config(folder: CheckpointFolder) -> RsvlmConfig:
    values = folder.config or {}
    require("quantization_config" not in values, "quantization_config", "absent", values.get("quantization_config"))
    expected: dict[str, tuple[object, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "image_aspect_ratio": ("pad", "square", "anyres", None),
    }
    for key, allowed in expected.items():
        require(values.get(key) in allowed, key, f"one of {list(allowed)}", values.get(key))
    layer = values.get("mm_vision_select_layer", -2)
    require(type(layer) is int, "mm_vision_select_layer", "one hidden state", layer)
    encoder = _vision(folder, values, layer)
    kind = next((family for family in ("mistral", "qwen2") if family in str(values.get("model_type"))), "llama")
    language = language_config(
        {**values, "model_type": kind}, "lm_head.weight" in folder.tensors, bool(values.get("tie_word_embeddings")), "config"
    )
    anyres = values.get("image_aspect_ratio") == "anyres"
    grids: tuple[tuple[int, int], ...] = ()
    if anyres:
        merge = values.get("mm_patch_merge_type")
        require(merge == "spatial_unpad", "mm_patch_merge_type", '"spatial_unpad" with anyres', merge)
        # written (width, height) here, and the first of equals wins: swap, keep the order
        grids = tuple((height, width) for width, height in pinpoints(values.get("image_grid_pinpoints")))
    return RsvlmConfig(
        vision=encoder,
        preprocess=_preprocess(encoder, values.get("image_aspect_ratio")),
        language=language,
        projector=ProjectorConfig(hidden_size=language.hidden_size),
        tiling="anyres" if anyres else "fixed",
        grid_pinpoints=grids,
        bos_token_id=next(iter(token_ids(values.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=token_ids(values.get("eos_token_id"), "eos_token_id"),
        chat_template=CHAT_TEMPLATES[kind],  # type: ignore[arg-type]
    )


def _preprocess(encoder: VisionConfig, aspect: object) -> PreprocessConfig:
    preprocess = default_preprocess(encoder)
    if aspect == "anyres":
        return anyres_preprocess(preprocess)
    if aspect == "pad":
        return dataclasses.replace(preprocess, fit="pad", pad_value=fill_colour(preprocess.mean))
    return preprocess


def _vision(folder: CheckpointFolder, values: dict[str, Any], layer: int) -> VisionConfig:
    """The encoder's config, its position table as long as the weights say."""
    beside = _vision_folder(folder)
    name = str(values.get("mm_vision_tower"))
    given = beside.config if beside is not None else None
    if given is None:
        known = [key for key in _KNOWN_ENCODERS if key.rpartition("/")[2] == name.rstrip("/").rpartition("/")[2]]
        expected = f"one of {sorted(_KNOWN_ENCODERS)}, or a folder vision/ beside config.json with that encoder's config.json"
        require(bool(known), "mm_vision_tower", expected, name)
        given = _KNOWN_ENCODERS[known[0]]
    given = dict(given.get("vision_config", given))  # a whole CLIP's config holds it inside
    require(given.get("model_type", "clip_vision_model") == "clip_vision_model", "vision/config.json", "a CLIP encoder", given)
    encoder = vision_config({"model_type": "clip_vision_model", **given}, layer)
    tensors: dict[str, TensorHeader] = folder.tensors
    if not _vision_in(folder):
        if beside is None or not any(beside.path.glob("*.safetensors")):
            raise CheckpointError(
                f"checkpoint {folder.path} holds no vision encoder ({name}); copy that encoder's config.json and model.safetensors "
                f"to {folder.path / 'vision'}"
            )
        tensors = beside.tensors
    for source, header in tensors.items():
        side = math.isqrt(header.shape[0] - 1) if header.shape and header.shape[0] > 1 else 0
        if _POSITIONS.fullmatch(source) and not source.startswith("text_model.") and side**2 == header.shape[0] - 1:
            encoder = dataclasses.replace(encoder, position_grid=side)
    return encoder


def _weights(folder: CheckpointFolder, config: RsvlmConfig) -> Weights:
    files = one_table(folder, original_llava(config.vision.family))
    beside = _vision_folder(folder)
    if beside is not None and not _vision_in(folder):
        files += one_table(beside, (*vision(config.vision.family, r"(?:vision_model\.)?"), *NOT_VISION))
    return files


LAYOUT = Layout(
    name="original_llava",
    matches=lambda folder: "mm_vision_tower" in (folder.config or {}),
    config=_config,
    weights=_weights,
)
