"""A model config whose imagery part a test can choose; the weights that it describes do not matter here."""

from __future__ import annotations

from typing import Any

from rsvlm_infer.config import DrisConfig, LanguageConfig, PreprocessConfig, ProjectorConfig, RsvlmConfig, VisionConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def imagery_config(
    tiling: Any = "dris",
    *,
    tile_px: int = 336,
    patch: int = 14,
    family: Any = "clip",
    pixel_shuffle: int = 1,
    pinpoints: tuple[tuple[int, int], ...] = NEXT_PINPOINTS,
    dris: DrisConfig | None = None,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    **preprocess: Any,
) -> RsvlmConfig:
    vision = VisionConfig(
        family=family,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        patch_size=patch,
        position_grid=tile_px // patch,
        taps=(1, 1, 2),
        activation="quick_gelu",
        interpolation="bicubic",
        layer_norm_eps=1e-5,
        class_token=family != "siglip",
        pre_norm=family == "clip",
        patch_bias=False,
        layer_scale=False,
    )
    language = LanguageConfig(
        family="llama",
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=64,
        qkv_bias=False,
        tie_embeddings=True,
    )
    return RsvlmConfig(
        vision=vision,
        preprocess=PreprocessConfig(tile_px=tile_px, mean=mean, std=std, **preprocess),
        language=language,
        projector=ProjectorConfig(hidden_size=8, pixel_shuffle=pixel_shuffle),
        tiling=tiling,
        grid_pinpoints=pinpoints,
        dris=dris or DrisConfig(),
    )
