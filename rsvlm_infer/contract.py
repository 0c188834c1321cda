"""What an exported package is: file names, manifest, and every graph's inputs, outputs, dtypes and dynamic axes. Knows no runtime.

The writer (`rsvlm_export`) and the readers (`models/package.py`, `backends/`) ask here, so that they cannot drift apart.
Dynamic axes are letters: S patches, T tiles, P patches of the longest tile, k salient patches, Nv visual tokens, B rows, N tokens of a
row, C places of a cache row, K cues of a level, Q query tokens, V visual embeddings, M knowledge entries, R results; T+1 is written as U.

Packages of kind `tensorrt` differ where a length hides in values, which TensorRT cannot size a tensor by: `places` (0..P-1) and
`salient` (0..k-1) carry it as their own length, a cache row has a fixed number of places, and the cache is kept in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import LEVELS, RsvlmConfig

FORMAT = "rsvlm-package"
FORMAT_VERSION = 1  # goes up when an older reader would read a package wrongly
ARCHITECTURE = "rsvlm"
KINDS = ("onnx", "native", "tensorrt")  # graphs for onnxruntime; weights for the C++ core; graphs with TensorRT engines

ENGINES = "engines"  # folder of a tensorrt package, and what its manifest says about each file there
MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"  # written by `rsvlm verify`, so it is no part of the manifest
CONFIG = "config.json"
PREPROCESSING = "preprocessing.json"
DRAFTS = "drafts.safetensors"  # optional, in checkpoints and packages: see `models.draft_table`; it is no weight
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "MODEL_CARD.md", DRAFTS)
KNOWLEDGE = "knowledge"
NATIVE_WEIGHTS = "weights.safetensors"  # of a native package; a graph's weights have its name

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
KIND_PRECISIONS = {"onnx": PRECISIONS, "native": ("fp32", "bf16", "int8", "int4"), "tensorrt": ("fp16", "bf16", "fp32")}
DOMAIN = "rsvlm"  # of our own ops
OPSETS = {"onnx": 23, "tensorrt": 24}  # 24 has TensorScatter, which TensorRT runs as an update of the cache in place
IR_VERSIONS = {"onnx": 11, "tensorrt": 12}  # what belongs to the opset
OPSET = OPSETS["onnx"]
MICROSOFT_DOMAIN = "com.microsoft"  # GroupQueryAttention, MatMulNBits
ATTENTION_HEAD_MULTIPLE = 16  # GroupQueryAttention turns q and k itself only for such head sizes

VISION, ALIGN, BRIDGE, TEXT_EMBED = "vision", "align", "bridge", "text_embed"
WORD_EMBED, DECODER, CUE_SEARCH = "word_embed", "decoder", "cue_search"
GRAPHS = (VISION, ALIGN, BRIDGE, TEXT_EMBED, WORD_EMBED, DECODER, CUE_SEARCH)

Axis = int | str
HALVES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # precision -> dtype of products and cache of an engine


@dataclass(frozen=True)
class TensorContract:
    """One input or output. `dtype` in numpy's words; an int in `shape` is fixed, a letter is dynamic."""

    name: str
    dtype: str
    shape: tuple[Axis, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class GraphContract:
    """One graph: what goes in and what comes out, in this order."""

    name: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    @property
    def weights_file(self) -> str:
        """Where its weights lie; word_embed and decoder read the same file, because a tied table is both."""
        return "language.weights" if self.name in (WORD_EMBED, DECODER) else f"{self.name}.weights"

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "inputs": [item.to_dict() for item in self.inputs],
            "outputs": [item.to_dict() for item in self.outputs],
        }


def tap_names() -> tuple[str, ...]:
    """tap_object, tap_region, tap_scene."""
    return tuple(f"tap_{level}" for level in LEVELS)


def cue_names() -> tuple[str, ...]:
    """cues_object, cues_region, cues_scene."""
    return tuple(f"cues_{level}" for level in LEVELS)


