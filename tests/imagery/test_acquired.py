"""When a raster was taken: by its tags, in order, in UTC, or unknown."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import InputError
from rsvlm_infer.imagery.acquired import acquired_of, parse_time
from rsvlm_infer.imagery.source import open_scene


def tagged(path: Path, **tags: str) -> Path:
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=2,
        width=2,
        count=1,
        dtype="uint8",
        crs="EPSG:4326",
        transform=rasterio.Affine(1, 0, 0, 0, -1, 0),
    ) as made:
        made.write(np.ones((1, 2, 2), np.uint8))
        made.update_tags(**tags)
    return path


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"TIFFTAG_DATETIME": "2020:08:31 17:04:05"}, datetime(2020, 8, 31, 17, 4, 5, tzinfo=UTC)),
        ({"TIFFTAG_DATETIME": "2020-08-31"}, datetime(2020, 8, 31, tzinfo=UTC)),
        (
            {"TIFFTAG_DATETIME": "2020:08:31 17:04:05", "ACQUISITIONDATETIME": "2019-01-02T03:04:05Z"},
            datetime(2019, 1, 2, 3, 4, 5, tzinfo=UTC),
        ),
        ({"SENSING_TIME": "2019-01-02T03:04:05+02:00"}, datetime(2019, 1, 2, 1, 4, 5, tzinfo=UTC)),
        ({"TIFFTAG_DATETIME": "0000:00:00 00:00:00"}, None),
        ({"TIFFTAG_DATETIME": "unknown"}, None),
        ({}, None),
    ],
)
def test_tags_say_when(tags: dict[str, str], expected: datetime | None, tmp_path: Path) -> None:
    path = tagged(tmp_path / "a.tif", **tags)
    assert acquired_of(path) == expected
    with open_scene(path) as scene, scene.twin() as twin:
        assert scene.acquired == twin.acquired == (None if expected is None else expected.isoformat())


def test_other_files_do_not_say(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    assert acquired_of(tmp_path / "a.png") is None
    with open_scene(tmp_path / "a.png") as scene:
        assert scene.acquired is None
    (tmp_path / "bad.tif").write_bytes(b"II*\0nothing")
    assert acquired_of(tmp_path / "bad.tif") is None
    assert acquired_of(tmp_path / "none.tif") is None


def test_times_are_read_in_utc() -> None:
    assert parse_time("2024-05-31", "--after") == datetime(2024, 5, 31, tzinfo=UTC)
    assert parse_time(" 2024-05-31T10:00:00+02:00 ", "--after") == datetime(2024, 5, 31, 8, tzinfo=UTC)
    with pytest.raises(InputError, match="--after must be an ISO 8601 date or time, got 'May'"):
        parse_time("May", "--after")
