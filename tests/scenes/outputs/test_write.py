"""Files are whole or absent, the same bytes for the same records, and mistakes are said before anything is written."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import ImageReadError, InputError, MissingDependencyError
from rsvlm_infer.scenes.outputs import FORMATS, file_name, write_outputs
from rsvlm_infer.scenes.outputs.files import number, replacing
from rsvlm_infer.scenes.outputs.write import NEEDS, require_libraries
from rsvlm_infer.scenes.record import GridWindow, PixelWindow, WindowRecord
from tests.conftest import REPOSITORY
from tests.scenes.outputs.cases import header, overview, records, slower


@pytest.mark.parametrize("mode", ["find", "ask"])
def test_equal_records_give_equal_bytes(mode: Any, tmp_path: Path) -> None:
    for module in ("rasterio", "pyarrow", "jinja2", "matplotlib"):
        pytest.importorskip(module)
    formats = [name for name in FORMATS if name != "relevance" or mode == "find"]
    first = write_outputs(header(mode), records(mode), tmp_path / "1", formats, read_overview=overview)
    again = write_outputs(header(mode), slower(records(mode)), tmp_path / "2", formats[::-1], read_overview=overview)
    assert [path.name for path in first] == [path.name for path in again]
    assert [path.name for path in first] == [file_name("Kiel Förde", name) for name in formats]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted(path.name for path in first), (
        "nothing else is left"
    )


def _write_half(path: Path) -> None:
    with replacing(path) as scratch:
        scratch.write_text("new")
        raise RuntimeError("killed")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.txt"
    with replacing(path) as scratch:
        scratch.write_text("old")
    with pytest.raises(RuntimeError, match="killed"):
        _write_half(path)
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["x.txt"]
    with pytest.raises(InputError, match=r"output .*x\.txt/y cannot be written"), replacing(path / "y") as scratch:
        pass


def plain(**changes: Any) -> Any:
    return header("find", crs=None, transform=None, **changes)


def test_mistakes_are_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"formats must be a list of .*got \['shapefile'\]"):
        write_outputs(plain(), records(), tmp_path, ["shapefile"])
    with pytest.raises(InputError, match="formats must be a list of"):
        write_outputs(plain(), records(), tmp_path, "html")
    with pytest.raises(InputError, match="got window 0 twice"):
        write_outputs(plain(), records()[:1] * 2, tmp_path, ["geojson"])
    far = WindowRecord(place=GridWindow(7, PixelWindow(0, 0, 1, 1), PixelWindow(250, 0, 51, 10)))
    with pytest.raises(InputError, match="records must lie inside the scene of 300 x 400 px, window 7"):
        write_outputs(plain(), [far], tmp_path, ["geojson"])
    assert not list(tmp_path.iterdir())


def test_the_picture_comes_from_the_source_unless_the_caller_has_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "photo.png"
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(source)
    (path,) = write_outputs(plain(source=str(source)), records(), tmp_path / "out", ["quicklook"])
    with Image.open(path) as picture:
        assert picture.width > 1000
    with pytest.raises(ImageReadError, match="does not exist"):
        write_outputs(plain(source=str(tmp_path / "gone.png")), records(), tmp_path / "out", ["html"])
    # formats without a picture do not open the source
    assert write_outputs(plain(source=str(tmp_path / "gone.png")), records(), tmp_path / "out", ["geojson"])


@pytest.mark.parametrize(
    ("output_format", "module", "extra"),
    [
        ("geoparquet", "pyarrow", "geo"),
        ("relevance", "rasterio", "geo"),
        ("quicklook", "matplotlib", "report"),
        ("html", "jinja2", "report"),
    ],
)
def test_an_absent_package_is_named_with_its_extra(
    output_format: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"rsvlm-infer\[{extra}\]"):
        write_outputs(plain(), records(), tmp_path, ["geojson", output_format], read_overview=overview)
    assert not list(tmp_path.iterdir())


def test_all_absent_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries(("geojson", "stac"))
    monkeypatch.setattr("rsvlm_infer.scenes.outputs.write.library_version", lambda name: None)
    require_libraries(("geojson", "stac"))  # need nothing of their own
    with pytest.raises(MissingDependencyError) as caught:
        require_libraries(FORMATS)
    assert str(caught.value) == (
        "formats ['geoparquet', 'relevance', 'quicklook', 'html'] need pyarrow, rasterio, matplotlib, jinja2, not installed here; "
        "pip install 'rsvlm-infer[geo,report]', or leave these formats out"
    )


def test_every_extra_is_one_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for library, extra in NEEDS.values():
        assert any(each.startswith(library) for each in project["optional-dependencies"][extra]), (library, extra)


def test_numbers_are_short_and_finite() -> None:
    assert number(1 / 3) == 0.333333
    assert number(float("nan")) is None
    assert number(float("inf")) is None
    assert number(None) is None
    assert str(number(-1e-9)) == "0.0"
