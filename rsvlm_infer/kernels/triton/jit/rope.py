"""Kernels of rope: a rotation, and a rotation that also appends keys and values to the cache."""

import triton
import triton.language as tl


@triton.jit
def _rotate(
    x_ptr, x_head_stride, out_ptr, out_head_stride, cos, sin, exists, heads,
    HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token, `exists` says whether anything is written."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF) & exists
    first = tl.load(x_ptr + head * x_head_stride + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + head * x_head_stride + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + head * out_head_stride + pair
    tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    x_ptr,
    out_ptr,  # [tokens, H, D] contiguous
    positions_ptr,
    frequencies_ptr,
    heads,
    x_row_stride,
    x_head_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    frequency = tl.load(frequencies_ptr + pair, mask=pair < HALF, other=0.0)
    angle = tl.load(positions_ptr + token).to(tl.float32) * frequency
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    _rotate(
        x_ptr + token * x_row_stride, x_head_stride, out_ptr + token * heads * 2 * HALF, 2 * HALF, cos, sin, True, heads,
        HEADS, HALF, HALF_BLOCK,
    )  # fmt: skip


@triton.jit
def rope_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [tokens, Hq, D] contiguous
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    frequencies_ptr,
    new,  # tokens per row of the batch
    capacity,
    heads,
    kv_heads,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    k_cache_batch_stride,
    k_cache_row_stride,
    k_cache_head_stride,
    v_cache_batch_stride,
    v_cache_row_stride,
    v_cache_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One token per program: rotated queries, and rotated keys and plain values at their place in the cache."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    frequency = tl.load(frequencies_ptr + pair, mask=pair < HALF, other=0.0)
    position = tl.load(positions_ptr + token)
    angle = position.to(tl.float32) * frequency
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    _rotate(
        q_ptr + token * q_row_stride, q_head_stride, out_ptr + token * heads * 2 * HALF, 2 * HALF, cos, sin, True, heads,
        HEADS, HALF, HALF_BLOCK,
    )  # fmt: skip
    # the host cannot look at positions without a sync; a place outside of the cache is not written
    inside = (position >= 0) & (position < capacity)
    place = tl.where(inside, position, 0).to(tl.int64)
    batch = token // new
    k_place = k_cache_ptr + batch * k_cache_batch_stride + place * k_cache_row_stride
    _rotate(
        k_ptr + token * k_row_stride, k_head_stride, k_place, k_cache_head_stride, cos, sin, inside, kv_heads,
        KV_HEADS, HALF, HALF_BLOCK,
    )  # fmt: skip
    v_place = v_cache_ptr + batch * v_cache_batch_stride + place * v_cache_row_stride
    head = tl.arange(0, KV_HEADS)[:, None]
    for side in tl.static_range(2):
        column = side * HALF + pair[None, :]
        mask = (head < kv_heads) & (pair < HALF)[None, :] & inside
        value = tl.load(v_ptr + token * v_row_stride + head * v_head_stride + column, mask=mask, other=0.0)
        tl.store(v_place + head * v_cache_head_stride + column, value, mask=mask)
