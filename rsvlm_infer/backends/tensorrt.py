"""A TensorRT package: the host half of the onnx backend, engines in place of sessions. No GPU has run it yet; see docs/tensorrt.md.

Knows no text and no raster. `Runner` is everything that touches the device, so that tests can put another one in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig
from ..contract import CUE_SEARCH, DECODER, ENGINES, VISION, WORD_EMBED, GraphContract, cache_names, graph_contracts
from ..errors import BackendError, InputError
from ..knowledge.store import KnowledgeBase
from ..models.package import Package
from . import cuda_memory
from .onnx import F32, OnnxBackend

MODULES = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt": ("tensorrt",)}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}


def why_not() -> str | None:
    """Why engines cannot run here; None when they can."""
    if not any(importlib.util.find_spec(name) is not None for names in MODULES.values() for name in names):
        return 'neither tensorrt-rtx nor tensorrt is installed; run pip install "rsvlm-infer[tensorrt]"'
    return cuda_memory.why_not()


class Runner(Protocol):
    """Runs the graphs of one package on one device. Arrays are on the host, caches are the runner's own."""

    def run(self, graph: str, profile: int, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Every output of one graph."""

    def empty_cache(self, rows: int) -> Any:
        """Keys and values of every layer, zeros."""

    def keep(self, cache: Any, rows: Sequence[int]) -> Any:
        """A cache of these rows, in this order."""

    def step(self, cache: Any, profile: int, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> F32:
        """The decoder, which writes `cache` in place; one of its outputs."""


@dataclass
class EngineCache:
    """Keys and values on the device, and each row's length [B]."""

    values: Any
    lengths: npt.NDArray[np.int64]
    capacity: int


class TensorrtBackend(OnnxBackend):
    """`Backend` over a package of engines."""

    name = "tensorrt"

    def __init__(self, package: Package, runner: Runner, chip: str, knowledge: KnowledgeBase | None = None) -> None:
        """chip: whose engines the runner has, for their profiles."""
        self.config: RsvlmConfig = package.config
        self.precision = package.precision
        self.knowledge = knowledge
        self.contracts = package_contracts(package)
        self._runner = runner
        self._profiles = {entry["graph"]: entry["profiles"] for entry in engine_entries(package, chip)}
        self.context = int(package.manifest.get("context", 0))
        self.tiles_per_call = min(int(profile["axes"]["T"]["most"]) for profile in self._profiles[VISION])

    @classmethod
    def load(cls, path: Path, provider: str = "cpu", *, verify: bool = True) -> TensorrtBackend:
        """From a package folder, for the first CUDA device; `provider` is onnxruntime's and means nothing here. `verify` reads every
        file and compares it with the manifest first.

        Raises:
            CheckpointError: a damaged, foreign or newer package. BackendError: it has no engines for this device and library.
        """
        package = Package.open(path)
        if verify:
            package.verify()
        device = cuda_memory.Device()
        knowledge = None if package.knowledge_folder is None else KnowledgeBase.load(package.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(package.embedder)
        return cls(package, EngineRunner(package, device), device.chip, knowledge)

    def _run(self, graph: str, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, F32]:
        """One graph on host arrays; lengths that engines read from shapes are added."""
        if graph == WORD_EMBED and not inputs["token_ids"].size:
            assert self.config.language is not None
            return {"embeddings": np.zeros((0, self.config.language.hidden_size), np.float32)}
        wanted = {item.name for item in self.contracts[graph].inputs}
        found = dict(inputs)
        if "places" in wanted:
            found["places"] = np.arange(np.diff(inputs["cu_seqlens"]).max(), dtype=np.int32)
        if "salient" in wanted:
            assert self.config.alignment is not None
            shortest = int(np.diff(inputs["cu_seqlens"]).min())
            found["salient"] = np.arange(min(shortest, self.config.alignment.salient_patches), dtype=np.int32)
        return self._runner.run(graph, self._profile(graph, found), found)

    def _profile(self, graph: str, inputs: Mapping[str, npt.NDArray[Any]]) -> int:
        """The first bucket that takes these shapes.

        Raises:
            InputError: none does.
        """
        shapes = {item.name: item.shape for item in self.contracts[graph].inputs if item.name in inputs}
        for number, profile in enumerate(self._profiles[graph]):
            if not _outside(profile["axes"], shapes, inputs):
                return number
        problems = _outside(self._profiles[graph][-1]["axes"], shapes, inputs)
        raise InputError(f"engines of {graph} take {'; '.join(problems)}; send less at once, or export with other buckets")

    def _context(self) -> int:
        self._require_language()
        return self.context

    def _empty_cache(self, batch: int, capacity: int) -> Any:
        return EngineCache(self._runner.empty_cache(batch), np.zeros(batch, np.int64), capacity)

    def keep(self, cache: Any, rows: Sequence[int]) -> Any:
        """See `Backend.keep`."""
        chosen = np.asarray(list(rows), dtype=np.int64)
        return EngineCache(self._runner.keep(cache.values, chosen.tolist()), cache.lengths[chosen], cache.capacity)

    def _decoder(self, cache: Any, embeds: F32, new: npt.NDArray[np.int64], output: str) -> F32:
        inputs = {"inputs_embeds": np.ascontiguousarray(embeds), "written": cache.lengths, "last": new - 1}
        found = self._runner.step(cache.values, self._profile(DECODER, inputs), inputs, output)
        cache.lengths = cache.lengths + new
        return found


def package_contracts(package: Package) -> dict[str, GraphContract]:
    """What the package's graphs keep to."""
    return graph_contracts(package.config, package.kind, package.precision, int(package.manifest.get("context", 0)))


def engine_entries(package: Package, chip: str) -> list[dict[str, Any]]:
    """What the manifest says about the engines for one chip.

    Raises:
        BackendError: the package has none, or not one for each graph.
    """
    entries = package.manifest.get(ENGINES, [])
    found = [entry for entry in entries if entry["chip"] == chip]
    missing = sorted(set(package_contracts(package)) - {entry["graph"] for entry in found})
    if missing:
        chips = sorted({entry["chip"] for entry in entries})
        raise BackendError(
            f"package {package.path} must have engines for {chip}, it has them for {chips} and misses {missing}; export it again with "
            f"--chip {chip}"
        )
    return found


def _outside(axes: Mapping[str, Any], shapes: Mapping[str, Any], inputs: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Which axes do not fit a profile, a few words each."""
    problems = []
    for name, shape in shapes.items():
        for axis, have in zip(shape, inputs[name].shape, strict=True):
            if isinstance(axis, str) and not axes[axis]["least"] <= have <= axes[axis]["most"]:
                problems.append(f"{name} with {axes[axis]['least']} to {axes[axis]['most']} {axis}, got {have}")
    return problems


class EngineRunner:
    """`Runner` on a CUDA device."""

    def __init__(self, package: Package, device: cuda_memory.Device) -> None:
        """Loads every engine for the device's chip.

        Raises:
            BackendError: no engine for it, or the library that built them is not the one that is here.
        """
        self._device = device
        self._contracts = package_contracts(package)
        entries = engine_entries(package, device.chip)
        self._trt = _library(entries[0]["library"], entries[0]["version"])
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engines: dict[str, tuple[Any, Any]] = {}
        for entry in entries:
            if entry["graph"] == CUE_SEARCH:  # as in the onnx backend, the search is the knowledge base's own
                continue
            engine = self._runtime.deserialize_cuda_engine((package.path / entry["file"]).read_bytes())
            if engine is None:
                raise BackendError(
                    f"{entry['library']} {entry['version']} refuses {entry['file']}; export the package again on this box"
                )
            self._engines[entry["graph"]] = engine, engine.create_execution_context()
        self._buffers: dict[tuple[str, str], cuda_memory.Buffer] = {}

    def run(self, graph: str, profile: int, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """See `Runner.run`."""
        return self._execute(graph, profile, inputs, {}, [item.name for item in self._contracts[graph].outputs])

    def empty_cache(self, rows: int) -> dict[str, cuda_memory.Buffer]:
        """See `Runner.empty_cache`."""
        return {name: self._device.zeros(rows * length) for name, length in self._row_bytes().items()}

    def keep(self, cache: Any, rows: Sequence[int]) -> dict[str, cuda_memory.Buffer]:
        """See `Runner.keep`."""
        kept = {}
        for name, length in self._row_bytes().items():
            kept[name] = self._device.zeros(len(rows) * length)
            for target, source in enumerate(rows):
                self._device.copy(cache[name], source * length, kept[name], target * length, length)
        self._device.wait()  # the old cache may be freed now
        return kept

    def step(self, cache: Any, profile: int, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> F32:
        """See `Runner.step`. Past and present are one buffer: the engine updates the cache in place."""
        bound = dict(cache)
        for layer in range(len(cache) // 2):
            past_key, past_value, present_key, present_value = cache_names(layer)
            bound[present_key], bound[present_value] = cache[past_key], cache[past_value]
        return self._execute(DECODER, profile, inputs, bound, [output])[output]

    def _row_bytes(self) -> dict[str, int]:
        """Bytes of one row of each layer's keys and values."""
        pasts = [item for item in self._contracts[DECODER].inputs if item.name.startswith("past_")]
        return {item.name: math.prod(int(axis) for axis in item.shape[1:]) * ITEM_BYTES[item.dtype] for item in pasts}

    def _execute(
        self,
        graph: str,
        profile: int,
        inputs: Mapping[str, npt.NDArray[Any]],
        bound: Mapping[str, cuda_memory.Buffer],
        wanted: Sequence[str],
    ) -> dict[str, npt.NDArray[Any]]:
        engine, context = self._engines[graph]
        contract = self._contracts[graph]
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise BackendError(f"engine of {graph} refuses profile {profile}; export the package again")
        held = []  # host tensors must outlive the run
        rows = next(iter(inputs.values())).shape[0]
        for item in contract.inputs:
            if item.name in bound:
                context.set_input_shape(item.name, (rows, *item.shape[1:]))
                context.set_tensor_address(item.name, bound[item.name].pointer)
                continue
            value = np.ascontiguousarray(inputs[item.name], dtype=item.dtype)
            if engine.get_tensor_location(item.name) == self._trt.TensorLocation.HOST:
                held.append(value)
                context.set_tensor_address(item.name, value.ctypes.data)
            else:
                buffer = self._buffer(graph, item.name, value.nbytes)
                self._device.upload(buffer, value)
                context.set_tensor_address(item.name, buffer.pointer)
            context.set_input_shape(item.name, value.shape)
        outputs = {}
        for item in contract.outputs:
            if item.name in bound:
                context.set_tensor_address(item.name, bound[item.name].pointer)
                continue
            value = np.empty(tuple(context.get_tensor_shape(item.name)), item.dtype)
            buffer = self._buffer(graph, item.name, value.nbytes)
            context.set_tensor_address(item.name, buffer.pointer)
            if item.name in wanted:
                outputs[item.name] = value, buffer
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"engine of {graph} failed; look at TensorRT's messages above, or use another backend")
        for value, buffer in outputs.values():
            self._device.download(buffer, value)
        return {name: value for name, (value, _) in outputs.items()}

    def _buffer(self, graph: str, name: str, length: int) -> cuda_memory.Buffer:
        """A buffer of at least this length, kept between calls."""
        buffer = self._buffers.get((graph, name))
        if buffer is None or buffer.length < length:
            buffer = self._buffers[graph, name] = cuda_memory.Buffer(self._device, length)
        return buffer


def _library(name: str, version: str) -> Any:
    """The TensorRT that built the engines: another version does not read them."""
    for module in MODULES.get(name, ()):
        if importlib.util.find_spec(module) is not None:
            found = importlib.import_module(module)
            if found.__version__ != version:
                raise BackendError(
                    f"engines need {name} {version}, installed is {found.__version__}; install it, or export again"
                )
            return found
    raise BackendError(f"engines need {name} {version}, which is not installed; install it, or export again")