def cache_names(layer: int) -> tuple[str, str, str, str]:
    """past_key, past_value, present_key, present_value of one layer; a reader binds past and present to the same memory."""
    return f"past_key_{layer}", f"past_value_{layer}", f"present_key_{layer}", f"present_value_{layer}"


def graph_contracts(
    config: RsvlmConfig, kind: str = "onnx", precision: str = "fp32", context: int = 0
) -> dict[str, GraphContract]:
    """The graphs that a package of this config has, by name. A part that the config leaves out has no graph.

    Args:
        kind: one of `KINDS`. precision, context: of engines: a key of `HALVES`, and the number of places of a cache row.
    """
    engines = kind == "tensorrt"
    found = [_vision(config, engines)]
    if config.alignment is not None:
        found += [_align(config, engines), _text_embed(config), _cue_search(config, engines)]
    if config.language is not None:
        decoder = _engine_decoder(config, HALVES[precision], context) if engines else _decoder(config)
        found += [_bridge(config), _word_embed(config), decoder]
    return {graph.name: graph for graph in found}


def _f32(name: str, *shape: Axis) -> TensorContract:
    return TensorContract(name, "float32", shape)


def _int(name: str, *shape: Axis, bits: int = 32) -> TensorContract:
    return TensorContract(name, f"int{bits}", shape)


def _vision(config: RsvlmConfig, engines: bool) -> GraphContract:
    """Packed patches of T tiles -> the hidden states at the taps, and the scene tap's class tokens where the family has them."""
    width = config.vision.hidden_size
    patches = _f32("patches", "S", 3 * config.vision.patch_size**2)
    outputs = [_f32(name, "S", width) for name in tap_names()]
    if config.vision.class_token:
        outputs.append(_f32("class_tokens", "T", width))
    inputs = [patches, _int("cu_seqlens", "U"), _int("grids", "T", 2)]
    return GraphContract(VISION, (*inputs, *([_int("places", "P")] if engines else [])), tuple(outputs))


def _align(config: RsvlmConfig, engines: bool) -> GraphContract:
    """One scene's taps -> its embeddings, for the levels that have a head. Tile 0 is the base tile."""
    assert config.alignment is not None
    width, embed = config.vision.hidden_size, config.alignment.embed_size
    inputs = [*(_f32(name, "S", width) for name in tap_names()), _int("cu_seqlens", "U")]
    if config.alignment.pooling == "class":
        inputs.append(_f32("class_tokens", "T", width))
    if engines:
        inputs += [
            item for item, used in ((_int("places", "P"), pools_tiles(config)), (_int("salient", "k"), ranks(config))) if used
        ]
    shapes: dict[str, tuple[Axis, ...]] = {LEVELS[0]: ("T", "k", embed), LEVELS[1]: ("T", embed), LEVELS[2]: (embed,)}
    outputs = tuple(_f32(level, *shapes[level]) for level in LEVELS if level in config.alignment.levels)
    return GraphContract(ALIGN, tuple(inputs), outputs)


def _bridge(config: RsvlmConfig) -> GraphContract:
    """One scene's taps, cues and query -> its visual tokens.

    `token_order` says which token stands at which place: tile tokens by their number, newline tokens (anyres) by the number
    after the last tile token.
    """
    assert config.language is not None
    assert config.projector is not None
    width, language = config.vision.hidden_size, config.language.hidden_size
    inputs = [*(_f32(name, "S", width) for name in tap_names()), _int("cu_seqlens", "U"), _int("grids", "T", 2)]
    if config.projector.box_embedding:
        inputs.append(_f32("boxes", "T", 4))  # zeros add nothing
    if config.augmentation is not None and config.alignment is not None:
        inputs += [_f32(name, f"K_{name}", config.alignment.embed_size) for name in cue_names()]
        inputs.append(_f32("query", "Q", language))
    if config.grid_pinpoints:
        inputs.append(_int("token_order", "Nv", bits=64))
    return GraphContract(BRIDGE, tuple(inputs), (_f32("tokens", "Nv", language),))


