"""What native twins ask of torch tensors before their addresses cross into C++. Owns no arithmetic and knows no op."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError

# dtype -> its name in `_C`. float16 is left to eager: only AVX-512-FP16 could compute in it, and no model here is stored so.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def check_floats(**tensors: Tensor | None) -> str:
    """All on the CPU, of one dtype that the kernels have; gives that dtype's name.

    Raises:
        InputError: another device, another or mixed dtype, or a gradient is wanted.
    """
    dtype = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise InputError(
                f"{name} must be on the CPU for the native implementation, got {tensor.device}; move it or use 'eager'"
            )
        if dtype is None:
            dtype = tensor.dtype
        if tensor.dtype is not dtype or dtype not in DTYPES:
            raise InputError(
                f"{name} must be float32 or bfloat16 like its neighbours for the native implementation, got {tensor.dtype}; "
                "convert it or use 'eager'"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} must not require a gradient: the native implementation has no backward, got requires_grad=True; "
                "call it under torch.inference_mode() or use 'eager'"
            )
    assert dtype is not None
    return DTYPES[dtype]


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`tensor` has `expected` sizes, None = any; `meaning` is the shape in letters.

    Raises:
        InputError: another shape.
    """
    if tensor.ndim != len(expected) or any(want not in (None, got) for want, got in zip(expected, tensor.shape, strict=True)):
        sizes = ["any" if want is None else want for want in expected]
        raise InputError(f"{name} must be {meaning} = {sizes}, got {list(tensor.shape)}; check the layer that made it")


def innermost_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, a copy otherwise: kernels take any other strides."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
