"""cell_means: the eager definition against a loop in float64, the native twin against eager, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsvlm_infer.errors import InputError
from rsvlm_infer.hardware import native_why_not
from rsvlm_infer.ops.cell_means import DTYPES, MAX_FACTOR
from rsvlm_infer.ops.cell_means import cell_means as eager
from rsvlm_infer.ops.registry import resolve
from tests.parity import AWKWARD_LENGTHS, assert_same_bits

needs_native = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))


def numbers(dtype: str, largest: float, shape: tuple[int, ...], seed: int = 3) -> NDArray[Any]:
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind == "f":
        normal: NDArray[Any] = rng.normal(size=shape).astype(kind) * kind.type(largest)
        return normal
    limits = np.iinfo(kind)
    drawn: NDArray[Any] = rng.integers(
        max(limits.min, -int(largest)), min(limits.max, int(largest)), shape, dtype=kind, endpoint=True
    )
    return drawn


def by_loop(values: NDArray[Any], valid: NDArray[np.bool_], factor: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """One band."""
    shape = (-(-values.shape[0] // factor), -(-values.shape[1] // factor))
    means, found = np.zeros(shape), np.zeros(shape, bool)
    for row in range(shape[0]):
        for col in range(shape[1]):
            cell = np.s_[row * factor : (row + 1) * factor, col * factor : (col + 1) * factor]
            if valid[cell].any():
                means[row, col], found[row, col] = values[cell][valid[cell]].astype(np.float64).mean(), True
    return means, found


def assert_same(values: NDArray[Any], factor: int, *others: Any) -> None:
    """Native against eager, and both into views that were filled with something else."""
    expected = eager(values, factor, *others)
    for ours, theirs in zip(resolve("cell_means", "native")(values, factor, *others), expected, strict=True):
        assert_same_bits(ours, theirs)
        assert np.array_equal(np.signbit(ours), np.signbit(theirs)) if ours.dtype.kind == "f" else True
    bands, height, width = expected[0].shape
    for implementation in ("eager", "native"):
        means = np.full((bands, height + 2, width + 3), 77, values.dtype)
        found = np.full(means.shape, 2, np.uint8).view(np.bool_)
        inside = np.s_[:, 1:-1, 1:-2]
        parts = means[inside], found[inside]
        given_back = resolve("cell_means", implementation)(values, factor, *others, out=parts)
        assert given_back[0] is parts[0]
        assert_same_bits(parts[0], expected[0])
        assert (parts[1].view(np.uint8) == expected[1]).all()
        rim = np.ones(means.shape, bool)
        rim[inside] = False
        assert (means[rim] == 77).all()
        assert (found.view(np.uint8)[rim] == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [100, 4000, 65_535])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_cells_are_means_of_their_valid_pixels(dtype: str, largest: int, factor: int) -> None:
    values = numbers(dtype, largest, (37, 53))
    valid = np.random.default_rng(4).random(values.shape) > 0.3
    valid[:16, :32] = False
    for mask in (valid, np.ones_like(valid)):
        expected, found = by_loop(values, mask, factor)
        means, seen = eager(values[None], factor, mask[None])
        assert means.dtype == values.dtype
        assert seen[0].tolist() == found.tolist()
        if values.dtype.kind == "f":
            np.testing.assert_allclose(means[0], expected, rtol=1e-5, atol=largest * 1e-6)
        else:
            assert (means[0] == np.floor(expected + 0.5)).all()


def test_by_hand() -> None:
    values = np.array([[[1, 2, 9], [4, 5, 9], [7, 0, 0]]], np.uint8)
    means, found = eager(values, 2, nodata=[0])
    assert means.tolist() == [[[3, 9], [7, 0]]]
    assert found.tolist() == [[[True, True], [True, False]]]
    assert eager(np.array([[[-1, -2]]], np.int8), 2)[0].tolist() == [[[-1]]]  # -1.5: halves go up


@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("nodata", [0, 7, 65_535])
def test_a_value_for_all_that_is_missing_is_a_mask(implementation: str, nodata: int) -> None:
    run = resolve("cell_means", implementation)
    values = numbers("uint16", 65_534, (2, 40, 40))
    valid = np.random.default_rng(4).random(values.shape) > 0.4
    values[valid & (values == nodata)] = 9
    values[~valid] = nodata
    for ours, theirs in zip(run(values, 4, None, [nodata, nodata]), run(values, 4, valid), strict=True):
        assert_same_bits(ours, theirs)
    alone = run(values[:1], 4, None, [nodata])[0]
    assert_same_bits(run(values, 4, None, [nodata, 3])[0][:1], alone)  # each band misses its own


@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=needs_native)])
def test_floats_that_are_not_finite_never_reach_a_mean(implementation: str) -> None:
    values = np.full((1, 4, 4), np.nan, np.float32)
    values[0, 0, 0], values[0, 0, 1], values[0, 1] = 3.0, np.inf, -np.inf
    means, found = resolve("cell_means", implementation)(values, 2)
    assert means.tolist() == [[[3.0, 0.0], [0.0, 0.0]]]
    assert found.tolist() == [[[True, False], [False, False]]]


@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", DTYPES[:-1])  # sums of the largest float64 have no wider dtype
def test_the_largest_and_the_smallest_values_hold(implementation: str, dtype: str) -> None:
    limits: Any = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    for value in (limits.min, limits.max):
        means, _ = resolve("cell_means", implementation)(np.full((1, 300, 300), value, dtype), 256)
        if np.dtype(dtype).itemsize < 8:
            assert (means == value).all()
        else:  # float64 inside
            assert np.abs(means.astype(np.float64) - float(value)).max() <= 2048


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height", AWKWARD_LENGTHS)
@pytest.mark.parametrize("width", [*AWKWARD_LENGTHS, 2])
def test_native_equals_eager(dtype: str, height: int, width: int) -> None:
    values = numbers(dtype, 65_535, (3, height, width))
    valid = np.random.default_rng(5).random(values.shape) > 0.2
    valid[:, height // 2 :, : width // 2] = False
    if values.dtype.kind == "f":
        values[0, ::3, ::5], values[1, ::4, ::7] = np.nan, np.inf
    for factor in (1, 2, 4, 8, 32):
        assert_same(values, factor)
        assert_same(values, factor, valid)
        assert_same(values, factor, valid[1:2])
        if values.dtype.kind != "f":
            assert_same(values, factor, None, [int(values[0, 0, 0]), 0, 100])


@needs_native
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "int64"])
def test_native_equals_eager_on_long_rows_and_large_cells(dtype: str) -> None:
    values = numbers(dtype, 65_535, (2, 9, 9_001))  # more than two segments
    valid = np.random.default_rng(5).random((1, 9, 9_001)) > 0.2
    for factor in (2, 4, 128, 256, 512, 8192, MAX_FACTOR):
        assert_same(values, factor)
        assert_same(values, factor, valid)
    tall = numbers(dtype, 65_535, (1, 700, 600))
    for factor in (128, 256, 512):
        assert_same(tall, factor)


@needs_native
def test_native_equals_eager_on_views() -> None:
    values, valid = numbers("int16", 3000, (64, 90, 3)), np.random.default_rng(5).random((64, 90, 3)) > 0.5
    assert_same(values.transpose(2, 0, 1), 4, valid.transpose(2, 0, 1))
    assert_same(values.transpose(2, 0, 1)[:2, 1::2, ::3], 8)
    assert_same(values.transpose(2, 0, 1)[:, ::-1], 2)
    out = (
        np.zeros((23, 16, 3), np.int16).transpose(2, 1, 0),
        np.zeros((23, 16, 3), np.bool_).transpose(2, 1, 0),
    )  # rows in steps
    resolve("cell_means", "native")(values.transpose(2, 0, 1), 4, out=out)
    assert_same_bits(out[0], eager(values.transpose(2, 0, 1), 4)[0])
    assert out[1].all()


@needs_native
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "mask", "shared", "nodata"]),
    st.integers(0, 99),
)
def test_native_equals_eager_whatever_is_drawn(height: int, width: int, factor: int, dtype: str, rule: str, seed: int) -> None:
    values = numbers(dtype, 5, (2, height, width), seed)
    valid = np.random.default_rng(seed).random((1 if rule == "shared" else 2, height, width)) > 0.5
    nodata = [0, 3] if rule == "nodata" and values.dtype.kind != "f" else None
    assert_same(values, factor, valid if rule in ("mask", "shared") else None, nodata)


@needs_native
def test_native_runs_beside_other_threads() -> None:
    native, scenes = resolve("cell_means", "native"), [numbers("uint16", 900, (2, 100, 130), seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda scene: native(scene, 4, None, [0, 5]), scenes))
    for scene, result in zip(scenes, results, strict=True):
        assert_same_bits(result[0], eager(scene, 4, None, [0, 5])[0])


@pytest.mark.parametrize("implementation", ["eager", pytest.param("native", marks=needs_native)])
def test_errors_name_the_argument(implementation: str) -> None:
    run, values, mask = resolve("cell_means", implementation), np.ones((2, 4, 6), np.uint8), np.ones((2, 4, 6), np.bool_)
    for bad in (values[0], values[:, :0], values.astype(np.complex64), values.astype(np.float16)):
        with pytest.raises(InputError, match="values must be a non-empty array"):
            run(bad, 2)
    for factor in (0, 3, -2, 2 * MAX_FACTOR):
        with pytest.raises(InputError, match="factor must be a power of two"):
            run(values, factor)
    for other in (mask[:, :3], mask.astype(np.uint8), np.ones((3, 4, 6), np.bool_)):
        with pytest.raises(InputError, match=r"valid must be bool \[2 or 1, 4, 6\]"):
            run(values, 2, other)
    for nodata in ([0], [0, 256], [-1, 0]):
        with pytest.raises(InputError, match="nodata must be one uint8 value for each of 2 bands"):
            run(values, 2, None, nodata)
    with pytest.raises(InputError, match="nodata must be None beside valid"):
        run(values, 2, mask, [0, 0])
    with pytest.raises(InputError, match="nodata must be None for floats"):
        run(values.astype(np.float32), 2, None, [0, 0])
    with pytest.raises(InputError, match="found of out must be bool"):
        run(values, 2, out=(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)))


@needs_native
def test_native_itself_refuses_what_does_not_fit() -> None:
    from rsvlm_infer import _C

    values, means, found = np.ones((2, 4, 6), np.uint8), np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.bool_)
    good: dict[str, Any] = {"values": values, "factor": 2, "valid": None, "nodata": None, "means": means, "found": found}
    for wrong, message in (
        ({"values": values[:, ::2]}, "C-contiguous"),
        ({"factor": 0}, "at least 1"),
        ({"factor": 3, "means": means[..., :2], "found": found[..., :2]}, "power of two"),
        ({"means": means.astype(np.int8)}, "means and found must be"),
        ({"found": found[:, :1]}, "means and found must be"),
        ({"valid": np.ones((2, 4, 5), np.bool_)}, "valid must be"),
        ({"nodata": np.zeros(1, np.uint8)}, "nodata must be one value"),
        ({"nodata": np.zeros(2, np.uint8), "valid": np.ones((2, 4, 6), np.bool_)}, "beside valid"),
        ({"values": values.astype(np.float16), "means": means.astype(np.float16)}, "got float16"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cell_means(**(good | wrong))
    _C.cell_means(**good)
    assert found.all()
