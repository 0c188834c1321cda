"""rope on CUDA, alone or fused with the append to the KV cache, in one launch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...errors import InputError
from .launch import check_on_device, check_shape, next_power_of_2, triton_why_not, unit_stride


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


@cache
def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D) [D/2] float32, by the eager definition's own formula: an exponential on the device would be off by more at
    position 8192 than float16 resolves. Made once per process; call it before a CUDA graph is captured.
    """
    exponent = torch.arange(0, head_dim // 2, dtype=torch.float32) * 2 / head_dim
    return (1.0 / theta**exponent).to(device)


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """See `rsvlm_infer.ops.rope.rope`. Products are rounded once, at the end.

    Raises:
        InputError: shapes that do not fit, a dtype that is no float16, bfloat16 or float32, or tensors on another device.
    """
    heads, head_dim = _check("rope", x, positions)
    check_on_device("rope", x=x, positions=positions)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    from .jit.rope import rope_kernel

    rows = unit_stride(x.reshape(-1, heads, head_dim))
    rope_kernel[(rows.shape[0],)](
        rows,
        out,
        positions.reshape(-1),
        frequencies(head_dim, theta, x.device),
        heads,
        rows.stride(0),
        rows.stride(1),
        HEADS=next_power_of_2(heads),
        HALF=head_dim // 2,
        HALF_BLOCK=next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return out


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    theta: float,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates q and k, and writes k and v into the cache at `positions`.

    Args:
        q: [B, N, Hq, D]. k, v: [B, N, Hkv, D]. k_cache, v_cache: [B, C, Hkv, D], written in place; a position outside of 0..C-1
        writes nothing. positions: [B, N] int. theta: base of the frequencies. out: [B, N, Hq, D] contiguous, or None.

    Returns:
        q rotated [B, N, Hq, D], in `out` when it is given.

    Raises:
        InputError: as `rope`.
    """
    op = "rope_append"
    heads, head_dim = _check(op, q, positions)
    check_shape(op, "q", q, (None, None, None, None))
    batch, new = q.shape[:2]
    check_shape(op, "k", k, (batch, new, None, head_dim))
    check_shape(op, "v", v, k.shape)
    kv_heads = k.shape[2]
    check_shape(op, "k_cache", k_cache, (batch, None, kv_heads, head_dim))
    check_shape(op, "v_cache", v_cache, k_cache.shape)
    check_on_device(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, out=out)
    if any(part.dtype != q.dtype for part in (k, v, k_cache, v_cache)):
        raise InputError(f"k, v and the cache of {op} must have q's dtype {q.dtype}; convert them first")
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise InputError(f"k_cache and v_cache of {op} must have contiguous heads; allocate them as [B, C, Hkv, D]")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise InputError(f"out of {op} must be contiguous {q.dtype} {list(q.shape)}, got {out.dtype} {list(out.shape)}")
    if q.numel() == 0:
        return out
    from .jit.rope import rope_append_kernel

    q, k, v = (unit_stride(part.reshape(-1, *part.shape[2:])) for part in (q, k, v))
    rope_append_kernel[(batch * new,)](
        q,
        k,
        v,
        out,
        k_cache,
        v_cache,
        positions.reshape(-1),
        frequencies(head_dim, theta, q.device),
        new,
        k_cache.shape[1],
        heads,
        kv_heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        HEADS=next_power_of_2(heads),
        KV_HEADS=next_power_of_2(kv_heads),
        HALF=head_dim // 2,
        HALF_BLOCK=next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return out


def _check(op: str, x: Tensor, positions: Tensor) -> tuple[int, int]:
    if x.ndim < 3 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise InputError(f"x of {op} must be [..., N, H, D] with even D, got {list(x.shape)}; view it as heads first")
    check_shape(op, "positions", positions, x.shape[:-2])
    return x.shape[-2], x.shape[-1]
