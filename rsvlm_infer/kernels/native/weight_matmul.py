"""weight_matmul through rsvlm_infer._C: reads the weight once, in blocks of 32 rows side by side. Owns no arithmetic.

float32 and bfloat16 activations, sums in float32. Meant for decoding: up to 8 rows read the weight once, more read it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from ...ops.weight_matmul import PackedWeight, check_codes, check_weight_matmul
from .tensors import check_floats

_ALIGNMENT = 64  # bytes of a cache line, and of the widest vector
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight as the kernel reads it: its bytes, its sides, and for each dtype of x the call (x, tokens, out) with addresses."""

    memory: Tensor  # uint8
    rows: int
    columns: int
    matmul: dict[torch.dtype, Callable[[int, int, int], None]]


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def weight_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """See `rsvlm_infer.ops.weight_matmul.weight_matmul`; the first call lays the weight out, see `lay_out_weights`.

    Raises:
        InputError: widths that do not fit, or a dtype or device not supported.
    """
    # some calls per layer and token, each of some microseconds: what passes these tests needs no closer look
    weight: NativeWeight = packed.layouts.get("native") or lay_out_weight(packed)
    matmul = weight.matmul.get(x.dtype)
    if matmul is None or not x.is_cpu or x.requires_grad:
        check_floats(x=x)
        matmul = weight.matmul[x.dtype]
    shape = x.shape
    if not shape or shape[-1] != weight.columns:
        check_weight_matmul(x, packed)
    x = x.contiguous()
    out = x.new_empty(*shape[:-1], weight.rows)  # [..., Out]; a tuple of sizes would cost 0.3 microseconds more
    matmul(x.data_ptr(), x.numel() // weight.columns, out.data_ptr())
    return out


def lay_out_weight(packed: PackedWeight) -> NativeWeight:
    """`lay_out_weights` of one weight."""
    return lay_out_weights([packed])[0]


def lay_out_weights(weights: Sequence[PackedWeight]) -> list[NativeWeight]:
    """Weights in the kernel's own order, kept in `PackedWeight.layouts` beside the codes; `without_codes` then frees those.

    One call with all weights of a model, in the order of their use, puts them one after another into one block on huge pages
    where the system gives them: a token's 60 MB are then read some 15 % sooner. The block lives as long as any of them.

    Raises:
        InputError: codes that were given up or are on another device.
    """
    from rsvlm_infer import _C

    sizes = []
    for packed in weights:
        check_codes(packed)
        if not packed.codes.is_cpu:
            raise InputError(f"packed must be on the CPU for the native implementation, got {packed.codes.device}; move it")
        size = _C.weight_layout_bytes(
            kind=packed.kind, rows=packed.shape[0], columns=packed.shape[1], wide_scales=_wide(packed)
        )
        sizes.append(size + -size % _ALIGNMENT)
    boundary = _HUGE_PAGE if sum(sizes) >= _HUGE_PAGE else _ALIGNMENT
    block = torch.empty(sum(sizes) + boundary, dtype=torch.uint8)
    start = -block.data_ptr() % boundary
    block = block[start : start + sum(sizes)]
    _C.ask_for_huge_pages(address=block.data_ptr(), length_bytes=block.numel())
    return [_lay_out(packed, memory) for packed, memory in zip(weights, block.split_with_sizes(sizes), strict=True)]


def _wide(packed: PackedWeight) -> bool:
    return packed.scales is not None and packed.scales.dtype is not torch.float16


def _lay_out(packed: PackedWeight, memory: Tensor) -> NativeWeight:
    from rsvlm_infer import _C

    (rows, columns), wide, scales = packed.shape, _wide(packed), packed.scales
    codes = packed.codes.contiguous()
    if scales is not None:
        scales = (scales.float() if wide else scales).contiguous()
    _C.lay_out_weight(
        kind=packed.kind,
        rows=rows,
        columns=columns,
        wide_scales=wide,
        codes=codes.data_ptr(),
        scales=0 if scales is None else scales.data_ptr(),
        layout=memory.data_ptr(),
    )
    call = _C.WeightMatmul(kind=packed.kind, rows=rows, columns=columns, wide_scales=wide, layout=memory.data_ptr())
    matmul: dict[torch.dtype, Callable[[int, int, int], None]] = {torch.float32: call.float32, torch.bfloat16: call.bfloat16}
    weight = packed.layouts["native"] = NativeWeight(memory, rows, columns, matmul)
    return weight
