"""`python -m benchmarks.scenes`: what it takes to read and plan one very large scene, beside two other ways to read it.

A generated 4-band uint16 scene with a fifth of nodata, as a striped and as a tiled GeoTIFF, each with and without overviews. Every way
runs in a process of its own: `describe` is the whole of `rsvlm scene`, `plan` is its reading and planning alone, `coarse` the pass alone,
`windows` is a bare rasterio pass over the same blocks that keeps nothing, `lean` the same with no more memory than it needs, `whole` reads
all of it and stretches it by percentiles. Each process first reads the file once, so that all find it in the page cache.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsvlm_infer.hardware import probe

from .rows import RESULTS, append_rows

BANDS = 4
NODATA = 0
NODATA_SHARE = 0.2
BLOCK = 512  # of the tiled file
STRIP_ROWS = 16
FIELD = 256  # pixels of one colour
CALM_SHARE = 0.75  # of the ground shows little contrast
LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK},
    "striped": {"tiled": False, "blockysize": STRIP_ROWS},
}
WAYS = ("coarse", "plan", "windows", "lean", "describe", "whole")
BARE = ("lean", "windows")  # what the others stand against, the stricter first
LEAN_BYTES = 4 << 20  # of one window of all bands
TOKENS = 256
NUMBERS = ("seconds", "cpu_seconds", "peak_mib")
RATIOS = tuple(f"{number}_ratio{part}" for number in NUMBERS for part in ("", "_least", "_most"))
COLUMNS = ("date", "machine", "cores", "file", "file_mib", "way", "runs", *NUMBERS, "read_mib", "against", *RATIOS)


def generate(path: Path, side: int, layout: str, overviews: bool, compress: str = "none", seed: int = 0) -> None:
    """Writes the scene row of blocks by row of blocks: fields and texture, and a slanted collar of nodata on the left."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.transform import Affine
    from rasterio.windows import Window

    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 600, (BANDS, BLOCK, side), dtype=np.uint16)
    cells = -(-side // FIELD)
    fields = rng.integers(300, 3000, (BANDS, cells, cells)).astype(np.float64)
    calm = np.repeat(np.repeat(rng.random((-(-cells // 8),) * 2) < CALM_SHARE, 8, axis=0), 8, axis=1)[:cells, :cells]
    ground = np.where(calm, 1200 + 0.1 * (fields - 1650), fields).astype(np.uint16)  # something for the planner to choose from
    profile = {"driver": "GTiff", "count": BANDS, "dtype": "uint16", "nodata": NODATA, "compress": compress, "BIGTIFF": "YES"}
    if compress != "none":
        profile |= {"predictor": 2, "num_threads": "all_cpus"}
    place = {"crs": "EPSG:32632", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000)}
    partial = path.with_suffix(".part.tif")
    with rasterio.open(partial, "w", width=side, height=side, **profile, **place, **LAYOUTS[layout]) as dataset:
        columns = np.arange(side)
        for top in range(0, side, BLOCK):
            rows = min(BLOCK, side - top)
            part = texture[:, :rows] + ground[:, (top + np.arange(rows))[:, None] // FIELD, columns[None] // FIELD]
            edge = 2 * NODATA_SHARE * (top + np.arange(rows)) / side * side  # a triangle: a share of NODATA_SHARE in all
            part[:, columns[None] < edge[:, None]] = NODATA
            dataset.write(part, window=Window(0, top, side, rows))
    if overviews:
        with rasterio.open(partial, "r+") as dataset:
            dataset.build_overviews([2**level for level in range(1, 7)], Resampling.average)
    partial.rename(path)


def measure(way: str, path: Path, checkpoint: Path | None) -> dict[str, Any]:
    """One way, in this process: clock and processor seconds, bytes read, and its peak memory beyond what it held before."""
    ways = {"coarse": _coarse, "plan": _plan, "windows": _windows, "lean": _lean, "describe": _describe, "whole": _whole}
    ready, run = ways[way](path, checkpoint)
    warm(path)
    before, read_before = _status("VmRSS"), _bytes_read()
    _reset_peak()
    started, started_cpu = time.perf_counter(), time.process_time()
    found = run()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "way": way,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": (_status("VmHWM") - before) / 1024,
        "loaded_mib": before / 1024,
        "read_mib": (_bytes_read() - read_before) / 2**20,
        **ready,
        **found,
    }


def warm(path: Path) -> None:
    """Reads the file once: a machine may take the page cache of idle files back within seconds, and a disk is no way's merit."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _coarse(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    import rsvlm_infer.imagery.geo  # noqa: F401  loaded before the clock starts
    from rsvlm_infer.imagery.source import open_scene
    from rsvlm_infer.ops.registry import resolve

    resolve("cell_means")

    def run() -> dict[str, Any]:
        with open_scene(path) as scene:
            return {"factor": scene._read_coarse().factor}

    return {}, run


def _plan(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    import rsvlm_infer.imagery.geo  # noqa: F401  what a process that has read one scene has loaded
    from rsvlm_infer.cli.inspect import planning_config
    from rsvlm_infer.ops.registry import resolve
    from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene

    config, settings = planning_config(checkpoint), SceneSettings(tiling="dris", max_visual_tokens=TOKENS)
    for op in ("cell_means", "complexity_map", "pack_tiles"):
        resolve(op)  # loads what it is made of

    def run() -> dict[str, Any]:
        prepared = prepare_scene(path, config, settings)
        times = {"read_ms": prepared.read_ms, "plan_ms": prepared.plan_ms, "pack_ms": prepared.preprocess_ms}
        return times | {"tokens": prepared.num_tokens, "tiles": len(prepared.plan.tiles)}

    return {}, run


def _describe(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    from rsvlm_infer import RSVLM

    model = RSVLM.from_pretrained(checkpoint)
    for mode in ("L", "RGB"):  # a first answer, so that what the model needs for any answer is there
        model.caption(
            np.zeros((448, 448) + ((3,) if mode == "RGB" else ()), np.uint8), max_new_tokens=2, max_visual_tokens=TOKENS
        )
    _ = model.digest

    def run() -> dict[str, Any]:
        (record,) = model.scene(path, "describe", max_visual_tokens=TOKENS)
        times = record.timings
        return {
            "read_ms": times.read_ms,
            "plan_ms": times.plan_ms,
            "pack_ms": times.preprocess_ms,
            "encode_ms": times.encode_ms,
            "prefill_ms": times.prefill_ms,
            "decode_ms": times.decode_ms,
            "tokens": record.num_visual_tokens,
            "tiles": len(record.cited),
            "text": record.text,
        }

    return {}, run


def _windows(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    """All bands of every block once, in the file's order, with a cache that holds them."""
    import rasterio
    from rasterio.windows import Window

    def run() -> dict[str, Any]:
        count = 0
        with rasterio.Env(GDAL_CACHEMAX=256 << 20), rasterio.open(path) as dataset:
            block_height, block_width = dataset.block_shapes[0]
            rows = max(block_height, BLOCK)
            cols = block_width
            for top in range(0, dataset.height, rows):
                for left in range(0, dataset.width, cols):
                    window = Window(left, top, min(cols, dataset.width - left), min(rows, dataset.height - top))
                    dataset.read(window=window)
                    count += 1
        return {"windows": count}

    return {}, run


def _lean(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    """The least that such a pass takes: windows of whole blocks and few MiB into one array, a cache for two of them."""
    import rasterio
    from rasterio.windows import Window

    def run() -> dict[str, Any]:
        count = 0
        with rasterio.Env(GDAL_CACHEMAX=2 * LEAN_BYTES), rasterio.open(path) as dataset:
            rows, cols = dataset.block_shapes[0]
            pixel_bytes = dataset.count * np.dtype(dataset.dtypes[0]).itemsize
            more = max(1, LEAN_BYTES // (rows * cols * pixel_bytes))
            rows, cols = (rows * more, cols) if cols == dataset.width else (rows, cols * more)
            values = np.empty(dataset.count * rows * cols, dtype=dataset.dtypes[0])
            for top in range(0, dataset.height, rows):
                for left in range(0, dataset.width, cols):
                    window = Window(left, top, min(cols, dataset.width - left), min(rows, dataset.height - top))
                    shape = (dataset.count, window.height, window.width)
                    dataset.read(window=window, out=values[: dataset.count * window.height * window.width].reshape(shape))
                    count += 1
        return {"windows": count}

    return {}, run


def _whole(path: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Any]:
    """What a script does that knows no windows: read, mask, stretch each shown band by percentiles, shrink."""
    import rasterio
    from PIL import Image

    def run() -> dict[str, Any]:
        with rasterio.open(path) as dataset:
            values = dataset.read()  # [C, H, W]
            nodata = dataset.nodata
        bands = []
        for band in values[:3]:
            floats = band.astype(np.float32)
            low, high = np.percentile(floats[band != nodata], (2, 98))
            bands.append((np.clip((floats - low) / (high - low), 0, 1) * 255).astype(np.uint8))
        rgb: npt.NDArray[np.uint8] = np.stack(bands, axis=2)
        small = Image.fromarray(rgb).resize((1024, 1024))
        return {"shape": list(np.asarray(small).shape)}

    return {}, run


def _status(field: str) -> int:
    """KiB of this process, from /proc."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def _reset_peak() -> None:
    """VmHWM begins again at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _bytes_read() -> int:
    """Bytes that this process asked the system to read, whether they came from a disk or not."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def compare(path: Path, ways: list[str], repeats: int, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Medians of each way; the ways take turns, so that a busy moment does not fall on one of them."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.scenes", "--measure", way, "--file", str(path)]
            command += ["--checkpoint", str(checkpoint)] if checkpoint else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{way} failed on {path}: {done.stderr.strip().splitlines()[-1:]}")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows, against = [], next((way for way in BARE if way in ways), ways[-1])
    for way in ways:
        found = runs[way]
        numbers = [key for key, value in found[0].items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
        row = found[0] | {key: round(statistics.median(run[key] for run in found), 3) for key in numbers}
        rows.append(row | {"runs": repeats} | _ratios(found, against, runs[against]))
    return rows


def _ratios(found: list[dict[str, Any]], against: str, others: list[dict[str, Any]]) -> dict[str, Any]:
    """A way by the way that it stands against, each run by the one beside it: median, least and most."""
    ratios: dict[str, Any] = {"against": against}
    for key in NUMBERS:
        pairs = [run[key] / other[key] for run, other in zip(found, others, strict=True)]
        for name, value in (("", statistics.median(pairs)), ("_least", min(pairs)), ("_most", max(pairs))):
            ratios[f"{key}_ratio{name}"] = round(value, 3)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenes", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the scenes are written and kept, about 3.2 GB each at 20,000 pixels")
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=sorted(LAYOUTS))
    parser.add_argument("--compress", choices=("none", "deflate", "zstd"), default="none")
    parser.add_argument("--overviews", action="store_true", help="also the same files with overviews")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["coarse", "plan", "windows", "describe"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/scenes.csv")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.file, arguments.checkpoint)))
        return
    if arguments.folder is None:
        parser.error("--folder is needed: where may the scenes be written?")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for layout in arguments.layouts:
        for overviews in (False, True) if arguments.overviews else (False,):
            kind = ("" if arguments.compress == "none" else f"-{arguments.compress}") + ("-overviews" if overviews else "")
            path = arguments.folder / f"{layout}-{arguments.side}{kind}.tif"
            if not path.exists():
                generate(path, arguments.side, layout, overviews, arguments.compress)
            for row in compare(path, arguments.ways, arguments.repeats, arguments.checkpoint):
                about = {"file": path.stem, "file_mib": path.stat().st_size / 2**20}
                print(json.dumps(about | row))
                if arguments.write:
                    when = {
                        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
                        "machine": probe().cpu,
                        "cores": os.cpu_count(),
                    }
                    row = when | about | row
                    append_rows(RESULTS / "scenes.csv", [{column: row[column] for column in COLUMNS}])


if __name__ == "__main__":
    main()
