"""Kernels of grouped_experts: two grouped matrix products over rows sorted by expert, and the weighted sum of a token's slots."""

import triton
import triton.language as tl


@triton.jit
def _find_block(
    expert_offsets_ptr, num_experts, row_blocks, column_blocks,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """This program's (expert, first row, end of the expert's rows, column block); expert >= num_experts means no work.

    Programs go through TOGETHER row blocks before the next column block: neighbours then share both weights and rows in the cache.
    """
    program = tl.program_id(0)
    band = program // (TOGETHER * column_blocks)
    height = min(row_blocks - band * TOGETHER, TOGETHER)
    inside = program % (TOGETHER * column_blocks)
    block = band * TOGETHER + inside % height
    column_block = inside // height
    experts = tl.arange(0, EXPERTS)
    known = experts < num_experts
    starts = tl.load(expert_offsets_ptr + experts, mask=known, other=0)
    stops = tl.load(expert_offsets_ptr + experts + 1, mask=known, other=0)
    blocks = (stops - starts + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(blocks, axis=0)
    expert = tl.sum((upto <= block).to(tl.int32), axis=0)
    own = experts == expert
    first = tl.sum(tl.where(own, starts + (block - upto + blocks) * BLOCK_M, 0), axis=0)
    stop = tl.sum(tl.where(own, stops, 0), axis=0)
    return expert, first, stop, column_block


@triton.jit
def up_kernel(
    x_ptr,
    hidden_ptr,  # [N · k, F] in the order of the permutation, contiguous
    w_gate_ptr,  # unread without GATED
    w_up_ptr,
    b_up_ptr,  # unread without HAS_BIAS
    expert_offsets_ptr,
    permutation_ptr,  # unread without PERMUTED: rows are sorted already
    num_experts,
    slots,  # k
    width,  # D
    hidden,  # F
    row_blocks,
    x_row_stride,
    EXPERTS: tl.constexpr,
    PERMUTED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides the width
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(x · gateᵀ) · (x · upᵀ), or gelu(x · upᵀ + b), of one block of one expert's rows."""
    column_blocks = tl.cdiv(hidden, BLOCK_N)
    expert, first, stop, column_block = _find_block(
        expert_offsets_ptr, num_experts, row_blocks, column_blocks, EXPERTS, BLOCK_M, 8
    )
    if expert < num_experts:
        places = first + tl.arange(0, BLOCK_M)
        own = places < stop
        rows = places
        if PERMUTED:
            rows = tl.load(permutation_ptr + places, mask=own, other=0) // slots
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = columns < hidden
        inner = tl.arange(0, BLOCK_K)
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride
        corner = expert.to(tl.int64) * hidden * width
        weight_rows = columns[None, :] * width
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + inner
            if EVEN:
                x = tl.load(x_rows + k[None, :], mask=own[:, None], other=0.0)
                w_up = tl.load(w_up_ptr + corner + weight_rows + k[:, None], mask=exists[None, :], other=0.0)
            else:
                x = tl.load(x_rows + k[None, :], mask=own[:, None] & (k < width)[None, :], other=0.0)
                w_up = tl.load(
                    w_up_ptr + corner + weight_rows + k[:, None], mask=exists[None, :] & (k < width)[:, None], other=0.0
                )
            up = tl.dot(x, w_up, acc=up, input_precision="ieee" if EXACT else None)
            if GATED:
                if EVEN:
                    w_gate = tl.load(w_gate_ptr + corner + weight_rows + k[:, None], mask=exists[None, :], other=0.0)
                else:
                    w_gate = tl.load(
                        w_gate_ptr + corner + weight_rows + k[:, None], mask=exists[None, :] & (k < width)[:, None], other=0.0
                    )
                gate = tl.dot(x, w_gate, acc=gate, input_precision="ieee" if EXACT else None)
        if HAS_BIAS:
            up += tl.load(b_up_ptr + expert * hidden + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
        if GATED:
            result = gate / (1.0 + tl.exp(-gate)) * up
        else:
            result = 0.5 * up * (1.0 + tl.erf(up * 0.7071067811865476))
        out = hidden_ptr + places.to(tl.int64)[:, None] * hidden + columns[None, :]
        tl.store(out, result.to(hidden_ptr.dtype.element_ty), mask=own[:, None] & exists[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    out_ptr,  # a row per slot [N · k, D], or per token when WEIGHTED or not PERMUTED
    w_down_ptr,
    b_down_ptr,
    expert_offsets_ptr,
    permutation_ptr,
    weights_ptr,
    num_experts,
    slots,
    width,  # D, of the result
    hidden,  # F, of the sum
    row_blocks,
    hidden_row_stride,
    EXPERTS: tl.constexpr,
    PERMUTED: tl.constexpr,
    GATHER: tl.constexpr,  # rows of hidden are tokens, not places (affine experts)
    WEIGHTED: tl.constexpr,  # one slot per token: the weight is applied here, and no sum follows
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden · downᵀ + b of one block of one expert's rows, put where the slot belongs."""
    column_blocks = tl.cdiv(width, BLOCK_N)
    expert, first, stop, column_block = _find_block(
        expert_offsets_ptr, num_experts, row_blocks, column_blocks, EXPERTS, BLOCK_M, 8
    )
    if expert < num_experts:
        places = first + tl.arange(0, BLOCK_M)
        own = places < stop
        targets = places
        if PERMUTED:
            targets = tl.load(permutation_ptr + places, mask=own, other=0)
        rows = targets // slots if GATHER else places
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = columns < width
        inner = tl.arange(0, BLOCK_K)
        hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_row_stride
        corner = expert.to(tl.int64) * hidden * width
        weight_rows = columns[None, :] * hidden
        result = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, hidden, BLOCK_K):
            k = start + inner
            if EVEN:
                h = tl.load(hidden_rows + k[None, :], mask=own[:, None], other=0.0)
                w = tl.load(w_down_ptr + corner + weight_rows + k[:, None], mask=exists[None, :], other=0.0)
            else:
                h = tl.load(hidden_rows + k[None, :], mask=own[:, None] & (k < hidden)[None, :], other=0.0)
                w = tl.load(
                    w_down_ptr + corner + weight_rows + k[:, None], mask=exists[None, :] & (k < hidden)[:, None], other=0.0
                )
            result = tl.dot(h, w, acc=result, input_precision="ieee" if EXACT else None)
        if HAS_BIAS:
            result += tl.load(b_down_ptr + expert * width + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
        if WEIGHTED:
            result *= tl.load(weights_ptr + targets, mask=own, other=0.0)[:, None]
        out = out_ptr + targets.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=own[:, None] & exists[None, :])


@triton.jit
def combine_kernel(slots_ptr, weights_ptr, out_ptr, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = Σ_s weights[n, s] · slots[n, s], in float32 and in slot order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in range(K):
        value = tl.load(slots_ptr + (token * K + slot) * width + columns, mask=exists, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + token * K + slot) * value
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=exists)
