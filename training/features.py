"""Step 1: run the frozen vision encoder over RSICD once and keep what the later steps read. Resumable by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from rich.progress import track

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.evaluation.datasets import CaptionedImage
from rsvlm_infer.layers.alignment import most_salient
from rsvlm_infer.layers.vision_encoder import VisionEncoder
from rsvlm_infer.ops.registry import resolve

from .dataset import read_rgb


@torch.inference_mode()
def compute_features(
    encoder: VisionEncoder, config: RsvlmConfig, records: list[CaptionedImage], folder: Path, *, salient: int, batch_images: int
) -> None:
    """Base-tile features: tokens [n, g², Dv] of tap 2, objects [n, k, Dv] of tap 0, regions [n, Dv] of tap 1, fp16."""
    grid, width = config.tile_grid, config.vision.hidden_size
    shapes = {"tokens": (grid * grid, width), "objects": (salient, width), "regions": (width,)}
    arrays, done_path = _open_arrays(folder, len(records), shapes)
    done = int(done_path.read_text()) if done_path.exists() else 0
    for start in track(range(done, len(records), batch_images), description=f"features {folder.name}"):
        batch = [read_rgb(record.path) for record in records[start : start + batch_images]]
        taps = _encode(encoder, config, batch, np.full((len(batch), 2), grid))
        tokens = [tap.view(len(batch), grid * grid, width) for tap in taps]
        rows = slice(start, start + len(batch))
        arrays["tokens"][rows] = tokens[2].float().numpy()
        arrays["regions"][rows] = tokens[1].float().mean(dim=1).numpy()
        arrays["objects"][rows] = torch.stack([most_salient(tile.float(), salient) for tile in tokens[0]]).numpy()
        for array in arrays.values():
            array.flush()
        done_path.write_text(str(start + len(batch)))


@torch.inference_mode()
def compute_leaf_features(
    encoder: VisionEncoder,
    config: RsvlmConfig,
    records: list[CaptionedImage],
    folder: Path,
    *,
    leaf_grid: int,
    batch_images: int,
) -> None:
    """Features [n, 4, leaf_grid², Dv] of each image's four quadrants, so that plans with leaves are in distribution."""
    width = config.vision.hidden_size
    arrays, done_path = _open_arrays(folder, len(records), {"leaves": (4, leaf_grid * leaf_grid, width)})
    done = int(done_path.read_text()) if done_path.exists() else 0
    for start in track(range(done, len(records), batch_images), description=f"features {folder.name}"):
        batch = [read_rgb(record.path) for record in records[start : start + batch_images]]
        quadrants = [quadrant for image in batch for quadrant in _quadrants(image)]
        tap = _encode(encoder, config, quadrants, np.full((len(quadrants), 2), leaf_grid))[2]
        arrays["leaves"][start : start + len(batch)] = tap.view(len(batch), 4, leaf_grid * leaf_grid, width).float().numpy()
        arrays["leaves"].flush()
        done_path.write_text(str(start + len(batch)))


def _quadrants(image: np.ndarray) -> list[np.ndarray]:
    middle_row, middle_column = image.shape[0] // 2, image.shape[1] // 2
    top, bottom = image[:middle_row], image[middle_row:]
    return [half[:, part] for half in (top, bottom) for part in (slice(None, middle_column), slice(middle_column, None))]


def _open_arrays(folder: Path, rows: int, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.memmap], Path]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, shape in shapes.items():
        path = folder / f"{name}.npy"
        arrays[name] = open_memmap(path, mode="r+" if path.exists() else "w+", dtype=np.float16, shape=(rows, *shape))
    return arrays, folder / "done"


def _encode(encoder: VisionEncoder, config: RsvlmConfig, images: list[np.ndarray], grids: np.ndarray) -> list[torch.Tensor]:
    patch = config.vision.patch_size
    pack_tiles = resolve("pack_tiles")
    patches = pack_tiles(
        images,
        grids * patch,
        np.zeros_like(grids),
        grids,
        patch,
        np.asarray(config.preprocess.mean, np.float32),
        np.asarray(config.preprocess.std, np.float32),
        config.preprocess.resample,
        np.asarray(config.preprocess.pad_value, np.uint8),
    )
    cu_seqlens = torch.tensor([0, *np.cumsum(grids.prod(axis=1))], dtype=torch.int32)
    taps, _ = encoder(torch.from_numpy(patches), cu_seqlens, torch.from_numpy(grids))
    return taps
