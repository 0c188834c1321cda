"""`rsvlm caption` as a user runs it: its peak memory on large rasters, and one line for each file that cannot be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.wheels, pytest.mark.data, pytest.mark.slow]

LIMIT_BYTES = 2 * 2**30
BAD_FILES = ("corrupt.TIF", "corrupt.tif", "invalid.tif", "slc.tif", "zero_gi.tif")

# Runs `python -m rsvlm_infer` in this process and leaves its peak in a file.
# Not ru_maxrss: that one begins at the size of the process which started this one.
MEASURED = """
import pathlib, runpy, sys
target = pathlib.Path(sys.argv.pop(1))
try:
    runpy.run_module("rsvlm_infer", run_name="__main__", alter_sys=True)
finally:
    target.write_text(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize("name", ["cog_world.tif", "sentinel2_8band_2629x2201.tif"])  # 36000 x 18000 with a mask; 8 bands
def test_caption_of_a_large_raster_stays_below_2_gib(
    data_root: Path, default_checkpoint: Path, repository: Path, tmp_path: Path, name: str
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    pytest.importorskip("rasterio", reason="rasterio is not installed")
    arguments = ["caption", str(data_root / "geotiff" / name), "--checkpoint", str(default_checkpoint), "--max-new-tokens", "8"]
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "peak"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (sentence,) = done.stdout.splitlines()
    assert len(sentence.split()) >= 3
    assert sentence[0].isupper()
    peak_bytes = int((tmp_path / "peak").read_text()) * 1024
    assert 2**28 < peak_bytes < LIMIT_BYTES  # less than the weights alone would mean that something else was measured


def test_every_bad_file_gets_exactly_one_line(data_root: Path, default_checkpoint: Path, repository: Path) -> None:
    pytest.importorskip("rasterio", reason="rasterio is not installed")
    files = [str(data_root / "geotiff" / name) for name in BAD_FILES]
    command = [sys.executable, "-m", "rsvlm_infer", "caption", *files, "--checkpoint", str(default_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert len(lines) == len(files), done.stderr
    for file, line in zip(files, lines, strict=True):
        assert line.startswith(f"rsvlm: {file}"), line
        assert "; " in line  # ends with the next step
        assert "internal error" not in line
