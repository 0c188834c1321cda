"""What several graphs share: Linear layers at their chosen precision, norms, activations. Knows no graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rsvlm_infer.contract import MICROSOFT_DOMAIN

from ..linears import Linear, ModelWeights
from . import engine_functions, functions, plugin_functions
from .builder import STORED, Graph

HEAD = "language.head"


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """A matrix as unsigned codes in blocks along its inputs: w = (code - zero) · scale.

    codes uint8 [out, blocks, block·bits/8] · scales float32 [out, blocks] · zeros uint8 [out, ceil(blocks·bits/8)] or None for the
    middle of the range.
    """

    bits: int
    block: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None
    accuracy_level: int


@dataclass(frozen=True, eq=False)
class RowCodes:
    """A matrix as int8 with one scale for each output; its inputs are rounded when it runs. codes [in, out], scales [out]."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Precision:
    """How weights are kept: `stored` for everything that is not in `rounded`, which holds codes by Linear name."""

    stored: str = "float32"
    rounded: Mapping[str, BlockCodes | RowCodes] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)  # Linear name -> its own storage dtype


@dataclass(frozen=True)
class Form:
    """Which runtime graphs are written for. A runtime that has half-precision kernels multiplies in `products`, float32 between."""

    kind: str = "onnx"  # one of contract.KINDS
    products: str = "float32"  # dtype of matrix products and attention
    context: int = 0  # places of a cache row, where they are fixed
    plugins: bool = False  # bodies are nodes of our TensorRT plugins; needs half products

    @property
    def engines(self) -> bool:
        return self.kind == "tensorrt"


@dataclass(frozen=True)
class Source:
    """Where a graph's numbers come from."""

    weights: ModelWeights
    precision: Precision
    form: Form = field(default_factory=Form)

    def linear(self, g: Graph, x: str, name: str) -> str:
        """x [..., in] -> [..., out], float32."""
        layer = self.weights.linears[name]
        if self.form.products != "float32":
            y = self.widen(g, self._half_product(g, self.narrow(g, x), name, layer))
            return y if layer.bias is None else g.op("Add", y, g.stored(f"{name}.bias", layer.bias))
        codes = self.precision.rounded.get(name)
        if isinstance(codes, BlockCodes):
            y = _block_product(g, x, name, layer, codes)
        elif isinstance(codes, RowCodes):
            y = _row_product(g, x, name, codes)
        elif name == HEAD:
            y = g.op("Gemm", x, self._kept(g, self._head_key(layer), layer.weight, name), transB=1)
        else:
            y = g.op("MatMul", x, self._kept(g, f"{name}.weight", layer.weight.T, name))
        return y if layer.bias is None else g.op("Add", y, g.stored(f"{name}.bias", layer.bias))

    def _half_product(self, g: Graph, x: str, name: str, layer: Linear) -> str:
        if name == HEAD:
            return g.op("Gemm", x, g.keep(self._head_key(layer), layer.weight, self.form.products), transB=1)
        return g.op("MatMul", x, g.keep(f"{name}.weight", layer.weight.T, self.form.products))

    def _head_key(self, layer: Linear) -> str:
        """The head is kept as [V, Dl], because a tied table is also the word embedding."""
        return (
            "language.table" if layer.weight is self.weights.others["language_model.embed_tokens.weight"] else f"{HEAD}.weight"
        )

    def narrow(self, g: Graph, x: str) -> str:
        """float32 -> the dtype of products."""
        return x if self.form.products == "float32" else g.cast(x, STORED[self.form.products])

    def widen(self, g: Graph, x: str) -> str:
        """What products gave -> float32."""
        return x if self.form.products == "float32" else g.cast(x, TensorProto.FLOAT)

    def factor(self, g: Graph, name: str) -> str:
        """A large parameter that is no Linear, in the dtype of products."""
        value = self.weights.others[name]
        return self.matrix(g, name) if self.form.products == "float32" else g.keep(name, value, self.form.products)

    def _kept(self, g: Graph, key: str, value: Any, name: str) -> str:
        return g.weight(key, value, self.precision.kept.get(name, self.precision.stored))

    def vector(self, g: Graph, name: str) -> str:
        """A small parameter, always float32."""
        return g.stored(name, self.weights.others[name])

    def matrix(self, g: Graph, name: str) -> str:
        """A large parameter that is no Linear."""
        return g.weight(name, self.weights.others[name], self.precision.stored)

    def layer_norm(self, g: Graph, x: str, name: str, eps: float) -> str:
        scale, bias = self.vector(g, f"{name}.weight"), self.vector(g, f"{name}.bias")
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)

    def rms_norm(self, g: Graph, x: str, name: str, eps: float) -> str:
        return g.op("RMSNormalization", x, self.vector(g, f"{name}.weight"), axis=-1, epsilon=eps)


def _block_product(g: Graph, x: str, name: str, layer: Linear, codes: BlockCodes) -> str:
    outputs, inputs = layer.weight.shape
    tensors = [x, g.stored(f"{name}.codes", codes.codes), g.stored(f"{name}.scales", codes.scales)]
    if codes.zeros is not None:
        tensors.append(g.stored(f"{name}.zeros", codes.zeros))
    return g.op(
        "MatMulNBits",
        *tensors,
        domain=MICROSOFT_DOMAIN,
        K=inputs,
        N=outputs,
        bits=codes.bits,
        block_size=codes.block,
        accuracy_level=codes.accuracy_level,
    )


def _row_product(g: Graph, x: str, name: str, codes: RowCodes) -> str:
    """The pattern that onnxruntime joins into one integer product."""
    rounded, scale, zero = g.many("DynamicQuantizeLinear", x, outputs=3)
    weight_zero = g.stored(f"{name}.zero", np.zeros((), np.int8))
    product = g.op("MatMulInteger", rounded, g.stored(f"{name}.codes", codes.codes), zero, weight_zero)
    factor = g.op("Mul", scale, g.stored(f"{name}.scales", codes.scales))
    return g.op("Mul", g.cast(product, TensorProto.FLOAT), factor)


def tile_attention(g: Graph, source: Source, heads: Sequence[str], bounds: Sequence[str], num_heads: int, head_dim: int) -> str:
    """q, k, v [S, H, D] in the dtype of products -> [S, H, D] float32.

    bounds: cu_seqlens, cu_seqlens_k and, for engines, places of both.
    """
    if source.form.plugins:
        body = plugin_functions.varlen_tile_attention(num_heads, head_dim)
    elif source.form.engines:
        body = engine_functions.varlen_tile_attention(engine_functions.fuses(source.form.products, head_dim, num_heads))
    else:
        body = functions.varlen_tile_attention()
    (attended,) = g.own(body, *heads, *bounds, scale=float(head_dim**-0.5))
    return source.widen(g, attended)


def activation(g: Graph, x: str, kind: str) -> str:
    """gelu, gelu_tanh or quick_gelu, as layers/activations.py."""
    if kind == "quick_gelu":
        return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.number(1.702))))
    return g.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")


def unit_length(g: Graph, x: str) -> str:
    """Over the last axis; a vector shorter than 1e-12 keeps its direction and is not blown up, as torch has it."""
    norm = g.op("ReduceL2", x, g.ints(-1), keepdims=1)
    return g.op("Div", x, g.op("Max", norm, g.number(1e-12)))
