"""Matrices to integer codes: error-compensated int4, plain int8 in blocks, int8 by rows. Knows arrays, no model and no graph.

The compensation is GPTQ's (Frantar et al. 2022, arXiv 2210.17323), written from the paper: what rounding one input's column does to the
outputs is undone, as far as possible, by the columns that are not rounded yet. Inputs that go together let it undo more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .onnx.parts import BlockCodes, RowCodes

F32 = npt.NDArray[np.float32]
BLOCK = 32  # inputs that share a scale
DAMPING = 0.01  # of the mean of the Hessian's diagonal: inputs that calibration never saw must not make it singular
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's range: clipping a rare extreme makes all other steps finer
# 4: onnxruntime rounds inputs to int8 per block and multiplies integers; at one row it is three times as fast as float32, and
# on Gaussian data its error is 0.1 % of that of the int4 weights
ACCURACY_LEVEL = 4


def round_blocks(weight: F32, bits: int, hessian: npt.NDArray[np.float64] | None = None) -> BlockCodes:
    """weight [out, in] -> codes of `bits` (4 or 8) with a scale and a zero for each `BLOCK` inputs.

    hessian: X·Xᵀ [in, in] of calibration inputs; None rounds each weight to its nearest code.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // BLOCK)
    work = np.zeros((outputs, blocks * BLOCK), np.float32)
    work[:, :inputs] = weight
    upper = None if hessian is None else _inverse_factor(hessian, blocks * BLOCK)
    codes = np.zeros((outputs, blocks * BLOCK), np.uint8)
    scales, zeros = np.zeros((outputs, blocks), np.float32), np.zeros((outputs, blocks), np.uint8)
    for block in range(blocks):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        part = work[:, span]
        scales[:, block], zeros[:, block] = _best_range(part, bits)
        scale, zero = scales[:, block], zeros[:, block].astype(np.float32)
        if upper is None:
            codes[:, span] = _encode(part, scale[:, None], zero[:, None], bits)
            continue
        errors = np.zeros_like(part)
        own = upper[span, span]
        for column in range(BLOCK):
            code = _encode(part[:, column], scale, zero, bits)
            codes[:, span.start + column] = code
            errors[:, column] = (part[:, column] - (code - zero) * scale) / own[column, column]
            part[:, column + 1 :] -= errors[:, column, None] * own[column, column + 1 :]
        work[:, span.stop :] -= errors @ upper[span, span.stop :]
    return BlockCodes(
        bits, BLOCK, _packed(codes.reshape(outputs, blocks, BLOCK), bits), scales, _packed(zeros, bits), ACCURACY_LEVEL
    )


def block_values(codes: BlockCodes, inputs: int) -> F32:
    """The weight [out, in] that codes stand for."""
    values = _unpacked(codes.codes, codes.bits).astype(np.float32)
    blocks = values.shape[1]
    assert codes.zeros is not None  # all codes of this module have them
    zeros = _unpacked(codes.zeros, codes.bits)[:, :blocks].astype(np.float32)
    return ((values - zeros[..., None]) * codes.scales[..., None]).reshape(len(values), -1)[:, :inputs]


def round_rows(weight: F32) -> RowCodes:
    """weight [out, in] -> int8 with one scale per output, symmetric; each output's largest weight becomes 127."""
    scales = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / 127
    codes = np.rint(weight / scales[:, None]).astype(np.int8)
    return RowCodes(np.ascontiguousarray(codes.T), scales.astype(np.float32))


def row_product(x: F32, codes: RowCodes) -> F32:
    """x [n, in] -> [n, out] as the graph computes it: x rounded to uint8 over its whole range, which holds 0."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    product: F32 = (rounded.astype(np.float32) @ codes.codes.astype(np.float32)) * np.float32(step) * codes.scales
    return product


def rounded_inputs(x: F32) -> F32:
    """x [n, in] as MatMulNBits rounds it at `ACCURACY_LEVEL`: to int8 in blocks, symmetric."""
    rows, inputs = x.shape
    blocks = np.zeros((rows, -(-inputs // BLOCK) * BLOCK), np.float32)
    blocks[:, :inputs] = x
    blocks = blocks.reshape(rows, -1, BLOCK)
    step = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), np.finfo(np.float32).tiny) / 127
    values: F32 = (np.rint(blocks / step) * step).reshape(rows, -1)[:, :inputs].astype(np.float32)
    return values


def relative_error(value: F32, reference: F32) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(value - reference) / max(float(np.linalg.norm(reference)), 1e-30))


def _inverse_factor(hessian: npt.NDArray[np.float64], size: int) -> F32:
    """U [size, size], upper triangular, with Uᵀ·U the inverse of the damped Hessian; padding is the identity."""
    full = np.eye(size)
    count = len(hessian)
    mean = float(np.diag(hessian).mean()) or 1.0
    full[:count, :count] = hessian / mean + DAMPING * np.eye(count)
    inverse = np.linalg.inv(full)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _encode(values: F32, scale: F32, zero: F32, bits: int) -> npt.NDArray[np.uint8]:
    codes: npt.NDArray[np.uint8] = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1).astype(np.uint8)
    return codes


def _best_range(part: F32, bits: int) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Scale and zero [out] of a block [out, BLOCK]: the shrunken range whose codes err least; a range always holds 0."""
    top = 2**bits - 1
    low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    best = np.full(len(part), np.inf)
    scales, zeros = np.ones(len(part), np.float32), np.zeros(len(part), np.uint8)
    for shrink in SHRINKS if bits < 8 else SHRINKS[:1]:
        scale = np.maximum((high - low) * np.float32(shrink) / top, np.float32(1e-12))
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, top)
        value = (_encode(part, scale[:, None], zero[:, None], bits) - zero[:, None]) * scale[:, None]
        error = np.square(value - part).sum(axis=1)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better].astype(np.uint8)
    return scales, zeros


def _packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Along the last axis, two int4 codes to a byte, the first in the low half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), dtype=np.uint8)


def _unpacked(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
