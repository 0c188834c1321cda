"""Where the native backend computes rather than reads: prompts, batches of tiles, several tokens a step; and what a package costs to load.

    OMP_NUM_THREADS=1 python -m benchmarks.native_batches scene.jpg --clock cpu --csv native_batches.csv

Interleaved rounds, medians, against eager bfloat16 in the same run. Mixed tiles are 32 grids of 4 to 24 by 4 to 24 patches (16 to
576 a tile, mean 180), packed, and padded to 576 each as a plain batch would be. The vision encoder is that of the checkpoint, as
far as its last tap; random pixels and token ids, since neither changes the work. Several tokens a step continue one row of 100, as
verifying guesses does.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.native_decode import BASELINE, CLOCKS, about, forget
from benchmarks.rows import append_rows
from rsvlm_export.native import export_native
from rsvlm_infer import RSVLM
from rsvlm_infer.backends import Prompt
from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.contract import KIND_PRECISIONS
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.pipeline import default_checkpoint

TILES = 32
SIDES = (4, 24)  # patches, both ends included
MEAN_PATCHES = 180
CONTEXT = 100  # tokens of the row that a step continues
Call = Callable[[], object]


def mixed_grids(seed: int = 0) -> list[tuple[int, int]]:
    """Rows and columns of 32 tiles: the first draw whose mean is that of the issue's tiles."""
    generator = np.random.default_rng(seed)
    while True:
        sides = generator.integers(SIDES[0], SIDES[1] + 1, (TILES, 2))
        if abs(sides.prod(axis=1).mean() - MEAN_PATCHES) < 1:
            return [(int(rows), int(columns)) for rows, columns in sides]


def random_tiles(grids: list[tuple[int, int]], patch_values: int) -> PackedScene:
    """What an encoder reads of a scene, without the scene."""
    lengths = np.array([rows * columns for rows, columns in grids])
    patches = np.random.default_rng(0).standard_normal((int(lengths.sum()), patch_values), dtype=np.float32)
    bounds = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
    boxes = np.zeros((len(grids), 4), np.float32)
    return PackedScene(patches, bounds, np.array(grids, np.int32), boxes, cast("Any", None), 0, {})


def encode_tiles(backend: Any, tiles: PackedScene) -> None:
    """The vision encoder alone."""
    if isinstance(backend, NativeBackend):
        backend.forget()
        backend._encode_levels(tiles)
        return
    with torch.inference_mode():
        patches = torch.from_numpy(tiles.patches).to(torch.bfloat16)
        backend.model.vision_encoder(patches, torch.from_numpy(tiles.cu_seqlens), torch.from_numpy(tiles.grids))


def prefill(backend: Any, tokens: int) -> None:
    """One prompt of words."""
    forget(backend)
    vocabulary = backend.config.language.vocab_size
    ids = np.random.default_rng(tokens).integers(0, vocabulary, tokens).astype(np.int32)
    backend.prefill([Prompt(ids)], tokens)


def verifying_step(backend: NativeBackend, tokens: int) -> Call:
    """One step of `tokens` tokens of one row, which nothing accepts: it can be run again."""
    vocabulary = cast("Any", backend.config.language).vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, CONTEXT).astype(np.int32)
    _, cache = backend.prefill([Prompt(ids)], CONTEXT + tokens)
    return lambda: backend.decode_drafts(cache, [ids[:tokens].tolist()])


def calls_of(backend: Any, grids: list[tuple[int, int]]) -> dict[str, Call]:
    """What is timed, by name."""
    vision = backend.config.vision
    side = backend.config.preprocess.tile_px // vision.patch_size
    scenes = {
        "encode 1 tile": [(side, side)],
        f"encode {TILES} tiles": [(side, side)] * TILES,
        f"encode {TILES} mixed tiles, packed": grids,
        f"encode {TILES} mixed tiles, padded": [(SIDES[1], SIDES[1])] * TILES,
    }
    calls: dict[str, Call] = {}
    for tokens in (80, 320):
        calls[f"prefill {tokens} tokens"] = functools.partial(prefill, backend, tokens)
    for name, chosen in scenes.items():
        calls[name] = functools.partial(encode_tiles, backend, random_tiles(chosen, 3 * vision.patch_size**2))
    if isinstance(backend, NativeBackend):
        for tokens in (1, 2, 4, 8):
            calls[f"step of {tokens} tokens"] = verifying_step(backend, tokens)
    return calls


def speed_rows(models: dict[str, RSVLM], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per backend and measure."""
    clock, grids = CLOCKS[options.clock], mixed_grids()
    calls = {name: calls_of(model.backend, grids) for name, model in models.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for round_index in range(options.rounds + 1):
        for name, measures in calls.items():
            for measure, call in measures.items():
                for _ in range(options.steps if measure.startswith("step") else 1):
                    start = clock()
                    call()
                    if round_index > 0:  # the first round pages weights in
                        seconds.setdefault((name, measure), []).append(clock() - start)
    median = {key: statistics.median(found) for key, found in seconds.items()}
    rows = []
    for (name, measure), found in median.items():
        baseline = median.get((BASELINE, measure), float("nan"))
        note = ""
        if measure.endswith("padded"):
            note = f"packed {found / median[name, measure.replace('padded', 'packed')]:.2f} times faster"
        elif measure.startswith("step"):
            note = f"{found / median[name, 'step of 1 tokens']:.2f} times a step of one token"
        rows.append(row_of(options, name, measure, found * 1e3, round(baseline / found, 2), note))
    return rows


def load_row(options: argparse.Namespace, name: str, package: Path) -> dict[str, Any]:
    """A new process loads the package, whose file the system has cached, and captions the image."""
    command = [sys.executable, "-m", "benchmarks.package_load", str(package), str(options.image)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    note = f"peak RSS of one caption {found['peak_rss_mb']:.0f} MB, {found['imported_rss_mb']:.0f} MB of it before loading"
    seconds = found["load_cpu_s" if options.clock == "cpu" else "load_s"]
    return row_of(options, name, "load", seconds * 1e3, float("nan"), note)


def row_of(
    options: argparse.Namespace, name: str, measure: str, milliseconds: float, times_eager: float, note: str
) -> dict[str, Any]:
    """One row of the CSV file."""
    return {
        **about(options),
        "backend": name,
        "measure": measure,
        "milliseconds": round(milliseconds, 3),
        "times_eager_bf16": times_eager,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="captioned by the process whose memory is measured")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--packages", type=Path, help="folder of packages by precision; missing ones are made there")
    parser.add_argument("--precisions", nargs="+", choices=KIND_PRECISIONS["native"], default=list(KIND_PRECISIONS["native"]))
    parser.add_argument("--without-eager", action="store_true", help="the packages alone: eager takes most of a run's time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of each number of tokens in a round")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu = CPU time of the one thread")
    parser.add_argument("--csv", type=Path, help="appended to; the screen alone when left out")
    options = parser.parse_args()
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu counts one thread; set OMP_NUM_THREADS=1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        models = {} if options.without_eager else {BASELINE: RSVLM.from_pretrained(options.checkpoint, "eager", "bfloat16")}
        for precision in options.precisions:
            if not (folder / precision).is_dir():
                export_native(options.checkpoint, folder / precision, precision)
            models[f"native {precision}"] = RSVLM.from_pretrained(folder / precision)
        rows = speed_rows(models, options)
        rows += [load_row(options, f"native {precision}", folder / precision) for precision in options.precisions]
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items() if key not in ("date", "machine")), flush=True)
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    main()
