"""Stretch and area average: values, masks, degenerate bands."""

from __future__ import annotations

import numpy as np
import pytest

from rsvlm_infer.imagery.radiometry import Stretch, area_average, fit_stretch, to_rgb


def test_stretch_maps_low_to_0_and_high_to_255_in_every_dtype() -> None:
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"):
        values = np.array([10, 20, 30, 110, 120], dtype=dtype).reshape(1, 5, 1)
        grey = Stretch((20.0,), (110.0,)).apply(values, np.ones(values.shape, bool))
        assert grey.ravel().tolist() == [0, 0, 28, 255, 255], dtype


def test_stretch_of_negative_values_uses_the_signed_meaning() -> None:
    values = np.array([-100, -50, 0, 50, 100], dtype=np.int16).reshape(1, 5, 1)
    assert Stretch((-100.0,), (100.0,)).apply(values, np.ones(values.shape, bool)).ravel().tolist() == [0, 64, 128, 191, 255]


def test_stretch_blackens_invalid_values_and_nan() -> None:
    values = np.array([5.0, np.nan, 5.0, np.inf], dtype=np.float32).reshape(2, 2, 1)
    valid = np.array([True, False, False, False]).reshape(2, 2, 1)
    assert Stretch((0.0,), (5.0,)).apply(values, valid).ravel().tolist() == [255, 0, 0, 0]


def test_fit_takes_percentiles_of_each_band_over_its_own_valid_values() -> None:
    values = np.stack([np.arange(101.0), np.arange(101.0) * 10], axis=-1)[None]  # [1, 101, 2]
    valid = np.ones(values.shape, bool)
    valid[0, :51, 1] = False  # second band: 510..1000
    stretch = fit_stretch(values, valid)
    assert stretch.low == pytest.approx((2.0, 519.8))
    assert stretch.high == pytest.approx((98.0, 990.2))


def test_a_zero_collar_does_not_move_the_stretch() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(800, 4000, (100, 100, 1)).astype(np.uint16)
    free = fit_stretch(values[:, 20:], np.ones((100, 80, 1), bool))
    values[:, :20] = 0  # 20 % of the scene
    assert fit_stretch(values, values > 0) == free
    assert free.low[0] > 800
    assert fit_stretch(values, np.ones(values.shape, bool)).low[0] == 0.0  # what an unmasked stretch would do


@pytest.mark.parametrize(("constant", "grey"), [(0.0, 128), (10000.0, 128), (-1e20, 128)])
def test_a_constant_band_becomes_middle_grey(constant: float, grey: int) -> None:
    values = np.full((2, 2, 1), constant)
    valid = np.ones(values.shape, bool)
    assert fit_stretch(values, valid).apply(values, valid).ravel().tolist() == [grey] * 4


def test_percentiles_that_meet_fall_back_to_min_and_max() -> None:
    values = np.zeros((10, 100, 1))
    values[0, 0] = 7.0  # 0.1 % of the values
    assert fit_stretch(values, np.ones(values.shape, bool)) == Stretch((0.0,), (7.0,))


def test_nothing_valid_is_all_black() -> None:
    values, valid = np.full((2, 3, 1), 9, np.uint16), np.zeros((2, 3, 1), bool)
    assert not fit_stretch(values, valid).apply(values, valid).any()


def test_area_average_means_only_valid_values() -> None:
    values = np.array([[10, 20, 99, 99], [30, 99, 99, 99]], dtype=np.uint16)[..., None]
    valid = values != 99
    mean, out_valid = area_average(values, valid, 1, 2)
    assert mean.dtype == np.uint16
    assert mean.ravel().tolist() == [20, 0]
    assert out_valid.ravel().tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "float64"])
