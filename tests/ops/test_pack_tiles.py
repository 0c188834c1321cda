"""pack_tiles: eager against hand-made values and Pillow, the native twin against eager, pixel for pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from rsvlm_infer.errors import InputError
from rsvlm_infer.hardware import native_why_not
from rsvlm_infer.ops.pack_tiles import RESAMPLES, TOLERANCE, vertical_first
from rsvlm_infer.ops.pack_tiles import pack_tiles as eager
from rsvlm_infer.ops.registry import resolve
from tests.parity import assert_same_bits

needs_native = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))
IMPLEMENTATIONS = ["eager", pytest.param("native", marks=needs_native)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Pack = Callable[..., NDArray[np.float32]]


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pack(
    op: Pack, images: Sequence[NDArray[np.uint8]], canvases: Any, crops: Any, grids: Any, patch: int = 14, **options: Any
) -> NDArray[np.float32]:
    chosen = {"mean": MEAN, "std": STD, "resample": "bicubic", "fill": (0, 0, 0)} | options
    return op(images, canvases, crops, grids, patch, **chosen)


def pixels(
    op: Pack, image: NDArray[np.uint8], canvas: Any, crop: Any, grid: Any, patch: int, **options: Any
) -> NDArray[np.uint8]:
    """The crop as uint8 [h, w, 3], recovered from patches that were only divided by 255."""
    patches = pack(op, [image], [canvas], [crop], [grid], patch, mean=(0, 0, 0), std=(1, 1, 1), **options) * 255
    levels = np.rint(patches).astype(np.uint8)
    assert np.abs(patches - levels).max() < 1e-4
    gh, gw = grid
    return levels.reshape(gh, gw, 3, patch, patch).transpose(0, 3, 1, 4, 2).reshape(gh * patch, gw * patch, 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layout_and_normalisation_by_hand(implementation: str) -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    op = resolve("pack_tiles", implementation)
    patches = pack(op, [image], [(4, 6)], [(0, 0)], [(2, 3)], patch=2, mean=(0.5, 0.25, 0), std=(0.5, 1, 2))
    assert patches.shape == (6, 12)
    assert patches.dtype == np.float32
    # patch 4 is row 1, column 1: pixels (2..3, 2..3); inside a patch (channel, y, x)
    red, green = image[2:4, 2:4, 0] / 255, image[2:4, 2:4, 1] / 255
    np.testing.assert_allclose(patches[4, :4], ((red - 0.5) / 0.5).ravel(), atol=TOLERANCE)
    np.testing.assert_allclose(patches[4, 4:8], (green - 0.25).ravel(), atol=TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_convolution_it_feeds(implementation: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    image, weight = random_image(28, 42), torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    patches = pack(resolve("pack_tiles", implementation), [image], [(28, 42)], [(0, 0)], [(2, 3)])
    values = (torch.from_numpy(image) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    expected = torch.nn.functional.conv2d(values.permute(2, 0, 1)[None], weight, stride=14)[0].flatten(1).T
    torch.testing.assert_close(torch.from_numpy(patches) @ weight.flatten(1).T, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("resample", sorted(RESAMPLES))
@pytest.mark.parametrize(
    ("shape", "canvas"),
    [
        ((64, 48), (28, 28)),
        ((13, 17), (42, 70)),
        ((1, 1), (14, 14)),
        ((500, 20), (28, 14)),
        ((20, 500), (14, 28)),
        ((300, 31), (14, 28)),
    ],
)
def test_resampling_is_pillows(implementation: str, resample: str, shape: tuple[int, int], canvas: tuple[int, int]) -> None:
    image = random_image(*shape)
    expected = np.asarray(Image.fromarray(image).resize((canvas[1], canvas[0]), RESAMPLES[resample]))
    grid = (canvas[0] // 14, canvas[1] // 14)
    got = pixels(resolve("pack_tiles", implementation), image, canvas, (0, 0), grid, 14, resample=resample)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("crop", [(-5, 3), (3, -9), (20, 20), (-28, 0), (0, 60), (-100, -100)])
def test_outside_of_the_canvas_is_fill(implementation: str, crop: tuple[int, int]) -> None:
    image = random_image(50, 60)
    canvas = np.asarray(Image.fromarray(image).resize((36, 30), Image.Resampling.BICUBIC))
    expected = np.empty((28, 28, 3), dtype=np.uint8)
    expected[:] = (9, 80, 200)
    for y in range(28):
        for x in range(28):
            if 0 <= y + crop[0] < 30 and 0 <= x + crop[1] < 36:
                expected[y, x] = canvas[y + crop[0], x + crop[1]]
    op = resolve("pack_tiles", implementation)
    assert_same_bits(pixels(op, image, (30, 36), crop, (2, 2), 14, fill=(9, 80, 200)), expected)


def test_pass_order_is_the_installed_pillows() -> None:
    flags = set()
    for shape, canvas in [((200, 40), (20, 30)), ((60, 50), (20, 30)), ((40, 200), (20, 30)), ((1500, 10), (100, 12))]:
        image = Image.fromarray(random_image(*shape))
        across, down = (canvas[1], shape[0]), (shape[1], canvas[0])
        cubic, target = Image.Resampling.BICUBIC, (canvas[1], canvas[0])
        horizontal = np.asarray(image.resize(across, cubic).resize(target, cubic))
        vertical = np.asarray(image.resize(down, cubic).resize(target, cubic))
        assert not np.array_equal(horizontal, vertical)
        flag = vertical_first(shape, canvas)
        assert_same_bits(np.asarray(image.resize(target, cubic)), vertical if flag else horizontal)
        flags.add(flag)
    assert False in flags


@pytest.mark.parametrize(
    ("version", "shape", "canvas", "expected"),
    [
        ((12, 2), (1500, 10), (100, 12), False),
        ((12, 3), (1500, 10), (100, 12), True),
        ((12, 3), (200, 40), (20, 30), False),
        ((13, 0), (200, 40), (20, 30), True),
        ((13, 0), (60, 40), (20, 30), True),
        ((13, 0), (50, 45), (20, 30), False),
        ((13, 0), (20, 10), (20, 30), False),
    ],
)
def test_pass_order_of_every_pillow(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], shape: Any, canvas: Any, expected: bool
) -> None:
    monkeypatch.setattr("rsvlm_infer.ops.pack_tiles._PILLOW", version)
    assert vertical_first(shape, canvas) is expected


@needs_native
@settings(max_examples=80)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(-20, 40),
    st.integers(-20, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 7, 14]),
    st.sampled_from(sorted(RESAMPLES)),
    st.integers(0, 1000),
)
def test_native_equals_eager(
    height: int, width: int, ch: int, cw: int, y: int, x: int, gh: int, gw: int, patch: int, resample: str, seed: int
) -> None:
    arguments = ([random_image(height, width, seed)], [(ch, cw)], [(y, x)], [(gh, gw)], patch)
    expected = pack(eager, *arguments, resample=resample, fill=(1, 2, 3))
    got = pack(resolve("pack_tiles", "native"), *arguments, resample=resample, fill=(1, 2, 3))
    # a grey level is 1 / 255 / std > 0.014: within this tolerance every uint8 pixel is the same
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@needs_native
def test_native_equals_eager_on_a_large_tile_and_on_strided_views() -> None:
    scene = random_image(700, 900)
    tiles = [scene[3:603, 5:805], scene[::2, 100:500], scene[:, ::-1], scene.transpose(1, 0, 2), scene[::-1]]
    arguments = (tiles, [(336, 448)] * 5, [(0, 0), (-7, 30), (1, 1), (200, 200), (0, 0)], [(24, 32)] * 5)
    got = pack(resolve("pack_tiles", "native"), *arguments)
    np.testing.assert_allclose(got, pack(eager, *arguments), rtol=0, atol=TOLERANCE)


@needs_native
@pytest.mark.parametrize(("count", "side", "grid"), [(1, 800, 50), (8, 300, 16)])
def test_threads_change_no_bit(count: int, side: int, grid: int) -> None:
    """Work above the threshold of the parallel regions: inside one tile, and over many tiles."""
    arguments = (
        [random_image(side, side, t) for t in range(count)],
        [(grid * 14,) * 2] * count,
        [(0, 0)] * count,
        [(grid,) * 2] * count,
    )
    got = pack(resolve("pack_tiles", "native"), *arguments)
    np.testing.assert_allclose(got, pack(eager, *arguments), rtol=0, atol=TOLERANCE)
    assert_same_bits(pack(resolve("pack_tiles", "native"), *arguments), got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tile_is_the_same_alone_and_among_others(implementation: str) -> None:
    op = resolve("pack_tiles", implementation)
    images = [random_image(20 + 7 * index, 90 - 5 * index, index) for index in range(9)]
    canvases = [(28 + index, 42 + 2 * index) for index in range(9)]
    crops, grids = [(index - 4, 3) for index in range(9)], [(1 + index % 3, 1 + index % 2) for index in range(9)]
    together = pack(op, images, canvases, crops, grids)
    alone = [pack(op, [images[t]], [canvases[t]], [crops[t]], [grids[t]]) for t in range(9)]
    assert_same_bits(together, np.concatenate(alone))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tiles_give_no_patches(implementation: str) -> None:
    assert pack(resolve("pack_tiles", implementation), [], [], [], []).shape == (0, 588)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [np.zeros((4, 4), np.uint8)]}, r"images\[0\] must be a non-empty uint8"),
        ({"images": [np.zeros((4, 4, 3), np.float32)]}, r"images\[0\] must be a non-empty uint8"),
        ({"images": [np.zeros((0, 4, 3), np.uint8)]}, r"images\[0\] must be a non-empty uint8"),
        ({"canvases": [(14, 14), (14, 14)]}, r"canvases must be an integer array \[T, 2\]"),
        ({"crops": [(0.0, 0.0)]}, r"crops must be an integer array"),
        ({"canvases": [(0, 14)]}, "canvases must be at least 1"),
        ({"grids": [(1, 0)]}, "grids must be at least 1"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"crops": [(1 << 40, 0)]}, "must stay below"),
        ({"mean": (0.5,)}, "mean must hold 3 numbers"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"fill": (0, 0, 256)}, r"fill must be in 0\.\.255"),
        ({"resample": "nearest"}, "resample must be one of"),
    ],
)
def test_errors_name_the_argument(implementation: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "images": [random_image(4, 4)],
        "canvases": [(14, 14)],
        "crops": [(0, 0)],
        "grids": [(1, 1)],
        "patch": 14,
        "mean": MEAN,
        "std": STD,
        "resample": "bicubic",
        "fill": (0, 0, 0),
    }
    with pytest.raises(InputError, match=message):
        resolve("pack_tiles", implementation)(**arguments | change)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [np.zeros((4, 4, 3), np.uint8)[:, ::2]]}, "contiguous pixels"),
        ({"images": [np.zeros((4, 4, 3), np.int8)]}, "must be uint8"),
        ({"canvases": np.ones((2, 2), np.int64)}, r"canvases must be int64 \[1, 2\]"),
        ({"grids": np.zeros((1, 2), np.int64)}, "grid sides"),
        ({"canvases": np.zeros((1, 2), np.int64)}, "image and canvas sides"),
        ({"crops": np.full((1, 2), 1 << 40)}, "crop offsets"),
        ({"patch": 0}, "patch must be in"),
        ({"vertical_first": []}, "vertical_first must hold one flag"),
        ({"resample": "nearest"}, "resample must be"),
    ],
)
def test_the_core_checks_again(change: dict[str, Any], message: str) -> None:
    """A caller of _C that skips the Python checks must get an error, never a crash."""
    from rsvlm_infer import _C

    ones = np.ones((1, 2), np.int64)
    arguments: dict[str, Any] = {
        "images": [random_image(4, 4)],
        "canvases": ones,
        "crops": ones,
        "grids": ones,
        "vertical_first": [False],
        "patch": 14,
        "mean": MEAN,
        "std": STD,
        "resample": "bicubic",
        "fill": [0, 0, 0],
    }
    with pytest.raises(ValueError, match=message):
        _C.pack_tiles(**arguments | change)
