"""rope through rsvlm_infer._C: the rotation in one pass. Owns no arithmetic but the angles, which torch makes as in eager.

In bfloat16 cosines and sines stay float32, so the result is rounded once and not three times.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import native_why_not
from .tensors import check_floats


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `rsvlm_infer.ops.rope.rope`.

    Raises:
        InputError: shapes that do not fit, or a dtype or device not supported.
    """
    from rsvlm_infer import _C

    dtype = check_floats(x=x)
    if x.ndim < 3 or x.shape[-1] % 2 or tuple(positions.shape) != tuple(x.shape[:-2]):
        raise InputError(
            f"x must be [..., N, H, D] with even D and positions [..., N], got {list(x.shape)} and {list(positions.shape)}; "
            "give each token one position"
        )
    heads, head_dim = x.shape[-2:]
    x = x.contiguous()
    angles = positions.reshape(-1, 1).float() * _frequencies(head_dim, float(theta))  # [N', D/2]
    cosines, sines = angles.cos(), angles.sin()
    out = torch.empty_like(x)
    if x.numel():
        _C.rope(
            x=x.data_ptr(),
            token_stride=heads * head_dim,
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            tokens=angles.shape[0],
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            out=out.data_ptr(),
        )
    return out


@lru_cache(maxsize=16)  # a model has one pair; the expression is eager's, so that angles agree bit for bit
def _frequencies(head_dim: int, theta: float) -> Tensor:
    exponent = torch.arange(0, head_dim // 2, dtype=torch.float32) * 2 / head_dim
    return torch.as_tensor(1.0 / theta**exponent)
