"""Writes the package of the native backend: every weight as its kernels read it. Knows no kernel, no graph and no runtime."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rsvlm_infer import __version__
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import BackendError, CheckpointError
from rsvlm_infer.hardware import native_why_not
from rsvlm_infer.models.checkpoint import sha256_of
from rsvlm_infer.models.load import LoadedCheckpoint, load_checkpoint
from rsvlm_infer.models.native_package import (
    ARCHITECTURE,
    FORMAT,
    FORMAT_VERSION,
    KIND,
    KNOWLEDGE,
    MANIFEST,
    PRECISIONS,
    WEIGHTS,
    write_weights,
)
from rsvlm_infer.ops.weight_matmul import PackedWeight, pack_weight

COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "MODEL_CARD.md")
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the scale that reaches the largest weight
# what int4 hurts most: of 24 captions of the default model 15 stay those of fp32 with the `down` matrices in int8, 11 without
_INT8_IN_INT4 = ("embed_tokens", "lm_head", "down")
# beginnings of the names of matrices that int8 and int4 packages multiply in integers: there inputs are rounded to int8, per row and
# 32 columns. Of the vision encoder's, int8 matrices are worth having only that way
INT8_INPUTS = ("language_model.", "vision_encoder.blocks.")
GROUP = 32  # rows of a block, and columns that share a scale
Array = npt.NDArray[Any]
State = dict[str, torch.Tensor]


def export_native(
    checkpoint: str | Path,
    folder: str | Path,
    precision: str = "bf16",
    *,
    overwrite: bool = False,
    int8_inputs: Sequence[str] = INT8_INPUTS,
) -> Path:
    """Writes a checkpoint as a native package, at once or not at all.

    Args:
        checkpoint: any supported checkpoint folder; low-rank pairs of a delta are merged.
        folder: must not exist, unless `overwrite`.
        precision: of the language model's matrices: "fp32", "bf16", "int8" or "int4" (one float16 scale per 32 columns). The
            word table and the `down` matrices are int8 in an int4 package. All other matrices are float32 in an fp32 package and
            bf16 otherwise, but for those of the next argument.
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
    target = Path(folder)
    if target.exists() and not overwrite:
        raise CheckpointError(f"folder {target} exists and is not overwritten; choose another one or pass overwrite=True")
    loaded = load_checkpoint(checkpoint)
    if loaded.config.text_encoder is not None:
        raise CheckpointError(
            f"checkpoint {checkpoint} must have no text_encoder for the native backend, got one; use backend 'eager'"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        inputs = tuple(int8_inputs) if precision in ("int8", "int4") else ()
        weights = lay_out(loaded.config, loaded.model.state_dict(), precision, inputs)
        write_weights(new / WEIGHTS, weights)
        (new / "config.json").write_text(json.dumps(loaded.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        for name in COPIED:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, new / name)
        if loaded.knowledge_folder is not None:
            shutil.copytree(loaded.knowledge_folder, new / KNOWLEDGE)
        manifest = _manifest(loaded, precision, inputs, new)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(Path(scratch) / "old")
        new.rename(target)
    return target


def _manifest(loaded: LoadedCheckpoint, precision: str, int8_inputs: Sequence[str], folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": KIND,
        "architecture": ARCHITECTURE,
        "precision": precision,
        "int8_inputs": list(int8_inputs),
        "model": {"embedder": loaded.embedder, "files": loaded.files},
        "made_by": f"rsvlm-infer {__version__}",
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
        },
    }


@dataclass
class _Sorted:
    """A model's parameters by what becomes of them."""

    linears: dict[str, torch.Tensor] = field(default_factory=dict)  # [rows, columns]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: dict[str, torch.Tensor] = field(default_factory=dict)  # row-major, because tokens are sorted by expert


def lay_out(
    config: RsvlmConfig, state: State, precision: str, int8_inputs: Sequence[str] = ()
) -> dict[str, tuple[str, int, int, Array]]:
    """A model's weights by the names and in the layouts of `models.native_package`; see `export_native`."""
    parts = _sort(config, {name: value.detach().float() for name, value in state.items()})
    wide = precision == "fp32"
    laid: dict[str, tuple[str, int, int, Array]] = {}
    for name, weight in parts.linears.items():
        language = name.startswith("language_model.")
        kind = "fp32" if wide or name.endswith(".router") else precision if language else "bf16"
        if kind == "bf16" and name.startswith(tuple(int8_inputs)):
            kind = "int8"
        if kind == "int4" and name.rpartition(".")[2] in _INT8_IN_INT4:
            kind = "int8"
        if kind in ("int8", "int4") and weight.shape[1] % GROUP:
            kind = "bf16"
        laid[name] = (kind, weight.shape[0], weight.shape[1], _laid_out(weight, kind))
    for name, value in parts.vectors.items():
        laid[name] = ("", value.numel(), 0, _numpy(value))
    for name, value in parts.experts.items():  # last: two bytes each may leave what follows at no multiple of four
        content = _numpy(value) if wide else _bf16(value)
        laid[name] = ("" if wide else "raw", value.numel(), 0, content)
    return laid


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


def _laid_out(weight: torch.Tensor, kind: str) -> Array:
    from rsvlm_infer import _C

    if kind == "fp32":  # as bf16 lies: blocks of 32 rows side by side, column by column
        rows, columns = weight.shape
        padded = np.zeros((-(-rows // GROUP) * GROUP, -(-columns // GROUP) * GROUP), np.float32)
        padded[:rows, :columns] = _numpy(weight)
        return np.ascontiguousarray(padded.reshape(-1, GROUP, padded.shape[1]).transpose(0, 2, 1))
    packed = _fit_int4(weight) if kind == "int4" else pack_weight(weight, kind)  # type: ignore[arg-type]
    shape: dict[str, Any] = {"kind": kind, "rows": weight.shape[0], "columns": weight.shape[1], "wide_scales": False}
    layout = np.empty(_C.weight_layout_bytes(**shape), np.uint8)
    scales = 0 if packed.scales is None else packed.scales.data_ptr()
    _C.lay_out_weight(**shape, codes=packed.codes.data_ptr(), scales=scales, layout=layout.ctypes.data)
    return layout


def _fit_int4(weight: torch.Tensor) -> PackedWeight:
    """`pack_weight` with the scale of each group that leaves the least squared error, of a few.

    Some scales cut the largest weight, and some are negative, which gives its sign the code -8: 16 levels then, and not 15.
    """
    rows, columns = weight.shape
    packed = []
    for part in torch.split(weight, 4096):
        groups = part.reshape(len(part), columns // GROUP, GROUP)
        largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # with its sign
        best = codes = scales = None
        for share in _SHARES:
            for scale in ((largest.abs() * share / 7).half(), (largest * -share / 8).half()):
                divisor = torch.where(scale == 0, torch.inf, scale.float())
                found = (groups / divisor).round().clamp(-8, 7)
                error = (found * scale.float() - groups).square().sum(dim=2, keepdim=True)
                if best is None or codes is None or scales is None:
                    best, codes, scales = error, found, scale
                    continue
                better = error < best
                best = torch.where(better, error, best)
                codes, scales = torch.where(better, found, codes), torch.where(better, scale, scales)
        assert codes is not None
        assert scales is not None
        shifted = (codes + 8).to(torch.uint8).view(len(part), columns)
        packed.append((shifted[:, ::2] | (shifted[:, 1::2] << 4), scales[:, :, 0]))
    if not all(torch.isfinite(scales).all() for _, scales in packed):
        raise CheckpointError(f"weights [{rows}, {columns}] must be finite and fit float16 scales; use precision bf16")
    return PackedWeight("int4", torch.cat([codes for codes, _ in packed]), torch.cat([scales for _, scales in packed]))


def _numpy(value: torch.Tensor) -> Array:
    return value.contiguous().numpy()


def _bf16(value: torch.Tensor) -> Array:
    return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
