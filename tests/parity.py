"""How an implementation is held to its op's eager definition. Knows arrays, no op."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# a lone row, a prime, a power of two, and one more than it: what tails and blocks get wrong
AWKWARD_LENGTHS = (1, 13, 64, 65)


def to_float64(value: Any) -> NDArray[np.float64]:
    """A numpy or torch array of any dtype (bfloat16 too) as float64."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def largest_error(value: Any, reference: Any) -> float:
    """Largest absolute difference; NaN counts as infinite unless both are NaN."""
    actual, expected = to_float64(value), to_float64(reference)
    assert actual.shape == expected.shape, f"shape {actual.shape} differs from the reference's {expected.shape}"
    if actual.size == 0:
        return 0.0
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.where(same, 0.0, np.abs(actual - expected))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def allowed_error(eager: Any, reference: Any, *, epsilon: float, factor: float = 2.0) -> float:
    """What `assert_parity` allows, as an absolute error; its arguments are explained there."""
    scale = float(np.abs(to_float64(reference)).max(initial=0.0))
    return factor * largest_error(eager, reference) + epsilon * scale


def assert_parity(implementation: Any, eager: Any, reference: Any, *, epsilon: float, factor: float = 2.0) -> None:
    """The two-times rule: an implementation may be at most `factor` as wrong as eager in the same dtype, against fp32.

    Args:
        implementation: output of the implementation under test.
        eager: output of the eager definition on the same inputs in the same dtype.
        reference: output of the eager definition on the inputs in float32 (or wider).
        epsilon: machine epsilon of the dtype (2**-23 fp32, 2**-10 fp16, 2**-7 bf16). One epsilon of the reference's scale
            is always allowed, because eager can be exact by luck.
        factor: 2 unless the op says otherwise, with a reason.
    """
    allowed = allowed_error(eager, reference, epsilon=epsilon, factor=factor)
    error = largest_error(implementation, reference)
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e} ({factor} x eager's plus {epsilon:.1e} of the scale)"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same dtype, shape and values, without tolerance."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} differs from {expected.dtype}"
    assert tuple(actual.shape) == tuple(expected.shape), f"shape {tuple(actual.shape)} differs from {tuple(expected.shape)}"
    error = largest_error(actual, expected)
    assert error == 0.0, f"largest difference {error:.3e}, expected none"
