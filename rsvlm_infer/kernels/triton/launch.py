"""What every Triton twin asks before a launch: can it run here, are the tensors where they must be, which chip is it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import library_version

OLDEST, TOO_NEW = (3, 6), (3, 9)  # tried with 3.6 and 3.7; pyproject.toml says the same
INTERPRETED = "interpreted"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# compute capability -> chip family, the key of every configuration table
FAMILIES = {
    (8, 0): "sm80",
    (8, 6): "sm86",
    (8, 7): "sm80",  # Orin: Ampere's instructions and 163 KB of shared memory
    (8, 9): "sm86",  # Ada: the same shared memory as sm_86
    (9, 0): "sm90",
    (10, 0): "sm100",
    (10, 3): "sm100",
    (12, 0): "sm120",
    (12, 1): "sm120",
}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: the variable is read when `jit/` is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@cache
def triton_why_not() -> str | None:
    """Why no Triton kernel can run here; None when they can.

    The interpreter counts as able, because it is how kernels are proven without a GPU; nobody sets its variable by accident.
    """
    version = library_version("triton")
    if version is None:
        return 'triton is not installed; run pip install "rsvlm-infer[triton]"'
    parts = version.split(".")
    if all(part.isdigit() for part in parts[:2]) and not OLDEST <= (int(parts[0]), int(parts[1])) < TOO_NEW:
        return f"triton {version} was never tried, at least 3.6 and below 3.9 is needed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, as a proof)"


@cache
def _family(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    # an unknown chip gets the plainest configuration that fits the smallest shared memory
    return FAMILIES.get((major, minor), "sm86")


def chip_family(device: torch.device) -> str:
    """Key of the configuration tables: "sm80" to "sm120", or "interpreted" on the CPU."""
    if device.type != "cuda":
        return INTERPRETED
    return _family(torch.cuda.current_device() if device.index is None else device.index)


def check_on_device(op: str, dtypes: Sequence[torch.dtype] = FLOATS, **tensors: Tensor | None) -> None:
    """Raises InputError unless all tensors are on one CUDA device (the CPU when interpreting) and the first has one of `dtypes`."""
    wanted = "cpu" if interpreting() else "cuda"
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor
            if tensor.dtype not in dtypes:
                raise InputError(
                    f"{name} of {op} must be one of {[str(dtype) for dtype in dtypes]}, got {tensor.dtype}; convert it first"
                )
        if tensor.device.type != wanted or tensor.device != first.device:
            raise InputError(
                f"{name} of {op} must be on {'one CUDA device' if wanted == 'cuda' else 'the CPU (TRITON_INTERPRET is set)'}, "
                f"got {tensor.device}; move it, or use the implementation 'eager'"
            )


def check_shape(op: str, name: str, tensor: Tensor | None, shape: Sequence[int | None]) -> None:
    """Raises InputError unless `tensor` is None or has `shape` (None = any extent)."""
    if tensor is None:
        return
    matches = tensor.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ["any" if want is None else want for want in shape]
        raise InputError(f"{name} of {op} must have shape {wanted}, got {list(tensor.shape)}; see the op's definition")


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value`, at least 1."""
    return 1 << max(0, value - 1).bit_length()
