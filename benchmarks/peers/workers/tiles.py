"""The vision encoder's works, the same for every peer: tiles, what is timed, and how near it comes. Knows no peer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

Encode = Callable[[F32, F32], F32]  # patches [T, N, P], positions [N, D] -> states [T, N, D]
Padded = Callable[[F32, F32, npt.NDArray[np.int64]], F32]  # patches [T, N, P], positions [T, N, D], lengths [T] -> [T, N, D]


class Tiles:
    """Uniform and mixed tiles as every encoder takes them."""

    def __init__(self, inputs: Path) -> None:
        """Reads what tiles there are; their pixels and states only when a work asks, so that captioning is not charged for them."""
        self.inputs = inputs
        described = json.loads((inputs / "tiles.json").read_text(encoding="utf-8"))
        self.uniform_grid: tuple[int, int] = tuple(described["uniform"])
        self.grids: list[tuple[int, int]] = [(rows, columns) for rows, columns in described["mixed"]]
        self.lengths = np.array([rows * columns for rows, columns in self.grids], dtype=np.int64)
        self.bounds = np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def uniform(self) -> F32:
        """[T, N, P]; as many as there are mixed ones."""
        return self._read("uniform")

    @cached_property
    def mixed(self) -> F32:
        """[S, P], tiles one after another."""
        return self._read("mixed")

    @cached_property
    def expected_uniform(self) -> F32:
        """[T, N, D]."""
        return self._read("expected_uniform")

    @cached_property
    def expected_mixed(self) -> F32:
        """[S, D]."""
        return self._read("expected_mixed")

    @cached_property
    def positions(self) -> dict[tuple[int, int], F32]:
        """[N, D] by grid."""
        return {grid: self._read(f"positions_{grid[0]}x{grid[1]}") for grid in {*self.grids, self.uniform_grid}}

    def _read(self, name: str) -> F32:
        values: F32 = np.load(self.inputs / f"{name}.npy")
        return values

    def rows(self, tile: int) -> slice:
        """The mixed tile's rows of patches."""
        return slice(self.bounds[tile], self.bounds[tile + 1])

    def in_buckets(self, encode: Encode) -> F32:
        """Mixed tiles, those of one grid together: [S, D]."""
        out = np.empty_like(self.expected_mixed)
        for grid in dict.fromkeys(self.grids):
            tiles = [tile for tile, own in enumerate(self.grids) if own == grid]
            states = encode(np.stack([self.mixed[self.rows(tile)] for tile in tiles]), self.positions[grid])
            for tile, state in zip(tiles, states, strict=True):
                out[self.rows(tile)] = state
        return out

    def padded(self, encode: Padded) -> F32:
        """Mixed tiles as one batch as long as the longest: [S, D]."""
        longest = int(self.lengths.max())
        patches = np.zeros((len(self.grids), longest, self.mixed.shape[1]), np.float32)
        positions = np.zeros((len(self.grids), longest, self.expected_mixed.shape[1]), np.float32)
        for tile, grid in enumerate(self.grids):
            patches[tile, : self.lengths[tile]] = self.mixed[self.rows(tile)]
            positions[tile, : self.lengths[tile]] = self.positions[grid]
        states = encode(patches, positions, self.lengths)
        return np.concatenate([states[tile, :length] for tile, length in enumerate(self.lengths)])


def tile_works(tiles: Tiles, encode: Encode, padded: Padded | None = None) -> dict[str, Callable[[int], dict[str, Any]]]:
    """`tile x1`, `tile x32`, `mixed tiles` in buckets and, when the peer has it, `mixed padded`."""
    every = f"tile x{len(tiles.grids)}"

    def uniform(first: int, last: int) -> F32:
        return encode(tiles.uniform[first:last], tiles.positions[tiles.uniform_grid])

    def one(round_index: int) -> int:
        return round_index % len(tiles.grids)

    works = {
        "tile x1": timed(
            "tile x1", lambda index: uniform(one(index), one(index) + 1), lambda index: tiles.expected_uniform[one(index)][None]
        ),
        every: timed(every, lambda _: uniform(0, len(tiles.grids)), lambda _: tiles.expected_uniform),
        "mixed tiles": timed("mixed tiles", lambda _: tiles.in_buckets(encode), lambda _: tiles.expected_mixed),
    }
    if padded is not None:
        pads = padded
        works["mixed padded"] = timed("mixed padded", lambda _: tiles.padded(pads), lambda _: tiles.expected_mixed)
    return works


def timed(name: str, run: Callable[[int], F32], expected: Callable[[int], F32]) -> Callable[[int], dict[str, Any]]:
    """A work that times `run` and says how near its states come to eager float32."""

    def work(round_index: int) -> dict[str, Any]:
        reference = expected(round_index)
        started = time.perf_counter()
        states = run(round_index)
        seconds = time.perf_counter() - started
        return {"seconds": {name: seconds}, "cosine": cosine(states, reference)}

    return work


def cosine(found: F32, expected: F32) -> float:
    """Of all states as one vector."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
