"""A tiny checkpoint in this project's own format, with every part. Knows no expectation."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import (  # noqa: E402
    AlignmentConfig,
    AugmentationConfig,
    ExpertsConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    TextEncoderConfig,
    VisionConfig,
)
from rsvlm_infer.models.rsvlm import RsvlmModel  # noqa: E402

VISION = VisionConfig(
    family="clip",
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=2,
    patch_size=14,
    position_grid=2,
    taps=(1, 2, 3),
    activation="quick_gelu",
    interpolation="bicubic",
    layer_norm_eps=1e-5,
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    layer_scale=False,
)
LANGUAGE = LanguageConfig(
    family="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
    qkv_bias=False,
    tie_embeddings=True,
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=40,
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    max_positions=12,
    activation="gelu",
    layer_norm_eps=1e-5,
    eos_token_id=39,
)
PREPROCESS = PreprocessConfig(tile_px=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PLAIN = RsvlmConfig(vision=VISION, preprocess=PREPROCESS, language=LANGUAGE, projector=ProjectorConfig(hidden_size=20))
FULL = RsvlmConfig(
    vision=VISION,
    preprocess=PREPROCESS,
    language=LANGUAGE,
    projector=ProjectorConfig(hidden_size=20, input_norm=True, box_embedding=True),
    text_encoder=TEXT_ENCODER,
    alignment=AlignmentConfig(embed_size=6),
    augmentation=AugmentationConfig(num_heads=2),
    experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=12),
    tiling="anyres",
    grid_pinpoints=((28, 56), (56, 28)),
)


def random_model(config: RsvlmConfig, seed: int = 0) -> RsvlmModel:
    """Every parameter random, gates too."""
    model = RsvlmModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def write_safetensors(path: Path, header: dict[str, Any] | bytes, body: bytes, *, length: int | None = None) -> Path:
    """A file with exactly this header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path
