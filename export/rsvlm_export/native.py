"""Writes the package of the native backend: every weight as its kernels read it. Knows no kernel, no graph and no runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import KIND_PRECISIONS, NATIVE_WEIGHTS
from rsvlm_infer.errors import BackendError, CheckpointError
from rsvlm_infer.hardware import native_why_not
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.load import LoadedCheckpoint, load_checkpoint
from rsvlm_infer.models.native_package import NativePackage, write_weights
from rsvlm_infer.ops.weight_matmul import PackedWeight, pack_weight

from .layerwise import packed_int4
from .package import refuse_existing, write_folder
from .rounding import round_blocks

PRECISIONS = KIND_PRECISIONS["native"]
# what int4 hurts most: of 24 captions of the default model 15 stay those of fp32 with the `down` matrices in int8, 11 without
_INT8_IN_INT4 = ("embed_tokens", "lm_head", "down")
# beginnings of the names of matrices that int8 and int4 packages multiply in integers: there inputs are rounded to int8, per row and
# 32 columns. Of the vision encoder's, int8 matrices are worth having only that way
INT8_INPUTS = ("language_model.", "vision_encoder.blocks.")
GROUP = 32  # rows of a block, and columns that share a scale
Array = npt.NDArray[Any]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LanguagePlan:
    """How the language model's matrices are kept: `kinds` by matrix name, fitted codes by parameter name (without `.weight`)."""

    kinds: Mapping[str, str]
    packed: Mapping[str, PackedWeight]


def export_native(
    checkpoint: str | Path | LoadedCheckpoint,
    folder: str | Path,
    precision: str = "bf16",
    *,
    overwrite: bool = False,
    plan: LanguagePlan | None = None,
    fitted: State | None = None,
    notes: Mapping[str, Any] | None = None,
    int8_inputs: Sequence[str] = INT8_INPUTS,
) -> Path:
    """Writes a checkpoint as a native package, at once or not at all.

    Args:
        checkpoint: any supported checkpoint folder, or a loaded one; low-rank pairs of a delta are merged.
        folder: must not exist, unless `overwrite`.
        precision: of the language model's matrices: "fp32", "bf16", "int8" or "int4" (one float16 scale per 32 columns). All other
            matrices are float32 in an fp32 package and bf16 otherwise, but for those of `int8_inputs`.
        plan: what calibration found for int4. Without one every weight takes its nearest code, and the word table and the `down`
            matrices are int8.
        fitted: parameters that take the place of the checkpoint's, by their names there.
        notes: what the manifest says about plan and fit.
        int8_inputs: of int8 and int4 packages: matrices whose names begin with one of these are multiplied in integers, their inputs
            rounded to int8. Matrices outside of the language model are int8 then. The manifest keeps the list, and a part that is
            taken from it there is multiplied in floats.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists, or a part of the model that the native backend has not. BackendError: no extension.
    """
    if precision not in PRECISIONS:
        raise CheckpointError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}; choose one of them")
    reason = native_why_not()
    if reason is not None:
        raise BackendError(f"the native package is laid out by the native extension: {reason}")
    refuse_existing(folder, overwrite)
    loaded = checkpoint if isinstance(checkpoint, LoadedCheckpoint) else load_checkpoint(checkpoint)
    if loaded.config.text_encoder is not None:
        raise CheckpointError(
            f"checkpoint {loaded.folder} must have no text_encoder for the native backend, got one; use backend 'eager'"
        )

    def fill(new: Path) -> dict[str, Any]:
        inputs = tuple(int8_inputs) if precision in ("int8", "int4") else ()
        state = loaded.model.state_dict() | (fitted or {})
        write_weights(new / NATIVE_WEIGHTS, lay_out(loaded.config, state, precision, plan, inputs))
        return {"int8_inputs": list(inputs), **(notes or {})}

    return write_folder(loaded, folder, "native", precision, fill, overwrite=overwrite)


