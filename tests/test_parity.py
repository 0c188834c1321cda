"""The judge of parity must itself judge rightly."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import assert_parity, assert_same_bits, largest_error


def test_two_times_rule() -> None:
    reference = np.array([1.0, 2.0])
    eager = reference + [0.0, 1e-3]
    assert_parity(reference + [1.9e-3, 0.0], eager, reference, epsilon=1e-7)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(reference + [2.1e-3, 0.0], eager, reference, epsilon=1e-7)


def test_exact_eager_leaves_one_epsilon_of_scale() -> None:
    reference = np.array([100.0])
    assert_parity(reference + 0.5e-5, reference, reference, epsilon=1e-7)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_parity(reference + 2e-5, reference, reference, epsilon=1e-7)


def test_nan_and_infinity_are_no_agreement() -> None:
    assert largest_error([np.nan], [1.0]) == np.inf
    assert largest_error([np.inf], [np.inf]) == 0.0
    assert largest_error([np.nan], [np.nan]) == 0.0
    assert largest_error([np.inf], [-np.inf]) == np.inf
    assert largest_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        largest_error([1.0], [[1.0]])
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(np.zeros(1, np.float32), np.zeros(1, np.float64))
    with pytest.raises(AssertionError, match="largest difference"):
        assert_same_bits(np.zeros(1, np.float32), np.full(1, 1e-30, np.float32))
    assert_same_bits(np.arange(3), np.arange(3))


def test_bfloat16_tensors_are_understood() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    value = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert largest_error(value, [1.0, 2.5]) == 0.5
