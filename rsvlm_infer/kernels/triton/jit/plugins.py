"""Our kernels in the order of arguments that TensorRT launches a plugin with: inputs, integers, outputs. Everything else is a constant.

TensorRT gives contiguous tensors, so strides are products of widths; the arithmetic is that of the kernels that are called.
"""

import triton
import triton.language as tl

from .grouped_experts import combine_kernel, down_kernel, up_kernel
from .varlen_tile_attention import attention_kernel, schedule_kernel


@triton.jit
def tile_schedule(
    q_ptr,  # unread: its rows decide the length of the schedule
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    num_tiles,
    num_work,
    schedule_ptr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """See `schedule_kernel`."""
    schedule_kernel(cu_seqlens_ptr, cu_seqlens_k_ptr, schedule_ptr, num_tiles, num_work, BLOCK_M, TILES, CHUNK)


@triton.jit
def tile_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    schedule_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    """See `attention_kernel`; q, k, v and out are [S, H, D]."""
    row = tl.full([], HEADS * HEAD_DIM, dtype=tl.int32)  # the kernel assigns to its strides, which a constant cannot take
    head = tl.full([], HEAD_DIM, dtype=tl.int32)
    attention_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, q_ptr, v_ptr, schedule_ptr,
        row, head, row, head, row, head, row, head,
        HEADS, SCALE_LOG2, HEAD_DIM, WIDE, NARROW, BLOCK_M, BLOCK_N, False, EXACT, 1,
    )  # fmt: skip


@triton.jit
def experts_up(
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    expert_offsets_ptr,
    permutation_ptr,
    row_blocks,
    hidden_ptr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See `up_kernel`, with gates and a permutation."""
    up_kernel(
        x_ptr, hidden_ptr, w_gate_ptr, w_up_ptr, w_up_ptr, expert_offsets_ptr, permutation_ptr,
        NUM_EXPERTS, SLOTS, WIDTH, HIDDEN, row_blocks, WIDTH,
        EXPERTS, True, True, False, EVEN, EXACT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def experts_down(
    hidden_ptr,
    w_down_ptr,
    expert_offsets_ptr,
    permutation_ptr,
    row_blocks,
    parts_ptr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """See `down_kernel`: a row per slot, not weighted."""
    down_kernel(
        hidden_ptr, parts_ptr, w_down_ptr, w_down_ptr, expert_offsets_ptr, permutation_ptr, w_down_ptr,
        NUM_EXPERTS, SLOTS, WIDTH, HIDDEN, row_blocks, HIDDEN,
        EXPERTS, True, False, False, False, EVEN, EXACT, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def experts_combine(parts_ptr, weights_ptr, out_ptr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """See `combine_kernel`."""
    combine_kernel(parts_ptr, weights_ptr, out_ptr, WIDTH, SLOTS, BLOCK)
