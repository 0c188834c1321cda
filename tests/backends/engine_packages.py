"""TensorRT packages of tiny checkpoints without TensorRT: their graphs run in onnxruntime. Knows no expectation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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
from rsvlm_infer.contract import DECODER, ENGINES, HALVES
from rsvlm_infer.models.checkpoint import save_checkpoint
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.package import Package

CHIP = "sm_89"


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
    """The graphs, and a manifest that speaks of engines which are not there."""
    loaded = load_checkpoint(checkpoint)
    form = Form("tensorrt", HALVES[precision], context if loaded.config.language is not None else 0)

    def add(folder: Path) -> dict[str, Any]:
        entries = []
        for name, contract in form_contracts(loaded.config, form).items():
            buckets = [
                {"axes": {axis: vars(bounds) for axis, bounds in profile.axes.items()}}
                for profile in profiles(loaded.config, contract, form.context)
            ]
            entries.append({"graph": name, "chip": CHIP, "profiles": buckets})
        return {ENGINES: entries}

    plan = Plan(precision, Precision(form.products))
    return write_package(loaded, model_weights(loaded.model), plan, target, form=form, add=add)


class OrtRunner:
    """`Runner` on onnxruntime's CPU: the same graphs, other kernels."""

    def __init__(self, package: Package) -> None:
        self.contracts = package_contracts(package)
        self.profiles: dict[str, set[int]] = {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {
            name: onnxruntime.InferenceSession(str(package.path / contract.file), options, providers=["CPUExecutionProvider"])
            for name, contract in self.contracts.items()
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
