"""CLIP models for retrieval: transformers' CLIPModel and open_clip (RemoteCLIP, GeoRSCLIP). Knows no language model.

The scene head is CLIP's own: last norm and projection of the class token, so the score is the plain CLIP score.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from ...config import AlignmentConfig, PreprocessConfig, RsvlmConfig, TextEncoderConfig, VisionConfig
from ...errors import CheckpointError
from ..checkpoint import CheckpointFolder, read_scalar
from ..weight_tables import hf_clip, open_clip
from .base import Layout, model_type, one_table
from .hf_parts import (
    CLIP_MEAN,
    CLIP_STD,
    Fit,
    activation,
    choice,
    colour,
    integer,
    level_taps,
    number,
    preprocess_config,
    require,
    section,
    vision_config,
)

_log = logging.getLogger(__name__)

_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_OPEN_CLIP_KEYS = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
_FITS: dict[str, Fit] = {"shortest": "crop", "squash": "stretch"}
_HEAD_WIDTH = 64  # open_clip's default


def _retrieval(
    vision: VisionConfig, text: TextEncoderConfig, embed_size: int, preprocess: PreprocessConfig, logit_scale: float
) -> RsvlmConfig:
    end = (
        text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    )  # CLIP's vocabulary ends with start and end of text
    return RsvlmConfig(
        vision=vision,
        preprocess=preprocess,
        text_encoder=text,
        alignment=AlignmentConfig(
            embed_size=embed_size,
            pooling="class",
            head_bias=False,
            levels=("scene",),
            text_source="text_encoder",
            logit_scale=logit_scale,
        ),
        bos_token_id=end - 1,
        eos_token_ids=(end,),
    )


def _logit_scale(folder: CheckpointFolder, name: str) -> float:
    if name not in folder.tensors:
        raise CheckpointError(f"checkpoint {folder.path} lacks the weight {name!r}; download it again")
    return math.exp(read_scalar(folder.tensors[name].file, name))  # stored as its logarithm


def _hf_config(folder: CheckpointFolder) -> RsvlmConfig:
    values = folder.config or {}
    vision = vision_config({"model_type": "clip_vision_model", **section(values, "vision_config")}, None)
    given = {**_TEXT_DEFAULTS, **section(values, "text_config")}
    where = "text_config"
    text = TextEncoderConfig(
        vocab_size=integer(given, "vocab_size", where),
        hidden_size=integer(given, "hidden_size", where),
        intermediate_size=integer(given, "intermediate_size", where),
        num_layers=integer(given, "num_hidden_layers", where),
        num_heads=integer(given, "num_attention_heads", where),
        max_positions=integer(given, "max_position_embeddings", where),
        activation=activation(given["hidden_act"], f"{where}.hidden_act"),
        layer_norm_eps=number(given, "layer_norm_eps", where),
        eos_token_id=integer(given, "eos_token_id", where),
    )
    embed_size = integer({"projection_dim": 512, **values}, "projection_dim", "config")
    return _retrieval(vision, text, embed_size, preprocess_config(folder, vision), _logit_scale(folder, "logit_scale"))


def _open_clip_name(folder: CheckpointFolder, name: str) -> str:
    """The name as the file has it; training with DistributedDataParallel leaves a prefix."""
    return name if name in folder.tensors else f"module.{name}"


def _open_clip_shape(folder: CheckpointFolder, name: str, rank: int) -> tuple[int, ...]:
    header = folder.tensors.get(_open_clip_name(folder, name))
    if header is None or len(header.shape) != rank or 0 in header.shape:
        got = None if header is None else list(header.shape)
        raise CheckpointError(f"checkpoint {folder.path}: weight {name!r} must have {rank} axes, got {got}; download it again")
    return header.shape


def _count_blocks(folder: CheckpointFolder, prefix: str) -> int:
    pattern = re.compile(rf"(?:module\.)?{re.escape(prefix)}transformer\.resblocks\.(\d+)\..*")
    numbers = {int(match[1]) for name in folder.tensors if (match := pattern.fullmatch(name))}
    return max(numbers) + 1 if numbers else 0


def _open_clip_config(folder: CheckpointFolder) -> RsvlmConfig:
    """Sizes come from the weights; heads, activation and colours from open_clip_config.json or open_clip's defaults."""
    outer = folder.read_json("open_clip_config.json")
    if outer is None:
        _log.warning(
            "%s has no open_clip_config.json: assuming exact GELU and heads of %d, open_clip's defaults",
            folder.path,
            _HEAD_WIDTH,
        )
    model = section(outer or {}, "model_cfg")
    vision_values, text_values = section(model, "vision_cfg"), section(model, "text_cfg")
    for key, values in (("model_cfg", model), ("vision_cfg", vision_values), ("text_cfg", text_values)):
        unknown = sorted(set(values) - _OPEN_CLIP_KEYS[key])
        require(not unknown, f"open_clip_config.{key}", f"made of {sorted(_OPEN_CLIP_KEYS[key])}", unknown)
    act = activation("quick_gelu" if model.get("quick_gelu") else "gelu", "quick_gelu")
    width, _, patch, _ = _open_clip_shape(folder, "visual.conv1.weight", 4)
    grid = math.isqrt(_open_clip_shape(folder, "visual.positional_embedding", 2)[0] - 1)
    layers = _count_blocks(folder, "visual.")
    vision = VisionConfig(
        family="clip",
        hidden_size=width,
        intermediate_size=_open_clip_shape(folder, "visual.transformer.resblocks.0.mlp.c_fc.bias", 1)[0],
        num_layers=layers,
        num_heads=width // integer({"head_width": _HEAD_WIDTH, **vision_values}, "head_width", "vision_cfg"),
        patch_size=patch,
        position_grid=grid,
        taps=level_taps(layers, layers),
        activation=act,
        interpolation="bicubic",
        layer_norm_eps=1e-5,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        layer_scale=False,
    )
    vocab, text_width = _open_clip_shape(folder, "token_embedding.weight", 2)
    text = TextEncoderConfig(
        vocab_size=vocab,
        hidden_size=text_width,
        intermediate_size=_open_clip_shape(folder, "transformer.resblocks.0.mlp.c_fc.bias", 1)[0],
        num_layers=_count_blocks(folder, ""),
        num_heads=integer({"heads": text_width // _HEAD_WIDTH, **text_values}, "heads", "text_cfg"),
        max_positions=_open_clip_shape(folder, "positional_embedding", 2)[0],
        activation=act,
        layer_norm_eps=1e-5,
        eos_token_id=2,  # open_clip pools at the highest id
    )
    embed_size = _open_clip_shape(folder, "visual.proj", 2)[1]
    scale = _logit_scale(folder, _open_clip_name(folder, "logit_scale"))
    return _retrieval(
        vision, text, embed_size, _open_clip_preprocess(section(outer or {}, "preprocess_cfg"), grid * patch), scale
    )


def _open_clip_preprocess(values: dict[str, Any], side: int) -> PreprocessConfig:
    where = "preprocess_cfg"
    fit = _FITS[choice(values, "resize_mode", _FITS, where, "shortest")]
    bicubic = choice(values, "interpolation", ("bicubic", "bilinear"), where, "bicubic") == "bicubic"
    mean, std = colour(values, "mean", CLIP_MEAN, where), colour(values, "std", CLIP_STD, where)
    return PreprocessConfig(tile_px=side, mean=mean, std=std, resample="bicubic" if bicubic else "bilinear", fit=fit)


HF_LAYOUT = Layout(
    name="hf_clip",
    matches=lambda folder: model_type(folder) == "clip" and "visual_projection.weight" in folder.tensors,
    config=_hf_config,
    weights=lambda folder, config: one_table(folder, hf_clip()),
)

OPEN_CLIP_LAYOUT = Layout(
    name="open_clip",
    matches=lambda folder: (
        model_type(folder) in (None, "clip") and _open_clip_name(folder, "visual.conv1.weight") in folder.tensors
    ),
    config=_open_clip_config,
    weights=lambda folder, config: one_table(folder, open_clip()),
)