def in_memory(
    loaded: LoadedCheckpoint, precision: str, plan: LanguagePlan | None = None, int8_inputs: Sequence[str] = ()
) -> NativeBackend:
    """A checkpoint in the native backend as its package would run, without a file."""
    laid = lay_out(loaded.config, loaded.model.state_dict(), precision, plan, int8_inputs)
    weights = {
        name: (kind, rows, columns, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        for name, (kind, rows, columns, values) in laid.items()
    }
    manifest = {"kind": "native", "precision": precision, "int8_inputs": list(int8_inputs)}
    knowledge = None if loaded.knowledge_folder is None else KnowledgeBase.load(loaded.knowledge_folder)
    return NativeBackend(NativePackage(loaded.folder, manifest, loaded.config, weights), knowledge)


@dataclass
class _Sorted:
    """A model's parameters by what becomes of them."""

    linears: dict[str, torch.Tensor] = field(default_factory=dict)  # [rows, columns]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, torch.Tensor] = field(default_factory=dict)  # row-major, because tokens are sorted by expert


def lay_out(
    config: RsvlmConfig, state: State, precision: str, plan: LanguagePlan | None = None, int8_inputs: Sequence[str] = ()
) -> dict[str, tuple[str, int, int, Array]]:
    """A model's weights by the names and in the layouts of `models.native_package`; see `export_native`."""
    parts = _sort(config, {name: value.detach().float() for name, value in state.items()})
    fitted = {} if plan is None else _fuse(config, plan.packed)
    wide = precision == "fp32"
    laid: dict[str, tuple[str, int, int, Array]] = {}
    for name, weight in parts.linears.items():
        kind = _kind(name, weight, precision, plan, int8_inputs)
        laid[name] = (kind, weight.shape[0], weight.shape[1], _laid_out(weight, kind, fitted.get(name)))
    for name, value in parts.vectors.items():
        laid[name] = ("", value.numel(), 0, _numpy(value))
    for name, value in parts.experts.items():  # last: two bytes each may leave what follows at no multiple of four
        content = _numpy(value) if wide else _bf16(value)
        laid[name] = ("" if wide else "raw", value.numel(), 0, content)
    return laid


def _kind(name: str, weight: torch.Tensor, precision: str, plan: LanguagePlan | None, int8_inputs: Sequence[str]) -> str:
    if precision == "fp32" or name.endswith(".router"):
        return "fp32"
    if not name.startswith("language_model."):
        kind = "int8" if name.startswith(tuple(int8_inputs)) else "bf16"
    else:
        kind = precision if plan is None else plan.kinds.get(name, "bf16")
    if plan is None and kind == "int4" and name.rpartition(".")[2] in _INT8_IN_INT4:
        kind = "int8"
    return "bf16" if kind in ("int8", "int4") and weight.shape[1] % GROUP else kind


def _fuse(config: RsvlmConfig, packed: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Codes and scales joined as the weights are: fusing and interleaving move rows, whose zeros have scale 0."""
    codes = _sort(config, {f"{name}.weight": value.codes for name, value in packed.items()}).linears
    scales = _sort(
        config, {f"{name}.weight": value.scales for name, value in packed.items() if value.scales is not None}
    ).linears
    bits = _sort(
        config, {f"{name}.weight": torch.tensor([[8 if value.kind == "int8" else 4]]) for name, value in packed.items()}
    )
    return {
        name: PackedWeight("int8" if bits.linears[name][0, 0] == 8 else "int4", codes[name], scales[name]) for name in codes
    }


def _sort(config: RsvlmConfig, state: State) -> _Sorted:
    """Fuses what shares its input, and tells matrices from the rest."""
    found = _Sorted()
    state = dict(state)
    for name in [name for name in state if name.endswith(".q.weight")]:
        module = name.removesuffix(".q.weight")
        names: tuple[str, ...] = ("q", "k", "v")
        if module.startswith("augmentation."):  # there keys and values read another input
            found.linears[f"{module}.q"] = state.pop(f"{module}.q.weight")
            found.vectors[f"{module}.q.bias"] = state.pop(f"{module}.q.bias")
            names = ("k", "v")
        fused = f"{module}.{''.join(names)}"
        found.linears[fused] = torch.cat([state.pop(f"{module}.{part}.weight") for part in names])
        if f"{module}.{names[0]}.bias" in state:
            found.vectors[f"{fused}.bias"] = torch.cat([state.pop(f"{module}.{part}.bias") for part in names])
    for name in [name for name in state if name.endswith(".mlp.gate.weight")]:
        module = name.removesuffix(".gate.weight")
        found.linears[f"{module}.gate_up"] = _interleaved(state.pop(name), state.pop(f"{module}.up.weight"))
    for name, value in state.items():
        if name in ("experts.w_gate", "experts.w_up", "experts.w_down", "experts.b_up", "experts.b_down"):
            found.experts[name] = value
        elif name == "vision_encoder.position_table" and config.vision.class_token:
            found.vectors["vision_encoder.class_position"], found.vectors[name] = value[0], value[1:]
        elif value.ndim == 2 and name.endswith(".weight") and not name.endswith("box.weight"):
            found.linears[name.removesuffix(".weight")] = value
        else:
            found.vectors[name] = value
    return found


def _interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 rows of gate and of up in turn, zeros behind the last: a thread that has both can go on alone."""
    rows, columns = gate.shape
    padded = [torch.nn.functional.pad(part, (0, 0, 0, -rows % GROUP)).view(-1, GROUP, columns) for part in (gate, up)]
    return torch.stack(padded, dim=1).reshape(-1, columns)


def _laid_out(weight: torch.Tensor, kind: str, fitted: PackedWeight | None = None) -> Array:
    from rsvlm_infer import _C

    if kind == "fp32":  # as bf16 lies: blocks of 32 rows side by side, column by column
        rows, columns = weight.shape
        padded = np.zeros((-(-rows // GROUP) * GROUP, -(-columns // GROUP) * GROUP), np.float32)
        padded[:rows, :columns] = _numpy(weight)
        return np.ascontiguousarray(padded.reshape(-1, GROUP, padded.shape[1]).transpose(0, 2, 1))
    packed = fitted or (_nearest_int4(weight) if kind == "int4" else pack_weight(weight, kind))  # type: ignore[arg-type]
    shape: dict[str, Any] = {"kind": kind, "rows": weight.shape[0], "columns": weight.shape[1], "wide_scales": False}
    layout = np.empty(_C.weight_layout_bytes(**shape), np.uint8)
    scales = 0 if packed.scales is None else packed.scales.data_ptr()
    _C.lay_out_weight(**shape, codes=packed.codes.data_ptr(), scales=scales, layout=layout.ctypes.data)
    return layout


def _nearest_int4(weight: torch.Tensor) -> PackedWeight:
    """Each weight's nearest code, with the scale of each group that leaves the least squared error, of a few."""
    with np.errstate(over="ignore", invalid="ignore"):
        packed = packed_int4(round_blocks(_numpy(weight), 4, symmetric=True))
    if packed.scales is None or not torch.isfinite(packed.scales).all() or not torch.isfinite(weight).all():
        raise CheckpointError(f"weights {list(weight.shape)} must be finite and fit float16 scales; use precision bf16")
    return packed


def _numpy(value: torch.Tensor) -> Array:
    return value.contiguous().numpy()


def _bf16(value: torch.Tensor) -> Array:
    return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
