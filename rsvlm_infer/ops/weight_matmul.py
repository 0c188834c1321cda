"""Matmul with a weight stored in fewer bits: packing, definition and oracle. Knows no layer and no activation format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Kind = Literal["bf16", "int8", "int4"]
GROUP = 32  # columns that share a scale: 0.5 bit per weight with float16 scales
_LARGEST_CODE = {"int8": 127, "int4": 7}
_SMALLEST_SCALE = 1.2e-38  # of inputs: below lie float32's denormal numbers, whose reciprocals overflow


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One [Out, In] weight.

    Attributes:
        kind: bf16, int8 or int4.
        codes: bf16 [Out, In]; int8 [Out, In]; or uint8 [Out, In / 2] where the low half-byte is the even column's code plus 8.
        scales: [Out, In / 32] float16 or float32, the weight is code · scale; None for bf16.
        layouts: where an implementation keeps its own arrangement of this weight, under its name.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor | None = None
    layouts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(Out, In) of the weight."""
        rows, columns = self.codes.shape
        return rows, columns * 2 if self.kind == "int4" else columns


def pack_weight(weight: Tensor, kind: Kind, *, scale_dtype: torch.dtype = torch.float16) -> PackedWeight:
    """Rounds a weight to `kind`: symmetric, one scale per row and group of 32 columns, codes to nearest, ties to even.

    Args:
        weight: [Out, In] float; int8 and int4 need In to be a multiple of 32.

    Raises:
        InputError: an unknown kind, a shape that does not fit, values that are not finite, or scales beyond float16.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind must be one of {list(get_args(Kind))}, got {kind!r}; choose one of them")
    if weight.ndim != 2 or 0 in weight.shape:
        raise InputError(f"weight must be [Out, In] without empty sides, got {list(weight.shape)}; pass one matrix")
    weight = weight.detach()
    if kind == "bf16":
        return PackedWeight(kind, weight.to(torch.bfloat16).contiguous())
    rows, columns = weight.shape
    if columns % GROUP:
        raise InputError(f"weight [Out, In] must have In a multiple of {GROUP} for {kind}, got {columns}; use bf16")
    groups = weight.float().reshape(rows, columns // GROUP, GROUP)
    scales = (groups.abs().amax(dim=2) / _LARGEST_CODE[kind]).to(scale_dtype)  # [Out, In / 32]
    if not torch.isfinite(scales).all():
        raise InputError(
            f"weight must be finite and its scales fit {scale_dtype}, got NaN or infinity; use scale_dtype=torch.float32"
        )
    # a group whose scale rounds to zero is all zeros: its weights are below what the scale's dtype can tell
    divisor = torch.where(scales > 0, scales.float(), torch.inf)
    limit = _LARGEST_CODE[kind]
    codes = (groups / divisor[..., None]).round().clamp(-limit, limit).to(torch.int8).reshape(rows, columns)
    if kind == "int4":
        shifted = (codes + 8).to(torch.uint8)
        codes = shifted[:, ::2] | (shifted[:, 1::2] << 4)
    return PackedWeight(kind, codes.contiguous(), scales.contiguous())


def join_weights(parts: Sequence[PackedWeight]) -> PackedWeight:
    """One [sum of Out, In] weight whose product is the parts' products side by side, in their order and with their bits.

    For layers that read the same x, as q, k and v, or gate and up: one call instead of several, which matters where a call
    costs as much as reading a small weight. `split_with_sizes` takes the product apart again by the parts' Out.

    Raises:
        InputError: no part, parts that differ in more than Out, or a part without codes.
    """
    if not parts:
        raise InputError("parts must hold at least one packed weight, got none; pass what pack_weight gave")
    kinds = set()
    for part in parts:
        check_codes(part)
        scale = None if part.scales is None else part.scales.dtype
        kinds.add(f"{part.kind} of In {part.shape[1]} with scales {scale} on {part.codes.device}")
    if len(kinds) > 1:
        raise InputError(f"parts must be of one kind, In, scale dtype and device, got {sorted(kinds)}; join those that agree")
    scales = [part.scales for part in parts if part.scales is not None]
    return PackedWeight(parts[0].kind, torch.cat([part.codes for part in parts]), torch.cat(scales) if scales else None)


def without_codes(packed: PackedWeight) -> PackedWeight:
    """The same weight once an implementation has laid it out: its layouts stay, the memory of codes and scales is given back.

    Eager and other implementations then refuse it.

    Raises:
        InputError: no layout to fall back on.
    """
    if not packed.layouts:
        raise InputError("packed must have a layout before its codes can go, got none; call an implementation that keeps one")
    scales = None if packed.scales is None else packed.scales.to("meta")
    return replace(packed, codes=packed.codes.to("meta"), scales=scales)


def check_codes(packed: PackedWeight) -> None:
    """Raises InputError when the codes were given up."""
    if packed.codes.is_meta:
        raise InputError(f"packed must have its codes, got layouts of {sorted(packed.layouts)} alone; use those or pack again")


def dequantise(packed: PackedWeight) -> Tensor:
    """[Out, In] float32, exact: code · scale has at most 8 + 11 significant bits with float16 scales.

    Raises:
        InputError: a weight without codes.
    """
    check_codes(packed)
    if packed.scales is None:
        return packed.codes.float()
    codes = packed.codes
    if packed.kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).to(torch.int8) - 8
    rows, columns = packed.shape
    return (codes.float().view(rows, -1, GROUP) * packed.scales.float()[..., None]).view(rows, columns)


def check_weight_matmul(x: Tensor, packed: PackedWeight) -> None:
    """Raises InputError when x does not fit the weight."""
    if x.ndim < 1 or x.shape[-1] != packed.shape[1]:
        raise InputError(
            f"x must be [..., {packed.shape[1]}] for this weight, got {list(x.shape)}; check the layer that made it"
        )


def round_inputs(x: Tensor) -> Tensor:
    """x as integer products see it: each group of 32 columns rounded to 127 steps on each side of zero, ties to even.

    The native backend multiplies these codes with those of int8 and int4 weights; this is its definition.

    Args:
        x: [..., In] float, In a multiple of 32.

    Returns:
        [..., In] float32, code · scale. A group that holds NaN or infinity is NaN; one whose scale is no normal number is zero.

    Raises:
        InputError: an In that is no multiple of 32.
    """
    if x.ndim < 1 or x.shape[-1] % GROUP:
        raise InputError(f"x must be [..., In] with In a multiple of {GROUP}, got {list(x.shape)}; use a weight without codes")
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    most = torch.full_like(largest, 127)
    scale = largest / most
    # not 127 / largest, which torch takes as 127 times a rounded reciprocal: a value near a half would get another code
    factor = torch.where(scale > _SMALLEST_SCALE, most / largest, 0)
    rounded = (groups * factor).round() * scale
    return torch.where(largest.isfinite(), rounded, torch.nan).flatten(-2)


def weight_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """x · dequantised weightᵀ, products and sums in float32 (float64 when x is).

    Args:
        x: [..., In] float. packed: from `pack_weight`.

    Returns:
        [..., Out] in x's dtype.

    Raises:
        InputError: widths that do not fit.
    """
    check_weight_matmul(x, packed)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), dequantise(packed).to(wide)).to(x.dtype)
