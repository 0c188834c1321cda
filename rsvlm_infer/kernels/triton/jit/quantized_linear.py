"""Kernels of quantized_linear: one row of x against blocks of coded weight rows, read once and decoded in registers."""

import triton
import triton.language as tl


@triton.jit
def quantized_linear_kernel(
    x_ptr,
    codes_ptr,  # int8 [O, K], or uint8 [O, K / 2] with PACKED
    scales_ptr,
    bias_ptr,  # unread without HAS_BIAS
    out_ptr,
    rows,  # O
    code_columns,  # of codes: K, or K / 2
    groups,
    group,  # code columns that share a scale
    x_row_stride,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of one row of x. Sums stay per thread until the end, one reduction for the whole row."""
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = outputs < rows
    code_rows = codes_ptr + outputs.to(tl.int64)[:, None] * code_columns
    x_ptr += row * x_row_stride
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, code_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < code_columns
        mask = exists[:, None] & inside[None, :]
        codes = tl.load(code_rows + columns[None, :], mask=mask, other=0)
        scales = tl.load(scales_ptr + outputs[:, None] * groups + (columns // group)[None, :], mask=mask, other=0.0)
        if PACKED:
            low = (codes & 15).to(tl.float32) - 8.0
            high = (codes >> 4).to(tl.float32) - 8.0
            even = tl.load(x_ptr + 2 * columns, mask=inside, other=0.0).to(tl.float32)
            odd = tl.load(x_ptr + 2 * columns + 1, mask=inside, other=0.0).to(tl.float32)
            products = low * even[None, :] + high * odd[None, :]
        else:
            products = codes.to(tl.float32) * tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc += products * scales.to(tl.float32)
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * rows + outputs, total.to(out_ptr.dtype.element_ty), mask=exists)
