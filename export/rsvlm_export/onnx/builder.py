"""Nodes, weights and functions become one ONNX model with its weights in a file beside it. Knows no layer of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rsvlm_infer.contract import DOMAIN, IR_VERSIONS, MICROSOFT_DOMAIN, OPSET, OPSETS, Axis, GraphContract
from rsvlm_infer.errors import CheckpointError

ALIGNMENT = 4096  # a page: runtimes map weights instead of reading them
STORED = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """A function's attribute, where a node inside it takes it over."""

    attribute: str
    kind: int


class Nodes:
    """Emits nodes with fresh names; the shared half of graphs and function bodies.

    prefix: of every name; TensorRT's parser puts names of bodies and of the graph into one space.
    """

    def __init__(self, prefix: str = "t") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._count = 0

    def fresh(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def many(
        self, kind: str, *inputs: str, outputs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """One node; the names of its outputs."""
        names = tuple(self.fresh() for _ in range(outputs)) if isinstance(outputs, int) else tuple(outputs)
        plain = {name: value for name, value in attributes.items() if not isinstance(value, Reference)}
        node = helper.make_node(kind, list(inputs), list(names), domain=domain, **plain)
        for name, value in attributes.items():
            if isinstance(value, Reference):
                node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=value.attribute, type=value.kind))
        self.nodes.append(node)
        return names

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """One node with one output; its name."""
        return self.many(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def const(self, value: Array) -> str:
        return self.op("Constant", value=numpy_helper.from_array(value))

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.const(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self.const(np.array(value, dtype=np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.const(np.array(value, dtype=np.float32))

    def cast(self, x: str, dtype: int) -> str:
        return self.op("Cast", x, to=dtype)

    def int64(self, x: str) -> str:
        return self.cast(x, TensorProto.INT64)

    def reshape(self, x: str, *shape: int) -> str:
        """-1 is what is left, 0 is the input's own side."""
        return self.op("Reshape", x, self.ints(*shape))

    def slice(self, x: str, start: int, stop: int, axis: int = 0) -> str:
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def squeeze(self, x: str, *axes: int) -> str:
        return self.op("Squeeze", x, self.ints(*axes))

    def side(self, x: str, axis: int) -> str:
        """The length of one axis as an int64 scalar."""
        return self.squeeze(self.op("Shape", x, start=axis, end=axis + 1), 0)

    def side_vector(self, x: str, axis: int) -> str:
        """The length of one axis as an int64 vector of one number."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def range(self, stop: str) -> str:
        """0..stop-1, int64."""
        return self.op("Range", self.integer(0), stop, self.integer(1))

    def sum(self, x: str, axis: int, keep: bool = False) -> str:
        return self.op("ReduceSum", x, self.ints(axis), keepdims=int(keep))

    def softmax(self, x: str) -> str:
        return self.op("Softmax", x, axis=-1)


class WeightFile:
    """The tensors of one or several graphs, one after another in one file; a name is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def place(self, name: str, value: Array) -> tuple[int, int]:
        """Offset and length in bytes of a tensor, which is appended when its name is new."""
        if name not in self._places:
            raw = np.ascontiguousarray(value).tobytes()
            start = -(-self._end // ALIGNMENT) * ALIGNMENT if len(raw) >= ALIGNMENT else self._end
            with self.path.open("ab") as file:
                file.write(b"\0" * (start - self._end))
                file.write(raw)
            self._places[name] = (start, len(raw))
            self._end = start + len(raw)
        return self._places[name]


class Graph(Nodes):
    """One graph under construction, held to its contract when it is finished."""

    def __init__(self, contract: GraphContract, weights: WeightFile, kind: str = "onnx") -> None:
        """kind: one of contract.KINDS, for its opset."""
        super().__init__()
        self.contract = contract
        self.kind = kind
        self.weight_file = weights
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._initializers: dict[str, onnx.TensorProto] = {}

    def own(self, function: onnx.FunctionProto, *inputs: str, outputs: int = 1, **attributes: Any) -> tuple[str, ...]:
        """A node of one of our own ops, whose body goes into the model."""
        function.opset_import[0].version = OPSETS[self.kind]
        self.functions[function.name] = function
        return self.many(function.name, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def stored(self, name: str, value: Array, onnx_type: int | None = None) -> str:
        """A tensor in the weights file; its name. `onnx_type` for what numpy has no dtype for."""
        if name not in self._initializers:
            offset, length = self.weight_file.place(name, value)
            tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype) if onnx_type is None else onnx_type
            for key, text in (("location", self.weight_file.path.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(text))
            self._initializers[name] = tensor
        return name

    def weight(self, name: str, value: Array, dtype: str = "float32") -> str:
        """A float32 weight, kept in `dtype` and widened where it is used (once, when the runtime folds constants)."""
        return self.widen(self.keep(name, value, dtype), dtype)

    def keep(self, name: str, value: Array, dtype: str) -> str:
        """A float32 weight, rounded to `dtype` and not widened."""
        if dtype == "float32":
            return self.stored(name, value.astype(np.float32))
        return self.stored(f"{name}.{dtype}", rounded_bits(name, value, dtype), STORED[dtype])

    def widen(self, x: str, dtype: str) -> str:
        return x if dtype == "float32" else self.cast(x, TensorProto.FLOAT)

    def rename(self, source: str, target: str) -> None:
        """Gives a value the name that the contract wants."""
        self.many("Identity", source, outputs=[target])

    def finish(self, folder: Path) -> Path:
        """Checks and writes the model; its path."""
        graph = helper.make_graph(
            self.nodes,
            self.contract.name,
            [_value(item.name, item.dtype, item.shape) for item in self.contract.inputs],
            [_value(item.name, item.dtype, item.shape) for item in self.contract.outputs],
            list(self._initializers.values()),
        )
        domains = {"": OPSETS[self.kind], DOMAIN: 1, **({MICROSOFT_DOMAIN: 1} if self.kind == "onnx" else {})}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items()],
            functions=list(self.functions.values()),
            ir_version=IR_VERSIONS[self.kind],
            producer_name="rsvlm",
        )
        path = folder / self.contract.file
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path


def function(
    name: str, inputs: Sequence[str], outputs: Sequence[str], body: Nodes, attributes: Sequence[str] = ()
) -> onnx.FunctionProto:
    """The model-local body of one of our own ops."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, list(inputs), list(outputs), body.nodes, opsets, list(attributes))


def rounded_bits(name: str, value: Array, dtype: str) -> Array:
    """float32 -> float16, or bfloat16 as the uint16 that holds its bits; ties to even.

    Raises:
        CheckpointError: a value that the dtype cannot hold.
    """
    if dtype == "float16":
        with np.errstate(over="ignore"):  # an overflow is reported below, in our words
            half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise CheckpointError(
                f"weight {name} must fit float16 (up to 65504), got {np.abs(value).max():.3g}; export with --precision bf16 or fp32"
            )
        return half
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def _value(name: str, dtype: str, shape: Sequence[Axis]) -> onnx.ValueInfoProto:
    kind = STORED[dtype] if dtype in STORED else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))  # numpy has no bfloat16
    return helper.make_tensor_value_info(name, kind, list(shape))
