"""Kernel of rms_norm, with the addition before it when there is one."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,  # unread without ADD
    weight_ptr,
    out_ptr,
    sum_ptr,  # x + residual, unwritten without ADD
    width,
    x_row_stride,
    residual_row_stride,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program; out and sum are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < width
    x = tl.load(x_ptr + row * x_row_stride + columns, mask=exists, other=0.0)
    if ADD:
        x += tl.load(residual_ptr + row * residual_row_stride + columns, mask=exists, other=0.0)
        tl.store(sum_ptr + row * width + columns, x, mask=exists)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    # rounded before the product with the weight, as Llama does
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=exists)
