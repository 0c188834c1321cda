"""Matrices to integer codes: error-compensated int4, plain int8 in blocks, int8 by rows. Knows arrays, no model and no graph.

The compensation is GPTQ's (Frantar et al. 2022, arXiv 2210.17323), written from the paper: what rounding one input's column does to the
outputs is undone, as far as possible, by the columns that are not rounded yet. Inputs that go together let it undo more. The columns
of the largest inputs go first, while most of the others can still make good for them; scales are chosen before, so that a block's
columns need not follow each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .onnx.parts import BlockCodes, RowCodes

F32 = npt.NDArray[np.float32]
BLOCK = 32  # inputs that share a scale
DAMPING = 0.01  # of the mean of the Hessian's diagonal: inputs that calibration never saw must not make it singular
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's range: clipping a rare extreme makes all other steps finer
TOGETHER = 64  # columns whose effect on all later ones is one matrix product
MIDDLE = 8  # the zero of symmetric 4-bit codes
SMALLEST_HALF = np.float32(2**-24)
# 4: onnxruntime rounds inputs to int8 per block and multiplies integers; at one row it is three times as fast as float32, and
# on Gaussian data its error is 0.1 % of that of the int4 weights
ACCURACY_LEVEL = 4


def round_blocks(
    weight: F32, bits: int, hessian: npt.NDArray[np.float64] | None = None, *, symmetric: bool = False
) -> BlockCodes:
    """weight [out, in] -> codes of `bits` (4 or 8) with a scale and a zero for each `BLOCK` inputs.

    Args:
        hessian: X·Xᵀ [in, in] of calibration inputs; None rounds each weight to its nearest code.
        symmetric: 4 bits without zeros: w = (code - 8) · scale, and the scale is a float16 of either sign, which gives the larger
            side the 16th level.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // BLOCK)
    work = np.zeros((outputs, blocks * BLOCK), np.float32)
    work[:, :inputs] = weight
    importance = np.ones(blocks * BLOCK, np.float32)
    if hessian is not None:
        importance[:inputs] = np.diag(hessian) / (float(np.diag(hessian).mean()) or 1.0) + DAMPING
    scales, zeros = np.zeros((outputs, blocks), np.float32), np.full((outputs, blocks), MIDDLE, np.uint8)
    for block in range(blocks):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        if symmetric:
            scales[:, block] = _best_scale(work[:, span], importance[span])
        else:
            scales[:, block], zeros[:, block] = _best_range(work[:, span], bits, importance[span])
    if hessian is None:
        wide = (outputs, blocks, BLOCK)
        codes = _encode(work.reshape(wide), scales[..., None], zeros[..., None].astype(np.float32), bits).reshape(work.shape)
    else:
        codes = _compensated(work, scales, zeros.astype(np.float32), bits, hessian)
    packed_zeros = None if symmetric else _packed(zeros, bits)
    return BlockCodes(bits, BLOCK, _packed(codes.reshape(outputs, blocks, BLOCK), bits), scales, packed_zeros, ACCURACY_LEVEL)


def _compensated(work: F32, scales: F32, zeros: F32, bits: int, hessian: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Codes [out, in] of work [out, in], whose blocks have scales and zeros [out, blocks]."""
    outputs, inputs = work.shape
    diagonal = np.zeros(inputs)
    diagonal[: len(hessian)] = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable")  # padding, which is never fed, goes last
    upper = _inverse_factor(hessian, order)
    left = np.ascontiguousarray(work.T[order])  # [in, out]: a column of the weight is one line of memory
    scale_of, zero_of = np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
    codes = np.zeros((inputs, outputs), np.uint8)
    for start in range(0, inputs, TOGETHER):
        stop = min(start + TOGETHER, inputs)
        own, errors = upper[start:stop, start:stop], np.zeros((stop - start, outputs), np.float32)
        part = left[start:stop]
        for place in range(stop - start):
            block = order[start + place] // BLOCK
            scale, zero = scale_of[block], zero_of[block]
            code = _encode(part[place], scale, zero, bits)
            codes[order[start + place]] = code
            errors[place] = (part[place] - (code - zero) * scale) / own[place, place]
            part[place + 1 :] -= own[place, place + 1 :, None] * errors[place]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)


def block_values(codes: BlockCodes, inputs: int) -> F32:
    """The weight [out, in] that codes stand for."""
    values = _unpacked(codes.codes, codes.bits).astype(np.float32)
    blocks = values.shape[1]
    zeros = (
        np.float32(MIDDLE) if codes.zeros is None else _unpacked(codes.zeros, codes.bits)[:, :blocks, None].astype(np.float32)
    )
    return ((values - zeros) * codes.scales[..., None]).reshape(len(values), -1)[:, :inputs]


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


def _inverse_factor(hessian: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> F32:
    """U, upper triangular, with Uᵀ·U the inverse of the damped Hessian in this order; padding is the identity."""
    full = np.eye(len(order))
    count = len(hessian)
    mean = float(np.diag(hessian).mean()) or 1.0
    full[:count, :count] = hessian / mean + DAMPING * np.eye(count)
    inverse = np.linalg.inv(full[np.ix_(order, order)])
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _encode(values: F32, scale: F32, zero: F32 | np.float32, bits: int) -> npt.NDArray[np.uint8]:
    codes: npt.NDArray[np.uint8] = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1).astype(np.uint8)
    return codes


def _best_range(part: F32, bits: int, importance: F32) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Scale and zero [out] of a block [out, BLOCK]: the shrunken range whose codes err least; a range always holds 0."""
    top = 2**bits - 1
    low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    best = np.full(len(part), np.inf)
    scales, zeros = np.ones(len(part), np.float32), np.zeros(len(part), np.uint8)
    for shrink in SHRINKS if bits < 8 else SHRINKS[:1]:
        scale = np.maximum((high - low) * np.float32(shrink) / top, np.float32(1e-12))
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, top)
        value = (_encode(part, scale[:, None], zero[:, None], bits) - zero[:, None]) * scale[:, None]
        error = np.square(value - part) @ importance
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better].astype(np.uint8)
    return scales, zeros


def _best_scale(part: F32, importance: F32) -> F32:
    """Signed float16 scale [out] of a block [out, BLOCK] whose symmetric 4-bit codes err least, out of a few.

    Some cut the largest weight, and some are negative, which gives its sign the code -8: 16 levels then, and not 15.
    """
    largest = np.take_along_axis(part, np.abs(part).argmax(axis=1)[:, None], axis=1)[:, 0]  # with its sign
    best, scales = np.full(len(part), np.inf), np.ones(len(part), np.float32)
    for shrink in SHRINKS:
        for levels in (np.copysign(7, largest), np.full_like(largest, -8)):
            scale = (largest * np.float32(shrink) / levels).astype(np.float16).astype(np.float32)
            scale[scale == 0] = SMALLEST_HALF  # of a block of zeros, or of weights that float16 cannot tell from zero
            value = (_encode(part, scale[:, None], np.float32(MIDDLE), 4) - np.float32(MIDDLE)) * scale[:, None]
            error = np.square(value - part) @ importance
            better = error < best
            best[better], scales[better] = error[better], scale[better]
    return scales


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
