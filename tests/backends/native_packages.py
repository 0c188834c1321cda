"""Tiny random checkpoints and their native packages. Knows no expectation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_export.native import export_native  # noqa: E402
from rsvlm_infer.config import (  # noqa: E402
    AlignmentConfig,
    AugmentationConfig,
    ExpertsConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    VisionConfig,
)
from rsvlm_infer.imagery.pack import PackedScene, pack_scene  # noqa: E402
from rsvlm_infer.imagery.plan import plan_scene  # noqa: E402
from rsvlm_infer.imagery.source import open_scene  # noqa: E402
from rsvlm_infer.models.checkpoint import save_checkpoint  # noqa: E402
from rsvlm_infer.models.rsvlm import RsvlmModel  # noqa: E402
from tests.tasks.telling_model import write_tokenizer  # noqa: E402

IMAGE = -200
VISION = VisionConfig("dinov2", 24, 48, 3, 2, 4, 5, (1, 2, 3), "gelu", "bicubic", 1e-6, True, False, True, True)
LANGUAGE = LanguageConfig("llama", 300, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 768, False, True)
CONFIG = RsvlmConfig(
    vision=VISION,
    preprocess=PreprocessConfig(tile_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    language=LANGUAGE,
    projector=ProjectorConfig(40, pixel_shuffle=2, input_norm=True, box_embedding=True),
    alignment=AlignmentConfig(16, salient_patches=3),
    augmentation=AugmentationConfig(num_heads=2),
    experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=16),
    tiling="dris",
)
# widths and heads that are no multiple of anything, biases, an untied head
AWKWARD = dataclasses.replace(
    LANGUAGE,
    family="qwen2",
    qkv_bias=True,
    tie_embeddings=False,
    hidden_size=40,
    intermediate_size=70,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    vocab_size=307,
)


def random_model(config: RsvlmConfig, seed: int = 0, std: float = 0.3) -> RsvlmModel:
    """Every parameter random, gates too."""
    torch.manual_seed(seed)
    model = RsvlmModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def write_package(folder: Path, config: RsvlmConfig, precision: str = "fp32", seed: int = 0) -> tuple[Path, Path]:
    """A random checkpoint and its package: two folders."""
    checkpoint, package = folder / "checkpoint", folder / precision
    if not checkpoint.exists():
        save_checkpoint(
            checkpoint, config, random_model(config, seed).state_dict(), tokenizer=write_tokenizer(folder / "words")
        )
    return checkpoint, export_native(checkpoint, package, precision)


def packed_scene(config: RsvlmConfig, height: int, width: int, seed: int = 0) -> PackedScene:
    """Noise of this many pixels, planned and packed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with open_scene(pixels) as scene:
        return pack_scene(scene, plan_scene(height, width, config), config)