def test_area_average_keeps_the_extremes_of_wide_dtypes(dtype: str) -> None:
    limits = np.iinfo(dtype) if dtype != "float64" else np.finfo(dtype)
    low, high = limits.min, limits.max
    values = np.array([[high, high, low, low], [high, high, low, low]], dtype=dtype)[..., None]
    valid = np.ones(values.shape, bool)
    mean, _ = area_average(values, valid, 1, 2)
    assert mean.dtype == dtype
    assert float(mean[0, 0, 0]) == pytest.approx(float(high), rel=1e-12)  # the brightest stays the brightest
    assert float(mean[0, 1, 0]) == pytest.approx(float(low), rel=1e-12)
    valid[0, 0] = False
    again, out_valid = area_average(values, valid, 1, 2)
    assert again.tolist() == mean.tolist()
    assert out_valid.all()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "float64"])
def test_area_average_of_wide_dtypes_resolves_small_steps_on_a_large_offset(dtype: str) -> None:
    # float32 alone has steps of 128 here
    values = (np.array([[0, 2, 10, 30], [4, 6, 20, 40]]) + 2_000_000_000).astype(dtype)[..., None]
    valid = np.ones(values.shape, bool)
    assert area_average(values, valid, 1, 2)[0].ravel().tolist() == [2_000_000_003, 2_000_000_025]
    valid[:, 2:] = False
    mean, out_valid = area_average(values, valid, 1, 2)
    assert mean.ravel().tolist() == [2_000_000_003, 0]
    assert out_valid.ravel().tolist() == [True, False]


def test_area_average_of_values_beyond_float32() -> None:
    values = np.array([[1e39, 3e39, np.nan, -1e39]])[..., None]
    mean, out_valid = area_average(values, np.isfinite(values), 1, 2)
    np.testing.assert_allclose(mean.ravel(), [2e39, -1e39], rtol=1e-6)
    assert out_valid.all()


def test_area_average_of_a_constant_wide_band_is_exact() -> None:
    values = np.full((4, 4, 1), 2**31 - 1, np.int32)
    assert area_average(values, np.ones(values.shape, bool), 2, 2)[0].ravel().tolist() == [2**31 - 1] * 4


def test_area_average_of_a_row_span_equals_that_part_of_the_whole() -> None:
    values = np.random.default_rng(1).normal(size=(97, 41, 3)).astype(np.float32)
    valid = values > -1.0
    whole, whole_valid = area_average(values, valid, 19, 7)
    top, bottom = 5 * 97 / 19, 12 * 97 / 19  # output rows 5..12
    part, part_valid = area_average(values[25:62], valid[25:62], 7, 7, (top - 25, bottom - 25))
    np.testing.assert_allclose(part, whole[5:12], atol=1e-6)
    assert (part_valid == whole_valid[5:12]).all()


def test_grey_becomes_three_equal_channels() -> None:
    rgb = to_rgb(np.arange(4, dtype=np.uint8).reshape(2, 2, 1))
    assert rgb.shape == (2, 2, 3)
    assert (rgb == np.arange(4).reshape(2, 2, 1)).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int16", "float32"])
def test_percentiles_have_the_bits_of_float64(dtype: str) -> None:
    rng = np.random.default_rng(5)
    top = {"uint32": 2**32, "uint64": 2**60}.get(dtype, 250)
    values = (rng.random((50, 40, 2)) * top).astype(dtype)
    valid = rng.random(values.shape) < 0.7
    fitted = fit_stretch(values, valid)
    for band in range(2):
        low, high = np.percentile(values[..., band][valid[..., band]].astype(np.float64), (2, 98))
        assert (fitted.low[band], fitted.high[band]) == (low, high)


def test_bands_are_averaged_as_if_alone_whatever_others_miss() -> None:
    rng = np.random.default_rng(6)
    values = rng.integers(0, 4000, (60, 50, 4), dtype=np.uint16)
    one, other = rng.random((60, 50)) < 0.5, rng.random((60, 50)) < 0.5
    valid = np.stack([one, one, other, np.ones_like(one)], axis=2)
    means, found = area_average(values, valid, 17, 13)
    for band in range(4):
        alone = area_average(values[..., band : band + 1], valid[..., band : band + 1], 17, 13)
        assert (means[..., band] == alone[0][..., 0]).all()
        assert (found[..., band] == alone[1][..., 0]).all()
