"""Kernel of weight_matmul: one row of x against blocks of packed weight rows, each read once and decoded in registers."""

import triton
import triton.language as tl


@triton.jit
def weight_matmul_kernel(
    x_ptr,
    codes_ptr,  # [Out, In], or [Out, In / 2] with HALVES
    scales_ptr,  # [Out, In / group], unread without SCALED
    out_ptr,
    rows,  # Out
    code_columns,  # of codes: In, or In / 2
    x_row_stride,
    GROUP: tl.constexpr,  # code columns that share a scale
    HALVES: tl.constexpr,  # a byte holds two columns, the even one in its low half, both plus 8
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of one row of x. Sums stay per thread until the end: one reduction for the whole row."""
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = outputs < rows
    code_rows = codes_ptr + outputs.to(tl.int64)[:, None] * code_columns
    scale_rows = scales_ptr + outputs[:, None] * (code_columns // GROUP)
    x_ptr += row * x_row_stride
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, code_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < code_columns
        mask = exists[:, None] & inside[None, :]
        codes = tl.load(code_rows + columns[None, :], mask=mask, other=0)
        if HALVES:
            low = (codes & 15).to(tl.float32) - 8.0
            high = (codes >> 4).to(tl.float32) - 8.0
            even = tl.load(x_ptr + 2 * columns, mask=inside, other=0.0).to(tl.float32)
            odd = tl.load(x_ptr + 2 * columns + 1, mask=inside, other=0.0).to(tl.float32)
            products = low * even[None, :] + high * odd[None, :]
        else:
            products = codes.to(tl.float32) * tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            products *= tl.load(scale_rows + (columns // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += products
    out = out_ptr + row * rows + outputs
    tl.store(out, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=exists)
