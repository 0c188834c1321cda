"""Kernels of varlen_tile_attention: a schedule of query blocks, and block-diagonal attention over it."""

import triton
import triton.language as tl


@triton.jit
def schedule_kernel(
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    schedule_ptr,  # int32 [work, 4]: first query row, end of the tile's queries, first key row, number of keys
    num_tiles,
    num_work,  # upper bound on query blocks, known without reading cu_seqlens
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Query blocks of all tiles, tiles with most keys first (ties: lowest tile), so that the longest work starts first.

    A tile's first place is the number of blocks of all tiles before it in that order: each program counts them for its own
    TILES tiles in one pass over all tiles, so there is no sort, no scan between programs and no read-back.
    """
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    valid = tiles < num_tiles
    first = tl.load(cu_seqlens_ptr + tiles, mask=valid, other=0).to(tl.int32)
    stop = tl.load(cu_seqlens_ptr + tiles + 1, mask=valid, other=0).to(tl.int32)
    first_k = tl.load(cu_seqlens_k_ptr + tiles, mask=valid, other=0).to(tl.int32)
    keys = tl.load(cu_seqlens_k_ptr + tiles + 1, mask=valid, other=0).to(tl.int32) - first_k
    place = tl.zeros([TILES], dtype=tl.int32)
    total = 0
    for start in range(0, num_tiles, CHUNK):
        others = start + tl.arange(0, CHUNK)
        inside = others < num_tiles
        other_rows = tl.load(cu_seqlens_ptr + others + 1, mask=inside, other=0).to(tl.int32)
        other_rows -= tl.load(cu_seqlens_ptr + others, mask=inside, other=0).to(tl.int32)
        other_keys = tl.load(cu_seqlens_k_ptr + others + 1, mask=inside, other=0).to(tl.int32)
        other_keys -= tl.load(cu_seqlens_k_ptr + others, mask=inside, other=0).to(tl.int32)
        blocks = (other_rows + BLOCK_M - 1) // BLOCK_M
        total += tl.sum(blocks, axis=0)
        longer = other_keys[None, :] > keys[:, None]
        before = longer | ((other_keys[None, :] == keys[:, None]) & (others[None, :] < tiles[:, None]))
        place += tl.sum(tl.where(before, blocks[None, :], 0), axis=1)
    count = tl.where(valid, (stop - first + BLOCK_M - 1) // BLOCK_M, 0)
    for block in range(0, tl.max(count, axis=0)):
        own = block < count
        entry = schedule_ptr + (place + block) * 4
        tl.store(entry, first + block * BLOCK_M, mask=own)
        tl.store(entry + 1, stop, mask=own)
        tl.store(entry + 2, first_k, mask=own)
        tl.store(entry + 3, keys, mask=own)
    # places beyond the last block: an empty row range, at which the attention kernel returns
    for spare in range(total + tl.program_id(0) * CHUNK, num_work, tl.num_programs(0) * CHUNK):
        places = spare + tl.arange(0, CHUNK)
        tl.store(schedule_ptr + places * 4, 0, mask=places < num_work)
        tl.store(schedule_ptr + places * 4 + 1, 0, mask=places < num_work)


@triton.jit
def exact_scores(
    q_rows, k_rows, q_bias_ptr, own, exists, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """q·k in float32 without tensor cores. Such a product keeps both operands in registers, so a few columns are taken at a time
    and the queries come from the cache again for every block of keys: held for the whole loop, they spill at every block shape.
    """
    scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        q = tl.load(q_rows + columns[None, :], mask=own[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
        if HAS_BIAS:
            q += tl.load(q_bias_ptr + columns, mask=columns < HEAD_DIM, other=0.0)[None, :]
        k = tl.load(k_rows + columns[:, None], mask=exists[None, :] & (columns[:, None] < HEAD_DIM), other=0.0)
        scores = tl.dot(q, k, acc=scores, input_precision="ieee")
    return scores


@triton.jit
def _attend(
    q1, q2, q_rows, q_bias_ptr, own, peak, mass, acc1, acc2,
    k_ptr, v_ptr, start, num_keys,
    k_row_stride, v_row_stride, scale_log2,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One block of keys; WHOLE = all BLOCK_N keys exist, so no mask is needed."""
    keys = start + tl.arange(0, BLOCK_N)
    exists = keys < num_keys
    wide = tl.arange(0, WIDE)
    narrow = WIDE + tl.arange(0, NARROW if NARROW > 0 else 16)
    k_rows = k_ptr + keys[None, :] * k_row_stride
    v_rows = v_ptr + keys[:, None] * v_row_stride
    if EXACT:
        scores = exact_scores(q_rows, k_rows, q_bias_ptr, own, exists, BLOCK_M, BLOCK_N, HEAD_DIM, 16, HAS_BIAS)
    else:
        if WHOLE and WIDE <= HEAD_DIM:
            k1 = tl.load(k_rows + wide[:, None])
        else:
            k1 = tl.load(k_rows + wide[:, None], mask=exists[None, :] & (wide[:, None] < HEAD_DIM), other=0.0)
        scores = tl.dot(q1, k1)
        if NARROW > 0:
            k2 = tl.load(k_rows + narrow[:, None], mask=exists[None, :] & (narrow[:, None] < HEAD_DIM), other=0.0)
            scores = tl.dot(q2, k2, acc=scores)
    if not WHOLE:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
    weights = tl.math.exp2(scores * scale_log2 - higher[:, None])
    shrink = tl.math.exp2(peak - higher)
    mass = mass * shrink + tl.sum(weights, axis=1)
    if WHOLE and WIDE <= HEAD_DIM:
        v1 = tl.load(v_rows + wide[None, :])
    else:
        v1 = tl.load(v_rows + wide[None, :], mask=exists[:, None] & (wide[None, :] < HEAD_DIM), other=0.0)
    rounded = weights.to(v1.dtype)
    acc1 = tl.dot(rounded, v1, acc=acc1 * shrink[:, None], input_precision="ieee" if EXACT else None)
    if NARROW > 0:
        v2 = tl.load(v_rows + narrow[None, :], mask=exists[:, None] & (narrow[None, :] < HEAD_DIM), other=0.0)
        acc2 = tl.dot(rounded, v2, acc=acc2 * shrink[:, None], input_precision="ieee" if EXACT else None)
    return higher, mass, acc1, acc2


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_bias_ptr,  # [H, D] contiguous; unread without HAS_BIAS
    v_bias_ptr,
    schedule_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    num_heads,
    scale_log2,  # scale · log2(e), positive
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,  # the head in two parts, WIDE + NARROW >= HEAD_DIM, each a power of two; NARROW may be 0
    NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,  # float32, see exact_scores
    UNIT: tl.constexpr,  # head strides come divided by it
):
    """One query block of one head per program; heads of one block are neighbours, because their keys share cache lines."""
    work = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    first = tl.load(schedule_ptr + work * 4)
    stop = tl.load(schedule_ptr + work * 4 + 1)
    if first < stop:
        first_k = tl.load(schedule_ptr + work * 4 + 2)
        num_keys = tl.load(schedule_ptr + work * 4 + 3)
        rows = tl.arange(0, BLOCK_M)
        own = rows < stop - first
        wide = tl.arange(0, WIDE)
        narrow = WIDE + tl.arange(0, NARROW if NARROW > 0 else 16)
        # Triton learns of an integer only whether 16 divides it. A head of 72 columns would lose 16-byte loads: UNIT says 8.
        q_head_stride *= UNIT
        k_head_stride *= UNIT
        v_head_stride *= UNIT
        out_head_stride *= UNIT
        # 64 bits only for the corner: offsets inside a tile stay far below 2**31
        q_ptr += first.to(tl.int64) * q_row_stride + head * q_head_stride
        k_ptr += first_k.to(tl.int64) * k_row_stride + head * k_head_stride
        v_ptr += first_k.to(tl.int64) * v_row_stride + head * v_head_stride
        out_ptr += first.to(tl.int64) * out_row_stride + head * out_head_stride
        wide_mask = own[:, None] & (wide[None, :] < HEAD_DIM)
        narrow_mask = own[:, None] & (narrow[None, :] < HEAD_DIM)
        q_rows = q_ptr + rows[:, None] * q_row_stride
        q_bias_ptr += head * HEAD_DIM
        v_bias_ptr += head * HEAD_DIM
        acc1 = tl.zeros([BLOCK_M, WIDE], dtype=tl.float32)
        q1 = 0.0
        q2 = 0.0
        acc2 = 0.0
        if not EXACT:
            q1 = tl.load(q_rows + wide[None, :], mask=wide_mask, other=0.0)
            if HAS_BIAS:
                q1 += tl.load(q_bias_ptr + wide, mask=wide < HEAD_DIM, other=0.0)[None, :]
        if NARROW > 0:
            acc2 = tl.zeros([BLOCK_M, NARROW], dtype=tl.float32)
            if not EXACT:
                q2 = tl.load(q_rows + narrow[None, :], mask=narrow_mask, other=0.0)
                if HAS_BIAS:
                    q2 += tl.load(q_bias_ptr + narrow, mask=narrow < HEAD_DIM, other=0.0)[None, :]
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        mass = tl.zeros([BLOCK_M], dtype=tl.float32)
        whole = num_keys // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            peak, mass, acc1, acc2 = _attend(
                q1, q2, q_rows, q_bias_ptr, own, peak, mass, acc1, acc2,
                k_ptr, v_ptr, start, num_keys, k_row_stride, v_row_stride, scale_log2,
                HEAD_DIM, WIDE, NARROW, BLOCK_M, BLOCK_N, True, HAS_BIAS, EXACT,
            )  # fmt: skip
        if whole < num_keys:
            peak, mass, acc1, acc2 = _attend(
                q1, q2, q_rows, q_bias_ptr, own, peak, mass, acc1, acc2,
                k_ptr, v_ptr, whole, num_keys, k_row_stride, v_row_stride, scale_log2,
                HEAD_DIM, WIDE, NARROW, BLOCK_M, BLOCK_N, False, HAS_BIAS, EXACT,
            )  # fmt: skip
        seen = num_keys > 0  # a tile without keys gives zeros, bias or not
        share = tl.where(seen, 1.0 / tl.where(seen, mass, 1.0), 0.0)
        acc1 = acc1 * share[:, None]
        if HAS_BIAS:
            bias1 = tl.load(v_bias_ptr + wide, mask=wide < HEAD_DIM, other=0.0).to(tl.float32)
            acc1 += tl.where(seen, bias1, 0.0)[None, :]
        out_rows = out_ptr + rows[:, None] * out_row_stride
        tl.store(out_rows + wide[None, :], acc1.to(out_ptr.dtype.element_ty), mask=wide_mask)
        if NARROW > 0:
            acc2 = acc2 * share[:, None]
            if HAS_BIAS:
                bias2 = tl.load(v_bias_ptr + narrow, mask=narrow < HEAD_DIM, other=0.0).to(tl.float32)
                acc2 += tl.where(seen, bias2, 0.0)[None, :]
            tl.store(out_rows + narrow[None, :], acc2.to(out_ptr.dtype.element_ty), mask=narrow_mask)
