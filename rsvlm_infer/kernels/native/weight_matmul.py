"""weight_matmul through rsvlm_infer._C: reads the weight once, in blocks of 32 rows side by side. Owns no arithmetic.

float32 and bfloat16 activations, sums in float32. Meant for decoding: up to 8 rows read the weight once, more read it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...hardware import native_why_not
from ...ops.weight_matmul import PackedWeight, check_weight_matmul
from .tensors import DTYPES, check_floats


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A weight as the kernel reads it: its bytes, its sides, and the call that knows both."""

    memory: Tensor  # uint8
    rows: int
    columns: int
    matmul: Callable[..., None]


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def weight_matmul(x: Tensor, packed: PackedWeight) -> Tensor:
    """See `rsvlm_infer.ops.weight_matmul.weight_matmul`; the first call lays the weight out, see `lay_out_weight`.

    Raises:
        InputError: widths that do not fit, or a dtype or device not supported.
    """
    # seven calls per layer and token, each of some microseconds: what passes these tests needs no closer look
    dtype = DTYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or x.requires_grad:
        dtype = check_floats(x=x)
    weight: NativeWeight = packed.layouts.get("native") or lay_out_weight(packed)
    if x.ndim < 1 or x.shape[-1] != weight.columns:
        check_weight_matmul(x, packed)
    x = x.contiguous()
    tokens = x.numel() // weight.columns
    out = torch.empty((tokens, weight.rows), dtype=x.dtype)
    weight.matmul(x=x.data_ptr(), tokens=tokens, dtype=dtype, out=out.data_ptr())
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.rows)


def lay_out_weight(packed: PackedWeight) -> NativeWeight:
    """The weight in the kernel's own order, kept in `packed.layouts` beside the codes, so it is there twice."""
    from rsvlm_infer import _C

    rows, columns = packed.shape
    scales = packed.scales
    wide = scales is not None and scales.dtype is not torch.float16
    memory = torch.empty(
        _C.weight_layout_bytes(kind=packed.kind, rows=rows, columns=columns, wide_scales=wide), dtype=torch.uint8
    )
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
    matmul = partial(_C.weight_matmul, kind=packed.kind, rows=rows, columns=columns, wide_scales=wide, layout=memory.data_ptr())
    weight = packed.layouts["native"] = NativeWeight(memory, rows, columns, matmul)
    return weight
