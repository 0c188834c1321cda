"""Every file of the shared data folder: records, or one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.scenes.run import open_scene_run
from rsvlm_infer.scenes.settings import RunSettings
from rsvlm_infer.scenes.windows import total_px
from tests.imagery.test_real_scenes import DAMAGED, READABLE
from tests.scenes.telling_scenes import telling_model

pytest.importorskip("rasterio")
pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

LOST = {
    "cog_gcps.tif": "210 ground control points place the scene; one affine transform fits them within 2.79 pixels",
    "float_nan.tif": "there is no coordinate system",
}


@pytest.fixture(scope="module")
def geotiff(data_root: Path) -> Path:
    folder = data_root / "geotiff"
    if not folder.is_dir():
        pytest.skip("the shared data folder has no geotiff/")
    return folder


@pytest.mark.parametrize("name", READABLE)
def test_readable_files_give_records(name: str, geotiff: Path, tmp_path: Path) -> None:
    model = telling_model(tmp_path)
    (height, width), _, gsd, _ = READABLE[name]
    with open_scene_run(model, geotiff / name) as run:
        (record,) = run.answer(run.windows)
        assert record.text.startswith("A ")
        assert (run.header.height, run.header.width) == (height, width)
        assert (run.header.gsd_native_m is None) == (gsd is None)
        assert [sentence[: len(LOST[name])] for sentence in run.header.lost] == ([LOST[name]] if name in LOST else [])
    with open_scene_run(model, geotiff / name, RunSettings(window_px=max(2, min(height, width, 3000) // 3))) as run:
        assert total_px(run.windows) + run.header.empty_px + run.header.uniform_px == height * width
        for record in run.answer(run.windows[:2]):
            assert record.text.startswith("A ")
            assert 0 < record.valid_share <= 1


@pytest.mark.parametrize("name", DAMAGED)
def test_bad_files_give_one_clear_sentence(name: str, geotiff: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = telling_model(tmp_path)
    for settings in (RunSettings(), RunSettings(window_px=64)):
        with (
            pytest.raises(ImageReadError, match=DAMAGED[name]) as caught,
            open_scene_run(model, geotiff / name, settings) as run,
        ):
            run.answer(run.windows)
        assert str(geotiff / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
