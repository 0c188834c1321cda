"""The relevance map is a cloud-optimized GeoTIFF in the scene's place, with the scores where their windows are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")

from rsvlm_infer.errors import InputError  # noqa: E402
from rsvlm_infer.scenes.outputs import write_outputs  # noqa: E402
from rsvlm_infer.scenes.outputs.relevance import LONG_SIDE_PX, score_map  # noqa: E402
from rsvlm_infer.scenes.record import GridWindow, PixelWindow, WindowRecord  # noqa: E402
from tests.scenes.outputs.cases import HEIGHT, NORTH_UP, WIDTH, header, records  # noqa: E402


def test_scores_lie_where_their_windows_are(tmp_path: Path) -> None:
    (path,) = write_outputs(header("find"), records("find"), tmp_path, ["relevance"])
    with rasterio.open(path) as found:
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert found.crs.to_epsg() == 32633
        assert found.bounds == (500_000, 5_497_000, 504_000, 5_500_000)
        assert np.isnan(found.nodata)
        assert found.block_shapes == [(256, 256)]
        assert found.tags()["query"] == "harbour with many ships"
        for record in records("find"):
            core = record.place.core
            x, y = rasterio.Affine(*NORTH_UP) @ (core.col_off + core.width / 2, core.row_off + core.height / 2)
            assert next(found.sample([(x, y)]))[0] == pytest.approx(record.score, abs=1e-6)
        x, y = rasterio.Affine(*NORTH_UP) @ (150, 150)
        assert np.isnan(next(found.sample([(x, y)]))[0]), "a skipped window has no score"


def test_large_scenes_have_overviews_and_few_pixels(tmp_path: Path) -> None:
    side = 20_000
    made = [
        WindowRecord(place=GridWindow(i, window, window), score=i / 8)
        for i, window in enumerate(PixelWindow(0, i * 5000, side, 5000) for i in range(4))
    ]
    (path,) = write_outputs(header("find", height=side, width=side), made, tmp_path, ["relevance"])
    with rasterio.open(path) as found:
        assert found.shape == (LONG_SIDE_PX, LONG_SIDE_PX)
        assert found.overviews(1)
        assert found.bounds == pytest.approx((500_000, 5_300_000, 700_000, 5_500_000))
        assert (found.read(1)[0, :: LONG_SIDE_PX // 4] == np.float32([0, 0.125, 0.25, 0.375])).all()


@pytest.mark.parametrize("long_side_px", [7, 33, 400, 2048])
def test_at_any_size_every_window_shows_and_nothing_is_left_out(long_side_px: int) -> None:
    values = score_map(header("find"), records("find"), long_side_px)
    assert max(values.shape) == min(long_side_px, max(HEIGHT, WIDTH))
    assert set(np.unique(values[np.isfinite(values)])) == {np.float32(round(r.score or 0, 6)) for r in records("find")}
    assert 0 < np.isnan(values).mean() < 0.2, "only the skipped window is empty"


def test_rotated_and_without_a_place(tmp_path: Path) -> None:
    rotated = (8.0, 6.0, 500_000.0, 6.0, -8.0, 5_500_000.0)
    (path,) = write_outputs(header("find", transform=rotated), records("find"), tmp_path, ["relevance"], name="rotated")
    with rasterio.open(path) as found:
        assert tuple(found.transform)[:6] == pytest.approx(rotated)
    (path,) = write_outputs(header("find", crs=None, transform=None), records("find"), tmp_path, ["relevance"], name="plain")
    with rasterio.open(path) as found:
        assert found.crs is None
        assert found.transform.is_identity


def test_other_modes_have_no_relevance(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='format "relevance" needs mode "find", got "classify"'):
        write_outputs(header("classify"), records("classify"), tmp_path, ["relevance"])
    assert not list(tmp_path.iterdir())
