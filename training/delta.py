"""The last step: what was trained, as the delta that the package carries: fp16 safetensors, names and hashes of its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

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
        "sha256": hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "delta.tmp").write_text(json.dumps(delta, indent=2) + "\n", encoding="utf-8")
    (folder / "delta.tmp").replace(folder / "delta.json")
