"""The last step: what was trained, as the delta that the package carries: fp16 safetensors, names and hashes of its base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.models.checkpoint import sha256_of
from rsvlm_infer.pull import BasePart


def write_delta(weights: dict[str, Tensor], folder: Path, base: Sequence[BasePart]) -> None:
    """Writes delta.safetensors and delta.json into `folder`; config.json and the model card stay."""
    temporary = folder / "delta.tmp"
    save_file({name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}, temporary)
    temporary.chmod(0o644)  # safetensors makes files for their owner alone; a package is read by all
    temporary.replace(folder / "delta.safetensors")
    delta = {
        "format": 1,
        "base": [
            {"part": part.part, "source": f"{part.requirement} {part.member}", "sha256": part.member_sha256} for part in base
        ],
        "weights": "delta.safetensors",
        "sha256": sha256_of(folder / "delta.safetensors"),
    }
    _write_json(folder, delta)
    state_drafts(folder)


def state_drafts(folder: Path) -> None:
    """Names the draft table beside the delta with its sha256 in delta.json, where there is one."""
    if (folder / DRAFTS).is_file():
        delta = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
        _write_json(folder, {**delta, "files": {DRAFTS: sha256_of(folder / DRAFTS)}})


def _write_json(folder: Path, delta: dict[str, Any]) -> None:
    (folder / "delta.tmp").write_text(json.dumps(delta, indent=2) + "\n", encoding="utf-8")
    (folder / "delta.tmp").replace(folder / "delta.json")
