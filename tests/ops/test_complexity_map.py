"""complexity_map: the eager definition against brute force, the native twin against eager, bit for bit."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsvlm_infer.errors import InputError
from rsvlm_infer.hardware import native_why_not
from rsvlm_infer.ops.complexity_map import complexity_map as eager
from rsvlm_infer.ops.registry import resolve
from tests.parity import AWKWARD_LENGTHS, assert_same_bits

needs_native = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))


def random_scene(height: int, width: int, valid: float = 0.9, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width), dtype=np.uint8), rng.random((height, width)) < valid


def window(tables: NDArray[np.float64], r0: int, c0: int, r1: int, c1: int) -> NDArray[np.float64]:
    result: NDArray[np.float64] = tables[:, r1, c1] - tables[:, r0, c1] - tables[:, r1, c0] + tables[:, r0, c0]
    return result


def test_by_hand() -> None:
    gray = np.array([[0, 255], [16, 32]], dtype=np.uint8)
    tables = eager(gray, np.array([[True, True], [True, False]]))
    assert tables.shape == (20, 3, 3)
    assert tables.dtype == np.float64
    assert (tables[:, 0] == 0).all()
    assert (tables[:, :, 0] == 0).all()
    assert tables[0, 2, 2] == 3
    assert tables[1, 2, 2] == 0 + 255 + 16
    assert tables[2, 2, 2] == 255**2 + 16**2
    assert tables[4:, 2, 2].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert tables[1].tolist() == [[0, 0, 0], [0, 0, 255], [0, 16, 271]]


def test_sobel_of_a_vertical_step_is_known() -> None:
    gray = np.zeros((5, 6), dtype=np.uint8)
    gray[:, 3:] = 255
    tables = eager(gray, np.ones_like(gray, dtype=bool))
    # both columns beside the step have gx = 4 * 255 and gy = 0: half of the largest magnitude
    assert window(tables, 0, 2, 5, 4)[3] == pytest.approx(5 * 2 * 0.5)
    assert tables[3, -1, -1] == pytest.approx(5.0)


def test_the_rim_of_nodata_is_no_edge() -> None:
    gray = np.full((8, 8), 200, dtype=np.uint8)
    mask = np.ones((8, 8), dtype=bool)
    gray[:, :3], mask[:, :3] = 0, False
    tables = eager(gray, mask)
    assert tables[3, -1, -1] == 0.0
    assert tables[0, -1, -1] == 8 * 5


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000), st.data())
def test_every_window_sum_equals_brute_force(height: int, width: int, seed: int, data: st.DataObject) -> None:
    gray, mask = random_scene(height, width, seed=seed)
    r0, r1 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    c0, c1 = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
    part, inside = gray[r0:r1, c0:c1].astype(np.int64), mask[r0:r1, c0:c1]
    sums = window(eager(gray, mask), r0, c0, r1, c1)
    assert sums[0] == inside.sum()
    assert sums[1] == part[inside].sum()
    assert sums[2] == (part[inside] ** 2).sum()
    assert sums[4:].tolist() == np.bincount(part[inside] // 16, minlength=16).tolist()


def test_errors_name_the_argument() -> None:
    gray, mask = random_scene(4, 4)
    with pytest.raises(InputError, match="gray must be a non-empty uint8"):
        eager(gray.astype(np.float32), mask)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gray must be a non-empty uint8"):
        eager(gray[:0], mask[:0])
    with pytest.raises(InputError, match="mask must be a bool array"):
        eager(gray, mask[:3])
    with pytest.raises(InputError, match="mask must be a bool array"):
        eager(gray, mask.astype(np.uint8))  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("height", AWKWARD_LENGTHS)
@pytest.mark.parametrize("width", [*AWKWARD_LENGTHS, 2])
def test_native_equals_eager(height: int, width: int) -> None:
    gray, mask = random_scene(height, width)
    assert_same_bits(resolve("complexity_map", "native")(gray, mask), eager(gray, mask))


@needs_native
def test_native_equals_eager_on_long_rows_and_on_views() -> None:
    native = resolve("complexity_map", "native")
    gray, mask = random_scene(3, 20_001)  # more than two int32 segments
    gray[1], mask[1] = 255, True  # the largest sums
    assert_same_bits(native(gray, mask), eager(gray, mask))
    gray, mask = random_scene(64, 90)
    assert_same_bits(native(gray[::2, 1::3], mask[::2, 1::3]), eager(gray[::2, 1::3], mask[::2, 1::3]))
    assert_same_bits(native(gray.T, mask.T), eager(gray.T, mask.T))


@needs_native
def test_native_refuses_what_eager_refuses() -> None:
    gray, mask = random_scene(4, 4)
    with pytest.raises(InputError, match="mask must be a bool array"):
        resolve("complexity_map", "native")(gray, mask[:3])
    from rsvlm_infer import _C

    with pytest.raises(ValueError, match="at least 1 by 1"):
        _C.complexity_map(gray=gray[:0], mask=mask[:0])
    with pytest.raises(ValueError, match="of one shape"):
        _C.complexity_map(gray=gray, mask=mask[:3])
    with pytest.raises(TypeError):
        _C.complexity_map(gray.astype(np.float32), mask)  # type: ignore[call-arg,misc]


@needs_native
def test_native_runs_beside_other_threads() -> None:
    native = resolve("complexity_map", "native")
    scenes = [random_scene(100, 130, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda scene: native(*scene), scenes))
    for scene, result in zip(scenes, results, strict=True):
        assert_same_bits(result, eager(*scene))


def test_why_not_explains_a_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from rsvlm_infer.kernels.native import complexity_map, pack_tiles

    monkeypatch.setitem(sys.modules, "rsvlm_infer._C", None)
    native_why_not.cache_clear()
    try:
        for twin in (complexity_map, pack_tiles):
            assert "reinstall rsvlm-infer" in str(twin.why_not())
    finally:
        native_why_not.cache_clear()
