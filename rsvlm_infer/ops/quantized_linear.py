"""A Linear layer whose weight is 4- or 8-bit codes with a scale per group: definition and oracle. Knows no model and no file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def quantize_weight(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes of a weight, rounded to the nearest; the largest value of a group becomes the largest code.

    Args:
        weight: [O, K] float. bits: 4 or 8. group: columns that share a scale, a divisor of K and even.

    Returns:
        codes: int8 [O, K] for 8 bits; uint8 [O, K / 2] for 4 bits, column 2i in the low half of byte i, each half code + 8.
        scales: [O, K / group] in the weight's dtype; weight ≈ code · scale.

    Raises:
        InputError: bits or group out of this contract.
    """
    if bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, got {bits}; choose one of them")
    if weight.ndim != 2 or group < 2 or group % 2 or weight.shape[1] % group:
        raise InputError(f"group must be even and divide the columns of weight {list(weight.shape)}, got {group}; use 32 or 64")
    largest = 2 ** (bits - 1) - 1
    grouped = weight.float().view(weight.shape[0], -1, group)  # [O, K/group, group]
    scales = (grouped.abs().amax(dim=2) / largest).to(weight.dtype)  # [O, K/group]
    # codes belong to the scale as it is stored, not to the one before rounding
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()[..., None]
    codes = (grouped / divisor).round().clamp(-largest, largest).flatten(1).to(torch.int8)  # [O, K]
    if bits == 8:
        return codes, scales
    halves = (codes + 8).to(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4), scales


def dequantize_weight(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 [O, K] of `quantize_weight`'s codes (uint8 = 4 bits, int8 = 8 bits) and scales."""
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).to(torch.int8) - 8
    grouped = codes.float().view(codes.shape[0], scales.shape[1], -1)
    return (grouped * scales.float()[..., None]).flatten(1)


def check_quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> int:
    """The contract of `quantized_linear`, checked once. Returns the columns per group; raises InputError."""
    if codes.ndim != 2 or codes.dtype not in (torch.int8, torch.uint8):
        raise InputError(
            f"codes must be int8 [O, K] or uint8 [O, K / 2], got {codes.dtype} {list(codes.shape)}; see quantize_weight"
        )
    rows, columns = codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    if x.ndim < 1 or x.shape[-1] != columns:
        raise InputError(
            f"x must be [..., {columns}] for codes {codes.dtype} {list(codes.shape)}, got {list(x.shape)}; check the layer"
        )
    if scales.ndim != 2 or scales.shape[0] != rows or scales.shape[1] < 1 or columns % (2 * scales.shape[1]):
        raise InputError(
            f"scales must be [{rows}, K / group] with an even group that divides K = {columns}, got {list(scales.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise InputError(f"bias must be [{rows}], got {list(bias.shape)}; check the layer")
    return columns // scales.shape[1]


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias with weight = codes · scales; the weight is never rounded to x's dtype.

    Args:
        x: [..., K]. codes, scales: from `quantize_weight`. bias: [O] or None.

    Returns:
        [..., O] in x's dtype, summed in fp32 and rounded once.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    check_quantized_linear(x, codes, scales, bias)
    weight = dequantize_weight(codes, scales)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
