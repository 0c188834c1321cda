"""A bare vision encoder of transformers: CLIP, SigLIP or DINOv2. Knows no language model and no heads."""

from __future__ import annotations

from ...config import RsvlmConfig
from ..checkpoint import CheckpointFolder
from ..weight_tables import NOT_VISION, vision
from .base import Layout, Weights, model_type, one_table
from .hf_parts import preprocess_config, section, vision_config

_WHOLE = {"siglip": "siglip_vision_model"}  # models whose vision config is nested
_KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "dinov2": "dinov2", **_WHOLE}


def _config(folder: CheckpointFolder) -> RsvlmConfig:
    values = folder.config or {}
    kind = model_type(folder)
    nested = {"model_type": _WHOLE[kind], **section(values, "vision_config")} if kind in _WHOLE else values
    encoder = vision_config(nested, None)
    return RsvlmConfig(vision=encoder, preprocess=preprocess_config(folder, encoder, geometry=False))


def _weights(folder: CheckpointFolder, config: RsvlmConfig) -> Weights:
    prefix = r"(?:dinov2\.)?" if config.vision.family == "dinov2" else r"(?:vision_model\.)?"
    return one_table(folder, (*NOT_VISION, *vision(config.vision.family, prefix)))


LAYOUT = Layout(
    name="hf_vision",
    matches=lambda folder: model_type(folder) in _KINDS,
    config=_config,
    weights=_weights,
)
