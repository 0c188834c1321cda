"""Tiny random checkpoints and their packages. Knows no expectation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from rsvlm_export.export import export_checkpoint  # noqa: E402
from rsvlm_infer.backends.base import Prompt, Query  # noqa: E402
from rsvlm_infer.backends.eager import EagerBackend  # noqa: E402
from rsvlm_infer.backends.onnx import OnnxBackend  # noqa: E402
from rsvlm_infer.config import (  # noqa: E402
    AlignmentConfig,
    AugmentationConfig,
    DrisConfig,
    ExpertsConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    TextEncoderConfig,
    VisionConfig,
)
from rsvlm_infer.engine.engine import Engine  # noqa: E402
from rsvlm_infer.engine.request import Request  # noqa: E402
from rsvlm_infer.imagery.pack import PackedScene, pack_scene  # noqa: E402
from rsvlm_infer.imagery.plan import plan_scene  # noqa: E402
from rsvlm_infer.imagery.source import open_scene  # noqa: E402
from rsvlm_infer.knowledge.store import KnowledgeBase  # noqa: E402
from rsvlm_infer.models.checkpoint import save_checkpoint  # noqa: E402
from rsvlm_infer.models.rsvlm import RsvlmModel  # noqa: E402
from tests.tasks.telling_model import END, VOCAB, write_tokenizer  # noqa: E402
from tests.tasks.telling_model import IMAGE as BYTE_IMAGE  # noqa: E402

IMAGE = -200
EMBED = 24

_CLIP = VisionConfig("clip", 32, 48, 4, 4, 4, 5, (1, 2, 3), "quick_gelu", "bicubic", 1e-5, True, True, False, False)
_SIGLIP = VisionConfig("siglip", 32, 48, 3, 2, 4, 6, (0, 2, 3), "gelu_tanh", "bilinear", 1e-6, False, False, True, False)
_DINO = VisionConfig("dinov2", 32, 48, 4, 2, 4, 7, (2, 2, 4), "gelu", "bicubic", 1e-6, True, False, True, True)
_LLAMA = LanguageConfig("llama", 90, 48, 64, 2, 4, 2, 16, 1e-5, 1e4, 512, False, True)
_QWEN = LanguageConfig("qwen2", 80, 40, 56, 2, 2, 1, 32, 1e-6, 1e6, 640, True, False)
_TEXT = TextEncoderConfig(70, 24, 40, 2, 3, 12, "quick_gelu", 1e-5, 69)
_TILES = PreprocessConfig(tile_px=32, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
_DRIS = DrisConfig(leaf_grids=(2, 4, 8), max_tiles=12, max_visual_tokens=400)


def _config(vision: VisionConfig, language: LanguageConfig | None, **parts: Any) -> RsvlmConfig:
    projector = parts.pop("projector", ProjectorConfig(36))
    return RsvlmConfig(vision=vision, preprocess=_TILES, language=language, projector=projector, dris=_DRIS, **parts)


# every family, tiling, kind of expert and optional part at least once, present and absent
CONFIGS: dict[str, RsvlmConfig] = {
    "llava": _config(_CLIP, _LLAMA, tiling="fixed"),
    "llava_next": _config(_CLIP, _QWEN, tiling="anyres", grid_pinpoints=((32, 64), (64, 32), (64, 64))),
    "full": _config(
        _DINO,
        _LLAMA,
        tiling="dris",
        projector=ProjectorConfig(36, pixel_shuffle=2, input_norm=True, box_embedding=True),
        alignment=AlignmentConfig(EMBED, salient_patches=5),
        augmentation=AugmentationConfig(4, cues_per_level=2),
        experts=ExpertsConfig(12, 2, 20),
        grid_pinpoints=((32, 64), (64, 64)),
    ),
    "augmented": _config(
        _SIGLIP,
        _QWEN,
        tiling="dris",
        projector=ProjectorConfig(36, activation="gelu_tanh", box_embedding=True),
        alignment=AlignmentConfig(EMBED, salient_patches=3, head_bias=False),
        augmentation=AugmentationConfig(2),
    ),
    "experts": _config(_SIGLIP, _LLAMA, tiling="fixed", experts=ExpertsConfig(6, 1, 20, "gelu_mlp")),
    "affine": _config(_DINO, _QWEN, tiling="dris", experts=ExpertsConfig(3, 1, 20, "affine")),
    "retrieval": _config(
        _CLIP,
        None,
        projector=None,
        text_encoder=_TEXT,
        alignment=AlignmentConfig(EMBED, pooling="class", head_bias=False, levels=("scene",), text_source="text_encoder"),
    ),
    "clip_2021": _config(
        _CLIP,
        None,
        projector=None,
        text_encoder=dataclasses.replace(_TEXT, eos_token_id=2),
        alignment=AlignmentConfig(EMBED, levels=("region", "scene"), text_source="text_encoder"),
    ),
}

# one token per byte and every part, so that whole commands run; the caption prompt alone has some 150 bytes
SPEAKING = dataclasses.replace(
    CONFIGS["full"],
    language=dataclasses.replace(_LLAMA, vocab_size=VOCAB, max_positions=1024),
    image_token_id=BYTE_IMAGE,
    eos_token_ids=(END,),
)


def random_model(config: RsvlmConfig, seed: int = 0) -> RsvlmModel:
    """Every parameter random, norms, biases and gates too: a weight that is left out or swapped must show."""
    model = RsvlmModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = name.endswith("weight") and parameter.ndim == 1
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 16
        parameter.copy_(1 + 0.2 * noise if scale else noise * fan_in**-0.5 * 1.5)
    return model


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its package, both loaded."""

    config: RsvlmConfig
    checkpoint: Path
    package: Path
    eager: EagerBackend
    onnx: OnnxBackend


