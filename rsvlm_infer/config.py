"""Every setting of a model, frozen and complete. Knows no torch, no files but one JSON, no defaults of other people's models.

A config is read once, checked once and never changed; `dataclasses.replace` makes a variant.
Unknown keys raise, because a dropped key is a model that silently differs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import ConfigError

LEVELS: tuple[str, str, str] = ("object", "region", "scene")

Tiling = Literal["fixed", "anyres", "dris"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, **sizes: int) -> None:
    wrong = {name: size for name, size in sizes.items() if size < 1}
    _require(not wrong, f"{section} sizes must be at least 1, got {wrong}; fix config.json")


def _divides(section: str, width_name: str, width: int, num_heads: int) -> None:
    _require(
        width % num_heads == 0,
        f"{width_name} must be a multiple of {section}.num_heads, got {width} and {num_heads}; fix config.json",
    )


@dataclass(frozen=True)
class VisionConfig:
    """A ViT. `taps` are hidden-state indices (0 = embeddings, i = output of block i), one per level, ascending."""

    family: Literal["clip", "siglip", "dinov2"]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    position_grid: int  # side of the trained position table, in patches
    taps: tuple[int, int, int]
    activation: Activation
    interpolation: Literal["bicubic", "bilinear"]
    layer_norm_eps: float
    class_token: bool
    pre_norm: bool  # CLIP's LayerNorm before the first block
    patch_bias: bool
    layer_scale: bool

    def __post_init__(self) -> None:
        _positive(
            "vision",
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            position_grid=self.position_grid,
        )
        _divides("vision", "vision.hidden_size", self.hidden_size, self.num_heads)
        _require(
            all(0 <= tap <= self.num_layers for tap in self.taps) and list(self.taps) == sorted(self.taps),
            f"vision.taps must be three ascending hidden-state indices in 0..{self.num_layers}, got {self.taps}; fix config.json",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class LanguageConfig:
    """A Llama or Qwen2 decoder."""

    family: Literal["llama", "qwen2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    qkv_bias: bool
    tie_embeddings: bool

    def __post_init__(self) -> None:
        _positive(
            "language",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_positions=self.max_positions,
        )
        _require(
            self.head_dim % 2 == 0, f"language.head_dim must be even (RoPE turns pairs), got {self.head_dim}; fix config.json"
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"language.num_heads must be a multiple of language.num_kv_heads, got {self.num_heads} and {self.num_kv_heads}; "
            "fix config.json",
        )


@dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP's causal text encoder, used for alignment when a checkpoint has one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    activation: Activation
    layer_norm_eps: float
    eos_token_id: int  # the pooled position is the first of these; 2 = the highest id (old HF configs)

    def __post_init__(self) -> None:
        _positive(
            "text_encoder",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
        )
        _divides("text_encoder", "text_encoder.hidden_size", self.hidden_size, self.num_heads)


@dataclass(frozen=True)
class ProjectorConfig:
    """Dv (x4 with pixel_shuffle 2) -> language width, two layers."""

    hidden_size: int
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    pixel_shuffle: int = 1  # 2 merges 2x2 patches of one tile into one visual token
    input_norm: bool = False  # LayerNorm before the first Linear, for backbones whose tap is not normalised
    box_embedding: bool = False  # `dris` only: adds Linear(cx, cy, w, h), zero at the start

    def __post_init__(self) -> None:
        _positive("projector", hidden_size=self.hidden_size)
        _require(
            self.pixel_shuffle in (1, 2),
            f"projector.pixel_shuffle must be 1 or 2, got {self.pixel_shuffle}; fix config.json",
        )


@dataclass(frozen=True)
class PreprocessConfig:
    """From uint8 RGB to patches: (x / 255 - mean) / std, resampled to multiples of the patch size."""

    tile_px: int  # side of the base tile (and of every anyres tile)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    fit: Literal["stretch", "crop", "pad"] = "stretch"  # how a scene becomes the square base tile in `fixed`
    pad_value: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _positive("preprocess", tile_px=self.tile_px)
        _require(min(self.std) > 0, f"preprocess.std must be above 0, got {self.std}; fix config.json")
        _require(
            all(0 <= value <= 255 for value in self.pad_value),
            f"preprocess.pad_value must be grey levels 0..255, got {self.pad_value}; fix config.json",
        )


@dataclass(frozen=True)
class DrisConfig:
    """When the planner splits a window and how long a leaf may get."""

    entropy_weight: float = 0.4
    edge_weight: float = 0.3
    variance_weight: float = 0.3
    leaf_grids: tuple[int, ...] = (4, 8, 16)  # patches per side, chosen by complexity
    leaf_thresholds: tuple[float, ...] = (0.15, 0.35)  # complexity from which the next grid is used
    min_gain: float = 0.05
    min_valid_fraction: float = 0.01
    max_depth: int = 8
    max_tiles: int = 64
    max_patches: int = 16384
    max_visual_tokens: int = 2048
    query_aware: bool = False

    def __post_init__(self) -> None:
        _require(
            len(self.leaf_thresholds) == len(self.leaf_grids) - 1
            and list(self.leaf_grids) == sorted(self.leaf_grids)
            and list(self.leaf_thresholds) == sorted(self.leaf_thresholds),
            f"dris.leaf_thresholds must be ascending and one fewer than the ascending dris.leaf_grids, got {self.leaf_thresholds} "
            f"and {self.leaf_grids}; fix config.json",
        )
        _require(min(self.leaf_grids) >= 1, f"dris.leaf_grids must be at least 1, got {self.leaf_grids}; fix config.json")
        _require(
            min(self.max_tiles, self.max_patches, self.max_visual_tokens) >= 1,
            f"dris budgets must be at least 1, got max_tiles={self.max_tiles}, max_patches={self.max_patches}, "
            f"max_visual_tokens={self.max_visual_tokens}; raise them",
        )


@dataclass(frozen=True)
class AlignmentConfig:
    """MS-VLAM heads. `weights` = (global, region, object) of the retrieval score; (1, 0, 0) is the plain CLIP score."""

    embed_size: int
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    salient_patches: int = 8
    pooling: Literal["class", "mean"] = "mean"  # what the global head reads from the base tile
    head_bias: bool = True
    levels: tuple[str, ...] = LEVELS  # heads that exist; CLIP has only the scene head
    text_source: Literal["language", "text_encoder"] = "language"
    text_template: str = "{}"  # what the text side reads; {} is the text. A language model needs to be asked for a summary.
    logit_scale: float = 14.285714  # 1 / 0.07, CLIP's start value; the exponentiated scale

    def __post_init__(self) -> None:
        _positive("alignment", embed_size=self.embed_size, salient_patches=self.salient_patches)
        _require(
            0 < len(self.levels) == len(set(self.levels)) and set(self.levels) <= set(LEVELS),
            f"alignment.levels must be some of {list(LEVELS)}, each once, got {list(self.levels)}; fix config.json",
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """Cross-attention from visual features to retrieved cues and the query."""

    num_heads: int
    cues_per_level: int = 5
    query_weight: float = 0.5  # beta

    def __post_init__(self) -> None:
        _positive("augmentation", num_heads=self.num_heads, cues_per_level=self.cues_per_level)


@dataclass(frozen=True)
class ExpertsConfig:
    """Semantic experts in len(LEVELS) equal groups."""

    num_experts: int
    top_k: int
    intermediate_size: int
    kind: Literal["glu_silu", "gelu_mlp", "affine"] = "glu_silu"

    def __post_init__(self) -> None:
        _positive("experts", intermediate_size=self.intermediate_size)
        _require(
            self.num_experts % len(LEVELS) == 0 and self.num_experts > 0,
            f"experts.num_experts must be a positive multiple of {len(LEVELS)}, got {self.num_experts}; fix config.json",
        )
        _require(
            1 <= self.top_k <= self.num_experts // len(LEVELS),
            f"experts.top_k must be in 1..{self.num_experts // len(LEVELS)} (one group), got {self.top_k}; fix config.json",
        )


@dataclass(frozen=True)
class RsvlmConfig:
    """The whole model. A part that is None is absent: it owns no weights and is never executed."""

    vision: VisionConfig
    preprocess: PreprocessConfig
    language: LanguageConfig | None = None
    projector: ProjectorConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    alignment: AlignmentConfig | None = None
    augmentation: AugmentationConfig | None = None
    experts: ExpertsConfig | None = None
    tiling: Tiling = "fixed"
    dris: DrisConfig = field(default_factory=DrisConfig)
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # anyres: (height, width) in pixels
    image_token_id: int = -200
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: Literal["plain", "vicuna_v1", "mistral_inst", "chatml"] = "plain"
    model_type: Literal["rsvlm"] = "rsvlm"

    def __post_init__(self) -> None:
        _require(
            (self.language is None) == (self.projector is None),
            "language and projector belong together: give both (a vision-language model) or neither (retrieval only); fix config.json",
        )
        _require(
            self.tiling != "anyres" or len(self.grid_pinpoints) > 0,
            'tiling "anyres" needs grid_pinpoints, got none; add them to config.json',
        )
        _require(
            self.preprocess.tile_px % self.vision.patch_size == 0 or self.vision.family == "siglip",
            f"preprocess.tile_px must be a multiple of vision.patch_size {self.vision.patch_size}, got {self.preprocess.tile_px}; "
            "fix config.json",
        )
        _require(
            self.tile_grid >= 1,
            f"preprocess.tile_px must be at least vision.patch_size {self.vision.patch_size}, got {self.preprocess.tile_px}; "
            "fix config.json",
        )
        _require(
            self.tiling != "anyres"
            or all(side > 0 and side % self.preprocess.tile_px == 0 for pair in self.grid_pinpoints for side in pair),
            f"grid_pinpoints must be multiples of preprocess.tile_px {self.preprocess.tile_px}, got {self.grid_pinpoints}; fix config.json",
        )
        if self.projector is not None and self.projector.pixel_shuffle == 2:
            grids = (self.tile_grid, *self.dris.leaf_grids)
            _require(
                all(grid % 2 == 0 for grid in grids),
                f"projector.pixel_shuffle 2 needs even patch grids, got {grids}; change dris.leaf_grids or preprocess.tile_px",
            )
        _require(
            self.augmentation is None or (self.alignment is not None and self.language is not None),
            "augmentation needs alignment (to search cues) and language (to read the query), one is absent; fix config.json",
        )
        if self.augmentation is not None:
            _divides("augmentation", "vision.hidden_size", self.vision.hidden_size, self.augmentation.num_heads)
        if self.alignment is not None:
            _require(
                self.alignment.pooling == "mean" or self.vision.class_token,
                'alignment.pooling "class" needs vision.class_token; use "mean"',
            )
            _require(
                self.alignment.text_template.count("{}") == 1,
                f'alignment.text_template must hold "{{}}" once, got {self.alignment.text_template!r}; fix config.json',
            )
            source = self.text_encoder if self.alignment.text_source == "text_encoder" else self.language
            _require(
                source is not None,
                f'alignment.text_source is "{self.alignment.text_source}" but that part is absent; fix config.json',
            )

    @property
    def tile_grid(self) -> int:
        """Patches per side of the base tile."""
        return self.preprocess.tile_px // self.vision.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the equal config back."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RsvlmConfig:
        """Checked config from JSON values.

        Raises:
            ConfigError: unknown or missing keys and wrong types, all named at once.
        """
        problems: list[str] = []
        config = _build(cls, values, "config", problems)
        if problems:
            raise ConfigError("; ".join(problems) + "; fix config.json")
        return config

    @classmethod
    def from_json(cls, path: Path) -> RsvlmConfig:
        """Checked config from a JSON file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist; pass a checkpoint folder that holds config.json") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"config file {path} is not JSON ({error}); restore it from its source") from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"config file {path} must hold a JSON object, got {type(values).__name__}; restore it from its source"
            )
        return cls.from_dict(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_T = TypeVar("_T")


def _build(cls: type[_T], values: dict[str, Any], where: str, problems: list[str]) -> _T:
    """Builds a dataclass from JSON values, collecting every problem before any is raised."""
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        problems.append(f"{where} has unknown keys {unknown}, known are {sorted(fields)}")
    missing = sorted(
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )
    if missing:
        problems.append(f"{where} lacks the keys {missing}")
    before = len(problems)
    arguments = {
        name: _convert(hints[name], value, f"{where}.{name}", problems) for name, value in values.items() if name in fields
    }
    if missing or unknown or len(problems) > before:
        return typing.cast("_T", None)
    try:
        return cls(**arguments)
    except ConfigError as error:
        problems.append(str(error))
        return typing.cast("_T", None)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where, problems)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(typing.cast("type[Any]", hint), value, where, problems)
    elif origin is Literal:
        if value in typing.get_args(hint):
            return value
        problems.append(f"{where} must be one of {list(typing.get_args(hint))}, got {value!r}")
        return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            items = typing.get_args(hint)
            if items[-1] is Ellipsis:
                return tuple(_convert(items[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
            if len(value) == len(items):
                return tuple(_convert(items[i], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    elif hint is not float and type(value) is hint:
        return value
    problems.append(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
