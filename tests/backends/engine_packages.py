"""TensorRT packages of tiny checkpoints without TensorRT and CUDA: stand-ins run their graphs in onnxruntime. Knows no expectation."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.export.packages import random_knowledge, random_model, write_tokenizer  # skips without torch, onnx, onnxruntime

# isort: split
import onnxruntime

from rsvlm_export.linears import model_weights
from rsvlm_export.onnx.parts import Form, Precision
from rsvlm_export.package import Plan, form_contracts, write_package
from rsvlm_export.tensorrt.profiles import profiles
from rsvlm_infer.backends.tensorrt import package_contracts
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import DECODER, ENGINES, HALVES, GraphContract
from rsvlm_infer.models.checkpoint import save_checkpoint
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.package import Package

CHIP = "sm_89"
STREAM = 7


def tiny_checkpoint(folder: Path, config: RsvlmConfig) -> Path:
    """A random checkpoint, with knowledge where it is read."""
    knowledge = None
    if config.augmentation is not None:
        knowledge = folder / "entries"
        random_knowledge().save(knowledge)
    tokenizer = write_tokenizer(folder / "tokenizer")
    return save_checkpoint(
        folder / "checkpoint", config, random_model(config).state_dict(), knowledge=knowledge, tokenizer=tokenizer
    )


def engineless_package(checkpoint: Path, target: Path, precision: str, context: int) -> Path:
    """The graphs, and in place of engines the names of the graphs."""
    loaded = load_checkpoint(checkpoint)
    form = Form("tensorrt", HALVES[precision], context if loaded.config.language is not None else 0)

    def add(folder: Path) -> dict[str, Any]:
        entries = []
        for name, contract in form_contracts(loaded.config, form).items():
            buckets = [
                {"axes": {axis: vars(bounds) for axis, bounds in profile.axes.items()}}
                for profile in profiles(loaded.config, contract, form.context)
            ]
            file = f"{ENGINES}/{CHIP}/{name}.engine"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(contract.file.encode())  # what `HostTensorrt` takes for an engine
            head = {"graph": name, "chip": CHIP, "file": file, "library": "tensorrt", "version": HostTensorrt.__version__}
            entries.append({**head, "profiles": buckets})
        return {ENGINES: entries}

    plan = Plan(precision, Precision(form.products))
    return write_package(loaded, model_weights(loaded.model), plan, target, form=form, add=add)


class OrtRunner:
    """`Runner` on onnxruntime's CPU: the same graphs, other kernels."""

    def __init__(self, package: Package, graphs: Sequence[str] | None = None) -> None:
        """graphs: which ones; None = all."""
        self.contracts = package_contracts(package)
        self.profiles: dict[str, set[int]] = {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {
            name: onnxruntime.InferenceSession(str(package.path / contract.file), options, providers=["CPUExecutionProvider"])
            for name, contract in self.contracts.items()
            if graphs is None or name in graphs
        }

    def run(self, graph: str, profile: int, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self.profiles.setdefault(graph, set()).add(profile)
        names = [item.name for item in self.contracts[graph].outputs]
        return dict(zip(names, self.sessions[graph].run(names, dict(inputs)), strict=True))

    def empty_cache(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        pasts = [item for item in self.contracts[DECODER].inputs if item.name.startswith("past_")]
        return {item.name: np.zeros((rows, *item.shape[1:]), item.dtype) for item in pasts}

    def keep(self, cache: Any, rows: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        return {name: value[list(rows)] for name, value in cache.items()}

    def step(self, cache: Any, profile: int, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> npt.NDArray[np.float32]:
        found = self.run(DECODER, profile, {**inputs, **cache})
        for name in cache:
            cache[name][...] = found[name.replace("past_", "present_")]  # an engine writes in place
        value: npt.NDArray[np.float32] = found[output]
        return value


class HostDriver:
    """Stands for libcuda: the device's memory is this process's, a stream does everything at once, the chip is `CHIP`."""

    def __init__(self, status: int = 0) -> None:
        self.status = status  # of allocations
        self.alive: dict[int, Any] = {}

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = STREAM
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        assert stream.value == STREAM
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuMemAlloc_v2(self, pointer: Any, length: Any) -> int:
        if self.status == 0:
            memory = ctypes.create_string_buffer(b"\xaa" * length.value, length.value)  # nothing is zero by luck
            pointer._obj.value = ctypes.addressof(memory)
            self.alive[ctypes.addressof(memory)] = memory
        return self.status

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.alive[pointer.value]
        return 0

    def cuMemsetD8Async(self, pointer: Any, byte: Any, length: Any, stream: Any) -> int:
        self._check(pointer.value, length.value)
        ctypes.memset(pointer.value, byte.value, length.value)
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, length: Any, stream: Any) -> int:
        self._check(target.value, length.value)
        return self._copy(target, source, length)

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, length: Any, stream: Any) -> int:
        self._check(source.value, length.value)
        return self._copy(target, source, length)

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, length: Any, stream: Any) -> int:
        self._check(target.value, length.value)
        self._check(source.value, length.value)
        return self._copy(target, source, length)

    def _copy(self, target: Any, source: Any, length: Any) -> int:
        if length.value:
            ctypes.memmove(target.value, source.value, length.value)
        return 0

    def _check(self, pointer: int, length: int) -> None:
        """The bytes lie inside of one allocation."""
        assert any(start <= pointer and pointer + length <= start + len(memory) for start, memory in self.alive.items())


class HostTensorrt:
    """Stands for the module `tensorrt`: an engine is the name of a graph, which onnxruntime runs on the addresses that it was given."""

    __version__ = "0.0.0"
    TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    def __init__(self, package: Package, host_tensors: Sequence[str] = ()) -> None:
        self.package = package
        self.host_tensors = host_tensors
        self.profiles: list[tuple[str, int]] = []
        self.refused = ""  # a call that fails

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, content: bytes) -> Any:
        if self.refused == "deserialize":
            return None
        graph = content.decode().removesuffix(".onnx")
        contract = package_contracts(self.package)[graph]
        session = OrtRunner(self.package, (graph,)).sessions[graph]
        location = {item.name: "host" if item.name in self.host_tensors else "device" for item in contract.inputs}
        return SimpleNamespace(
            get_tensor_location=location.__getitem__,
            create_execution_context=lambda: HostContext(self, graph, contract, session),
        )


class HostContext:
    """An execution context; a run reads and writes the bound addresses."""

    def __init__(self, library: HostTensorrt, graph: str, contract: GraphContract, session: Any) -> None:
        self.library, self.graph, self.contract, self.session = library, graph, contract, session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.library.profiles.append((self.graph, profile))
        return self.library.refused != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._run()[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        found = self._run()
        for item in self.contract.outputs:
            raw = np.ascontiguousarray(found[item.name]).tobytes()
            ctypes.memmove(self.addresses[item.name], raw, len(raw))
        return self.library.refused != "execute"

    def _run(self) -> dict[str, npt.NDArray[Any]]:
        inputs = {}
        for item in self.contract.inputs:
            shape = self.shapes[item.name]
            length = int(np.prod(shape)) * np.dtype(item.dtype).itemsize
            raw = ctypes.string_at(self.addresses[item.name], length)
            inputs[item.name] = np.frombuffer(raw, item.dtype).reshape(shape)
        names = [item.name for item in self.contract.outputs]
        return dict(zip(names, self.session.run(names, inputs), strict=True))