def make_pair(folder: Path, config: RsvlmConfig, precision: str = "fp32", **options: Any) -> Pair:
    model = random_model(config)
    knowledge = None
    if config.augmentation is not None:
        knowledge = folder / "entries"
        random_knowledge().save(knowledge)
    tokenizer = write_tokenizer(folder / "tokenizer")
    state = model.state_dict()
    checkpoint = save_checkpoint(folder / "checkpoint", config, state, knowledge=knowledge, tokenizer=tokenizer)
    package = export_checkpoint(checkpoint, folder / "package", precision=precision, **options)
    return Pair(config, checkpoint, package, EagerBackend.load(checkpoint, "float32"), OnnxBackend.load(package))


def random_knowledge() -> KnowledgeBase:
    """Five entries a level, which no checkpoint claims."""
    vectors = np.random.default_rng(7).normal(size=(15, EMBED))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return KnowledgeBase([f"entry {i}" for i in range(15)], np.arange(15) % 3, vectors)


def packed(config: RsvlmConfig, height: int, width: int, seed: int = 0, **changes: Any) -> PackedScene:
    """Noise of a size through our own planner and packer."""
    config = dataclasses.replace(config, **changes)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with open_scene(pixels) as scene:
        return pack_scene(scene, plan_scene(height, width, config), config)


def query(backend: EagerBackend, words: int) -> Query:
    """A question of so many tokens, none for 0."""
    ids = np.arange(3, 3 + words, dtype=np.int32)
    return Query(ids, backend.embed_text([np.arange(3, 6, dtype=np.int32)])[0])


def flip_byte(file: Path) -> None:
    """The same length, one bit of another value in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def prompt(features: Any, words: list[int], image: int = IMAGE) -> Prompt:
    return Prompt(np.array([1, *[image] * features.num_tokens, *words], np.int32), (features,))


def greedy(backend: Any, prompts: list[Prompt], count: int) -> list[list[int]]:
    """Tokens of each prompt, all prompts in one batch."""
    tokens: list[list[int]] = [[] for _ in prompts]
    requests = [Request(each.token_ids, each.images, max_new_tokens=count) for each in prompts]
    for event in Engine(backend).generate(requests):
        tokens[event.request_index].append(event.token_id)
    return tokens


def relative(value: Any, reference: Any) -> float:
    """Largest absolute difference over the largest reference value."""
    value, reference = (np.asarray(each, dtype=np.float64) for each in (value, reference))
    assert value.shape == reference.shape
    if not reference.size:
        return 0.0
    return float(np.abs(value - reference).max() / np.abs(reference).max())
