"""What may be opened: local GeoTIFF and JPEG 2000, other drivers and virtual paths only when a user allows them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.imagery.access import Access, find_source
from rsvlm_infer.imagery.source import open_scene

rasterio = pytest.importorskip("rasterio")

VRT = """<VRTDataset rasterXSize="6" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
</VRTRasterBand></VRTDataset>"""

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def tif(tmp_path: Path) -> Path:
    path = tmp_path / "a.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, height=4, width=6, dtype="uint8") as file:
        file.write(np.full((1, 4, 6), 9, np.uint8))
    return path


@pytest.fixture
def served(tif: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The folder of `tif` on a server of this machine: its address, and its log. A process: GDAL holds Python's lock while it opens."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tif.parent)]
    log = tif.parent / "log.txt"
    with log.open("w") as stream, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split("(")[1].split("/)")[0]
        yield address, log.read_text
        server.terminate()


def test_a_vrt_needs_its_driver_to_be_allowed(tif: Path) -> None:
    path = tif.with_suffix(".vrt")
    path.write_text(VRT.format(relative=1, source="a.tif"))
    with pytest.raises(
        ImageReadError, match=r'driver VRT: if you trust it, read it with allow_drivers=\("VRT",\) \(--allow-driver VRT\)'
    ):
        open_scene(path)
    with open_scene(path, allow_drivers=["VRT"], stretch="none") as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 9).all()


def test_another_driver_reads_its_own_format_and_no_other(tif: Path) -> None:
    path = tif.with_name("b.img")
    with rasterio.open(path, "w", driver="HFA", count=1, height=4, width=6, dtype="uint8") as file:
        file.write(np.full((1, 4, 6), 5, np.uint8))
    with pytest.raises(ImageReadError, match="driver HFA"):
        open_scene(path)
    with pytest.raises(ImageReadError, match="cannot be read as a raster"):
        open_scene(path, allow_drivers=["ENVI"])
    with open_scene(path, allow_drivers=["ENVI", "HFA"], stretch="none") as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 5).all()


def test_virtual_paths_need_to_be_allowed(tif: Path) -> None:
    archive = tif.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tif, "inside.tif")
    name = f"/vsizip/{archive}/inside.tif"
    with pytest.raises(ImageReadError, match=r"got the address '/vsizip.*allow_vsi=True \(--allow-vsi\)"):
        open_scene(name)
    with open_scene(name, allow_vsi=True, stretch="none") as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 9).all()
        assert scene.name == name


def test_an_address_is_never_taken_as_it_is(tif: Path) -> None:
    for address in ("https://example.org/a.tif", "s3://bucket/a.tif"):
        with pytest.raises(ImageReadError, match="write it as /vsicurl"):
            open_scene(address, allow_vsi=True)


def test_the_network_is_reached_only_when_allowed(tif: Path, served: tuple[str, Callable[[], str]]) -> None:
    address, log = served
    path = tif.with_name("remote.vrt")
    path.write_text(VRT.format(relative=0, source=f"/vsicurl/{address}/a.tif"))
    with pytest.raises(ImageReadError):
        open_scene(f"/vsicurl/{address}/a.tif")
    with pytest.raises(ImageReadError), open_scene(path, allow_drivers=["VRT"], stretch="none") as scene:
        scene.read(0, 0, 4, 6)
    assert "GET" not in log()
    assert "HEAD" not in log()
    with open_scene(f"/vsicurl/{address}/a.tif", allow_vsi=True, stretch="none") as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 9).all()
    with open_scene(path, allow_drivers=["VRT"], allow_vsi=True, stretch="none") as scene:
        assert (scene.read(0, 0, 4, 6)[0] == 9).all()
    assert "a.tif" in log()


def test_subdatasets_belong_to_an_allowed_driver(tmp_path: Path) -> None:
    access = Access(("netCDF",))
    assert find_source("NETCDF:file.nc:var", access) == "NETCDF:file.nc:var"
    with pytest.raises(ImageReadError, match="leads beyond local files"):
        find_source("NETCDF:/vsicurl/http://example.org/file.nc:var", access)
    with pytest.raises(ImageReadError, match="does not exist"):
        find_source("HDF5:file.h5://var", Access(("netCDF",)))
    with pytest.raises(ImageReadError, match="is a folder"):
        find_source(tmp_path, Access())
    assert find_source(tmp_path, Access(("Zarr",))) == str(tmp_path)
