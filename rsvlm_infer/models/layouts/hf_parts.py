"""Hugging Face part configs (decoder, vision model, image processor) to ours. Knows no weights and no whole model.

Files from a hub leave out what equals the class defaults, so those defaults are written down here. What this model
cannot do exactly is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from ...config import Activation, LanguageConfig, PreprocessConfig, VisionConfig
from ...errors import ConfigError
from ..checkpoint import CheckpointFolder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Fit = Literal["stretch", "crop", "pad"]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}

_VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "dinov2": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    },
}

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_RESAMPLES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def require(condition: bool, key: str, expected: str, value: object) -> None:
    """Refuses one setting of a foreign config.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"{key} must be {expected}, got {value!r}; this model cannot do otherwise, choose another checkpoint")


def activation(name: object, key: str) -> Activation:
    """Our name of an HF activation."""
    require(isinstance(name, str) and name in _ACTIVATIONS, key, f"one of {sorted(_ACTIVATIONS)}", name)
    return _ACTIVATIONS[str(name)]


def choice(values: dict[str, Any], key: str, allowed: Iterable[str], where: str, default: str | None = None) -> str:
    """One of some words; an absent key is `default`."""
    value = values.get(key, default)
    require(isinstance(value, str) and value in allowed, f"{where}.{key}", f"one of {sorted(allowed)}", value)
    return str(value)


def colour(values: dict[str, Any], key: str, default: tuple[float, float, float], where: str) -> tuple[float, float, float]:
    """Three numbers, one per channel."""
    value = values.get(key, default)
    three = isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(item, (int, float)) for item in value)
    require(three, f"{where}.{key}", "three numbers", value)
    return float(value[0]), float(value[1]), float(value[2])


def integer(values: dict[str, Any], key: str, where: str) -> int:
    """A positive whole number."""
    value = values.get(key)
    require(type(value) is int and value > 0, f"{where}.{key}", "a positive whole number", value)
    return int(values[key])


def number(values: dict[str, Any], key: str, where: str) -> float:
    """A positive number."""
    value = values.get(key)
    require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
        f"{where}.{key}",
        "a positive number",
        value,
    )
    return float(values[key])


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested object; absent = empty."""
    value = config.get(key) or {}
    require(isinstance(value, dict), key, "an object", value)
    return dict(value)


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """One id, a list of ids or None, as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    require(all(type(item) is int for item in ids), key, "whole numbers", value)
    return tuple(ids)