def _text_embed(config: RsvlmConfig) -> GraphContract:
    """Texts -> unit vectors: from token ids with a text encoder, else from the decoder's `state` of each text's last token."""
    assert config.alignment is not None
    if config.alignment.text_source == "text_encoder":
        inputs = (_int("token_ids", "B", "N", bits=64),)
    else:
        assert config.language is not None
        inputs = (_f32("states", "B", config.language.hidden_size),)
    return GraphContract(TEXT_EMBED, inputs, (_f32("embeddings", "B", config.alignment.embed_size),))


def _word_embed(config: RsvlmConfig) -> GraphContract:
    """Token ids -> word embeddings: of prompts, of generated tokens, of the query."""
    assert config.language is not None
    output = _f32("embeddings", "N", config.language.hidden_size)
    return GraphContract(WORD_EMBED, (_int("token_ids", "N", bits=64),), (output,))


def _decoder(config: RsvlmConfig) -> GraphContract:
    """Prefill and decode in one graph.

    A row's tokens stand at the end of its `seqlens_k` + 1 tokens; rows of a first prompt (N = total_sequence_length) are padded on the
    right. `last` is the token of each row whose logits and final state come out.
    """
    language = config.language
    assert language is not None
    cache: tuple[Axis, ...] = ("B", language.num_kv_heads, "C", language.head_dim)
    inputs = [
        _f32("inputs_embeds", "B", "N", language.hidden_size),
        _int("seqlens_k", "B"),
        _int("total_sequence_length"),
        _int("last", "B", bits=64),
    ]
    outputs = [_f32("logits", "B", language.vocab_size), _f32("state", "B", language.hidden_size)]
    for layer in range(language.num_layers):
        names = cache_names(layer)
        inputs += [_f32(name, *cache) for name in names[:2]]
        outputs += [_f32(name, *cache) for name in names[2:]]
    return GraphContract(DECODER, tuple(inputs), tuple(outputs))


def _engine_decoder(config: RsvlmConfig, cache_dtype: str, context: int) -> GraphContract:
    """As `_decoder`, for engines: `written` is how many tokens each row's cache holds, and N tokens are written behind them.

    Rows of a prompt are padded on the right to N; what padding wrote is overwritten before it is seen.
    """
    language = config.language
    assert language is not None
    cache: tuple[Axis, ...] = ("B", language.num_kv_heads, context, language.head_dim)
    inputs = [_f32("inputs_embeds", "B", "N", language.hidden_size), _int("written", "B", bits=64), _int("last", "B", bits=64)]
    outputs = [_f32("logits", "B", language.vocab_size), _f32("state", "B", language.hidden_size)]
    for layer in range(language.num_layers):
        names = cache_names(layer)
        inputs += [TensorContract(name, cache_dtype, cache) for name in names[:2]]
        outputs += [TensorContract(name, cache_dtype, cache) for name in names[2:]]
    return GraphContract(DECODER, tuple(inputs), tuple(outputs))


def pools_tiles(config: RsvlmConfig) -> bool:
    """Whether a head reads a mean over tiles, which needs their padded view."""
    assert config.alignment is not None
    return LEVELS[0] in config.alignment.levels or LEVELS[1] in config.alignment.levels or config.alignment.pooling != "class"


def ranks(config: RsvlmConfig) -> bool:
    """Whether a head reads the most salient patches."""
    assert config.alignment is not None
    return LEVELS[0] in config.alignment.levels


def _cue_search(config: RsvlmConfig, engines: bool) -> GraphContract:
    """Knowledge entries of one level -> the best of them, ties by row. A query of zeros is no query."""
    assert config.alignment is not None
    embed = config.alignment.embed_size
    inputs = (
        _f32("visual", "V", embed),
        _f32("query", embed),
        TensorContract("entries", "float16", ("M", embed)),
        _int("k", bits=64),
        TensorContract("beta", "float32" if engines else "float64", ()),
    )
    return GraphContract(CUE_SEARCH, inputs, (_f32("scores", "R"), _int("rows", "R", bits=64)))
