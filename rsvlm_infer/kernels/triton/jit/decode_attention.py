"""Kernels of decode_attention: new tokens against a range of the cache, and the joining of ranges."""

import triton
import triton.language as tl

from .varlen_tile_attention import exact_scores


@triton.jit
def cache_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, N, Hq, D] contiguous; with SPLIT_LENGTH float32 [splits, B, N, Hq, D]
    peaks_ptr,  # float32 [splits, B, N, Hq], unwritten without SPLIT_LENGTH; peaks are in powers of two
    masses_ptr,
    positions_ptr,  # [B, N] contiguous
    mask_ptr,  # uint8 [B, N, C], unread without MASKED
    batch_size,
    new,  # N
    capacity,  # C
    kv_heads,
    group,  # query heads per key head
    scale_log2,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    mask_batch_stride,
    mask_row_stride,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_LENGTH: tl.constexpr,  # entries of the cache per program, 0 = all of them and no joining
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BLOCK_M pairs (new token, query head) that share a key head."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    pairs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = pairs < new * group
    token = pairs // group
    head = kv_head * group + pairs % group
    columns = tl.arange(0, COLUMNS)
    if MASKED:
        limit = tl.where(own, capacity, 0)
    else:
        position = tl.load(positions_ptr + batch * new + token, mask=own, other=-1).to(tl.int32)
        limit = tl.minimum(position + 1, capacity)
    first = 0
    last = tl.max(limit, axis=0)
    if SPLIT_LENGTH > 0:
        first = tl.program_id(2) * SPLIT_LENGTH
        last = tl.minimum(last, first + SPLIT_LENGTH)
    q_rows = q_ptr + batch * q_batch_stride + token[:, None] * q_row_stride + head[:, None] * q_head_stride
    if not EXACT:
        q = tl.load(q_rows + columns[None, :], mask=own[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        exists = entries < last
        k_rows = k_ptr + entries[None, :] * k_row_stride
        if EXACT:
            scores = exact_scores(q_rows, k_rows, q_ptr, own, exists, BLOCK_M, BLOCK_N, HEAD_DIM, 16, False)
        else:
            k = tl.load(k_rows + columns[:, None], mask=exists[None, :] & (columns[:, None] < HEAD_DIM), other=0.0)
            scores = tl.dot(q, k)
        seen = entries[None, :] < tl.minimum(limit, last)[:, None]
        if MASKED:
            allowed = mask_ptr + batch * mask_batch_stride + token[:, None] * mask_row_stride + entries[None, :]
            seen = seen & (tl.load(allowed, mask=own[:, None] & exists[None, :], other=0) != 0)
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        # a row that has seen nothing yet has peak -inf, and -inf minus -inf is no number
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.math.exp2(scores - safe[:, None])
        shrink = tl.math.exp2(peak - safe)
        mass = mass * shrink + tl.sum(weights, axis=1)
        v_rows = v_ptr + entries[:, None] * v_row_stride
        v = tl.load(v_rows + columns[None, :], mask=exists[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc=acc * shrink[:, None], input_precision="ieee" if EXACT else None)
        peak = higher
    places = (batch * new + token) * (kv_heads * group) + head
    stored = own[:, None] & (columns[None, :] < HEAD_DIM)
    if SPLIT_LENGTH > 0:
        places += tl.program_id(2).to(tl.int64) * batch_size * new * (kv_heads * group)
        tl.store(peaks_ptr + places, peak, mask=own)
        tl.store(masses_ptr + places, mass, mask=own)
        # a range without entries is never read
        stored = stored & (last > first)
    else:
        acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    out = out_ptr + places[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def join_kernel(
    parts_ptr, peaks_ptr, masses_ptr, out_ptr, splits, rows, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One pair (token, head) per program: its ranges in order, each brought to the highest peak."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    # peak and mass once per column, all equal: the interpreter cannot combine a loaded number with a block of conditions
    peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([COLUMNS], dtype=tl.float32)
    acc = tl.zeros([COLUMNS], dtype=tl.float32)
    for split in range(splits):
        place = split * rows + row
        same = place + tl.zeros([COLUMNS], dtype=tl.int32)
        part_peak = tl.load(peaks_ptr + same)
        used = (part_peak > float("-inf")) & (columns < HEAD_DIM)
        higher = tl.maximum(peak, part_peak)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.math.exp2(peak - safe)
        share = tl.math.exp2(part_peak - safe)
        part = tl.load(parts_ptr + place * HEAD_DIM + columns, mask=used, other=0.0)
        acc = acc * shrink + part * share
        mass = mass * shrink + tl.load(masses_ptr + same) * share
        peak = higher
    acc = acc / tl.where(mass > 0, mass, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)
