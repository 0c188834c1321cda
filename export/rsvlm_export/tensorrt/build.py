"""One graph file becomes one engine for one chip. Knows no package and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsvlm_infer.contract import GraphContract
from rsvlm_infer.errors import BackendError

from .library import Library
from .profiles import Profile

MESSAGES = 3  # of the library, in an error


def build_engine(library: Library, file: Path, contract: GraphContract, profiles: Sequence[Profile], chip: str) -> bytes:
    """The serialized engine.

    Args:
        file: the ONNX graph, its weights beside it. profiles: smallest bucket first; each engine has all of them.
        chip: "sm_89"; the full TensorRT builds for the GPU it sits on, whatever this says.

    Raises:
        BackendError: the library refuses the graph, a profile or the build; its own words are in the message.
    """
    trt = library.module
    logger, said = collecting_logger(trt)
    builder = trt.Builder(logger)
    network, _parser = parse(library, builder, logger, file)
    check_network(trt, network, contract)
    config = builder.create_builder_config()
    if library.rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, chip.replace("sm_", "SM")), 0)
    for number, profile in enumerate(profiles):
        if config.add_optimization_profile(network_profile(builder, contract, profile)) != number:
            raise BackendError(f"{library.name} refuses profile {number} of {file.name} ({_words(said)}); change the bucket")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(
            f"{library.name} {library.version} cannot build {file.name} for {chip} ({_words(said)}); try another version or precision"
        )
    return bytes(serialized)


def parse(library: Library, builder: Any, logger: Any, file: Path) -> tuple[Any, Any]:
    """The network of a graph file, and its parser, which owns the weights and has to outlive the build."""
    trt = library.module
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    embedded = getattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS", None)  # of the full TensorRT
    if embedded is not None:
        flags |= 1 << int(embedded)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        first = parser.get_error(0)
        reason = " ".join(f"{first.node_operator()}: {first.desc()}".split())[:400]
        raise BackendError(f"{library.name} {library.version} cannot read {file.name} ({reason}); try another version")
    return network, parser


def check_network(trt: Any, network: Any, contract: GraphContract) -> None:
    """The parsed network has the contract's inputs and outputs, by name, type and fixed axes.

    Raises:
        BackendError: names what differs.
    """
    types = {name: getattr(trt.DataType, kind) for name, kind in _TYPES.items()}
    found = {
        "inputs": [network.get_input(index) for index in range(network.num_inputs)],
        "outputs": [network.get_output(index) for index in range(network.num_outputs)],
    }
    for kind, expected in (("inputs", contract.inputs), ("outputs", contract.outputs)):
        tensors = {tensor.name: tensor for tensor in found[kind]}
        if set(tensors) != {item.name for item in expected}:
            raise BackendError(
                f"{kind} of {contract.file} must be {[item.name for item in expected]}, TensorRT sees {sorted(tensors)}"
            )
        for item in expected:
            tensor = tensors[item.name]
            shape = tuple(axis if isinstance(axis, int) else -1 for axis in item.shape)
            # of outputs TensorRT may know less, and of a letter more
            same = len(shape) == len(tensor.shape) and all(
                have in (want, -1) or want == -1 for want, have in zip(shape, tensor.shape, strict=True)
            )
            if tensor.dtype != types[item.dtype] or not same:
                raise BackendError(
                    f"{item.name} of {contract.file} must be {item.dtype} {shape}, TensorRT sees {tensor.dtype} {tuple(tensor.shape)}"
                )


_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int32": "INT32",
    "int64": "INT64",
}


def network_profile(builder: Any, contract: GraphContract, profile: Profile) -> Any:
    """A bucket as TensorRT keeps it."""
    made = builder.create_optimization_profile()
    for item in contract.inputs:
        if item.name in profile.scalars:
            bounds = profile.scalars[item.name]
            made.set_shape_input(item.name, [bounds.least], [bounds.best], [bounds.most])
        elif item.shape:
            made.set_shape(item.name, *profile.shapes(item))
    return made


def collecting_logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger that keeps errors for our own message, and says nothing."""
    said: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]  # the class comes from the loaded library
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                said.append(" ".join(message.split()))

    return Collector(), said


def _words(said: list[str]) -> str:
    return "; ".join(said[-MESSAGES:])[:600] or "without a reason"