def language_config(given: dict[str, Any], has_head: bool, tied: bool, where: str = "text_config") -> LanguageConfig:
    """A decoder's config.

    Args:
        given: HF config values of the decoder.
        has_head: the weights hold an output matrix; then it is used whatever `tied` says, as transformers do from 5.0.
        tied: the config ties input and output embeddings.

    Raises:
        ConfigError: a setting that this decoder has not.
    """
    kind = choice(given, "model_type", _DECODERS, where, "llama")
    values = {**_DECODERS[kind], **given}
    require(values.get("hidden_act", "silu") == "silu", f"{where}.hidden_act", '"silu"', values.get("hidden_act"))
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        require(not values.get(key), f"{where}.{key}", "false", values.get(key))
    if kind != "qwen2":  # Qwen2 names a window even when use_sliding_window is false
        require(values.get("sliding_window") is None, f"{where}.sliding_window", "null", values.get("sliding_window"))
    layer_types = values.get("layer_types") or []
    full = isinstance(layer_types, list) and all(item == "full_attention" for item in layer_types)
    require(full, f"{where}.layer_types", 'all "full_attention"', layer_types)
    heads = integer(values, "num_attention_heads", where)
    hidden = integer(values, "hidden_size", where)
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    values["head_dim"] = values.get("head_dim") or hidden // heads
    return LanguageConfig(
        family="qwen2" if kind == "qwen2" else "llama",
        vocab_size=integer(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=integer(values, "intermediate_size", where),
        num_layers=integer(values, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=integer(values, "num_key_value_heads", where),
        head_dim=integer(values, "head_dim", where),
        rms_norm_eps=number(values, "rms_norm_eps", where),
        rope_theta=_rope_theta(values, where),
        max_positions=integer(values, "max_position_embeddings", where),
        qkv_bias=kind == "qwen2",
        tie_embeddings=tied and not has_head,
    )


def _rope_theta(values: dict[str, Any], where: str) -> float:
    """`rope_theta` beside `rope_scaling` (4.x), or inside `rope_parameters` (5.x)."""
    parameters = {"rope_theta": values.get("rope_theta") or 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        given = section(values, key)
        kind = given.get("rope_type", given.get("type", "default"))
        require(kind == "default", f"{where}.{key}", 'null or of type "default"', given)
        parameters.update(given)
    partial = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    require(partial in (None, 1, 1.0), f"{where}.partial_rotary_factor", "1", partial)
    return number(parameters, "rope_theta", where)


def vision_config(given: dict[str, Any], last_tap: int | None, where: str = "vision_config") -> VisionConfig:
    """A vision model's config.

    Args:
        given: HF config values of the vision model, `model_type` among them.
        last_tap: the hidden state that the checkpoint reads (negative counts from the end, as in HF); None = the last one.

    Raises:
        ConfigError: a setting that this encoder has not.
    """
    kind = choice(given, "model_type", _VISION, where)
    values = {**_VISION[kind], **given}
    dinov2, clip = kind == "dinov2", kind == "clip_vision_model"
    require(values.get("num_channels", 3) == 3, f"{where}.num_channels", "3", values.get("num_channels"))
    hidden = integer(values, "hidden_size", where)
    if dinov2:
        require(not values["use_swiglu_ffn"], f"{where}.use_swiglu_ffn", "false", values["use_swiglu_ffn"])
        require(bool(values["qkv_bias"]), f"{where}.qkv_bias", "true", values["qkv_bias"])
        values["intermediate_size"] = int(hidden * number(values, "mlp_ratio", where))
    layers = integer(values, "num_hidden_layers", where)
    last = layers if last_tap is None else last_tap if last_tap >= 0 else layers + 1 + last_tap
    require(0 <= last <= layers, "vision_feature_layer", f"a hidden state of {layers} layers", last_tap)
    patch = integer(values, "patch_size", where)
    return VisionConfig(
        family="dinov2" if dinov2 else "clip" if clip else "siglip",
        hidden_size=hidden,
        intermediate_size=integer(values, "intermediate_size", where),
        num_layers=layers,
        num_heads=integer(values, "num_attention_heads", where),
        patch_size=patch,
        position_grid=integer(values, "image_size", where) // patch,
        taps=level_taps(layers, last),
        activation=activation(values["hidden_act"], f"{where}.hidden_act"),
        interpolation="bicubic",
        layer_norm_eps=number(values, "layer_norm_eps", where),
        class_token=dinov2 or clip,
        pre_norm=clip,
        patch_bias=not clip,
        layer_scale=dinov2,
    )


def level_taps(layers: int, last: int) -> tuple[int, int, int]:
    """Hidden states for object, region and scene: a third, two thirds, and the one that the checkpoint reads."""
    return min(max(1, layers // 3), last), min(max(1, 2 * layers // 3), last), last


def default_preprocess(vision: VisionConfig) -> PreprocessConfig:
    """What each family's published processors do, for folders without a preprocessor_config.json."""
    side = vision.position_grid * vision.patch_size
    if vision.family == "clip":
        return PreprocessConfig(side, CLIP_MEAN, CLIP_STD, "bicubic", "crop")
    if vision.family == "siglip":
        return PreprocessConfig(side, HALF, HALF, "bicubic", "stretch")
    return PreprocessConfig(side, IMAGENET_MEAN, IMAGENET_STD, "bicubic", "stretch")


def preprocess_config(folder: CheckpointFolder, vision: VisionConfig, *, geometry: bool = True) -> PreprocessConfig:
    """The image processor beside the weights.

    Args:
        geometry: False = only colours are read. A bare vision encoder is not tied to one way of cutting a square.

    Raises:
        ConfigError: steps that this model's preprocessing has not.
    """
    default = default_preprocess(vision)
    values = folder.read_json("preprocessor_config.json")
    if values is None:
        values = section(folder.read_json("processor_config.json") or {}, "image_processor")
    if not values:
        return default
    where = "preprocessor_config"
    rescale = number({"rescale_factor": 1 / 255, **values}, "rescale_factor", where)
    require(
        values.get("do_rescale", True) is True and abs(rescale * 255 - 1) < 1e-6, f"{where}.rescale_factor", "1/255", rescale
    )
    require(values.get("do_normalize", True) is True, f"{where}.do_normalize", "true", values.get("do_normalize"))
    mean, std = colour(values, "image_mean", default.mean, where), colour(values, "image_std", default.std, where)
    resample = values.get("resample", 3)
    require(type(resample) is int and resample in _RESAMPLES, f"{where}.resample", f"one of {_RESAMPLES}", resample)
    side, fit, fill = default.tile_px, default.fit, (0, 0, 0)
    if geometry:
        side, fit = _geometry(values, default, where)
        if values.get("do_pad") and values.get("image_processor_type") in ("LlavaImageProcessor", "LlavaImageProcessorFast"):
            fit, fill = "pad", fill_colour(mean)
    return PreprocessConfig(
        tile_px=side,
        mean=mean,
        std=std,
        resample=_RESAMPLES[resample],  # type: ignore[arg-type]  # checked above
        fit=fit,
        pad_value=fill,
    )


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean colour in whole grey levels, rounded down as LLaVA does."""
    return int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)


def _geometry(values: dict[str, Any], default: PreprocessConfig, where: str) -> tuple[int, Fit]:
    """(tile_px, fit) of an HF processor: shortest edge and centre crop, or a plain resize to a square."""
    crop = bool(values.get("do_center_crop", default.fit == "crop"))
    size = values.get("size", default.tile_px)
    sides = _sides(size) + (_sides(values.get("crop_size", size)) if crop else [])
    square = len(sides) > 0 and all(type(side) is int and side > 0 and side == sides[0] for side in sides)
    require(square, f"{where}.size and crop_size", "the same square", (size, values.get("crop_size")))
    require(values.get("do_resize", True) is True, f"{where}.do_resize", "true", values.get("do_resize"))
    return int(sides[0]), "crop" if crop else "stretch"


def _sides(size: Any) -> list[Any]:
    """A number, {"shortest_edge"} or {"height", "width"} as a list of sides."""
    return list(size.values()) if isinstance(size, dict) else [size]
