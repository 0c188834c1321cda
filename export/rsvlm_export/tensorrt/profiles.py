"""Which shapes an engine takes: optimisation profiles on tile and token buckets, for the dynamic axes of a graph's contract. Pure data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import (
    ALIGN,
    BRIDGE,
    CUE_SEARCH,
    DECODER,
    TEXT_EMBED,
    VISION,
    WORD_EMBED,
    GraphContract,
    TensorContract,
    cue_names,
)
from rsvlm_infer.errors import ConfigError

CONTEXT = 1024  # places of a cache row: 512 visual tokens, a question and an answer
ROWS = 8  # of one decoder or text call
TILES_PER_CALL = 64  # of one call of the vision encoder
QUERY_TOKENS = 256
ENTRIES = 1 << 20  # of the knowledge base, in the graph cue_search
RESULTS = 256  # and what it may return; TensorRT sorts at most 3840
TOKEN_BUCKETS = (128, 512)  # lengths of prompts, up to the context


@dataclass(frozen=True)
class Range:
    """Of one axis: what an engine takes, and what it is tuned for."""

    least: int
    best: int
    most: int


Axes = dict[str, Range]


@dataclass(frozen=True)
class Profile:
    """One bucket: the range of each letter of a contract. `scalars`: of inputs whose value sizes an output."""

    axes: Axes
    scalars: Axes

    def shapes(self, item: TensorContract) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, best and most shape of one input."""
        ranges = [Range(axis, axis, axis) if isinstance(axis, int) else self.axes[axis] for axis in item.shape]
        return tuple(each.least for each in ranges), tuple(each.best for each in ranges), tuple(each.most for each in ranges)


def profiles(config: RsvlmConfig, contract: GraphContract, context: int) -> tuple[Profile, ...]:
    """The profiles of one graph, smallest bucket first.

    Args:
        context: places of a cache row.

    Raises:
        ConfigError: a context that the model has no positions for.
    """
    makers: dict[str, Callable[[RsvlmConfig, int], list[Axes]]] = {
        VISION: _vision,
        ALIGN: _scene,
        BRIDGE: _scene,
        TEXT_EMBED: _texts,
        WORD_EMBED: _words,
        DECODER: _decoder,
        CUE_SEARCH: _search,
    }
    scalars = {"k": Range(1, 5, RESULTS)} if contract.name == CUE_SEARCH else {}
    return tuple(Profile(axes, scalars) for axes in makers[contract.name](config, context))


def tile_buckets(config: RsvlmConfig) -> tuple[int, ...]:
    """Patches of the tiles that the config can plan, ascending."""
    grids = {config.tile_grid, *(config.dris.leaf_grids if config.tiling == "dris" else ())}
    return tuple(sorted(grid * grid for grid in grids))


def token_buckets(context: int) -> tuple[int, ...]:
    """Longest prompts of the decoder's profiles, ascending; the first is a step of one token."""
    return (1, *(length for length in TOKEN_BUCKETS if length < context), context)


def _tiles(config: RsvlmConfig) -> int:
    """Most tiles of one scene, in any tiling that the config allows."""
    side = config.preprocess.tile_px
    grids = [1 + (height // side) * (width // side) for height, width in config.grid_pinpoints or ()]
    return max(config.dris.max_tiles, *grids) if grids else config.dris.max_tiles


def _tiled(tiles: Range, longest: Range) -> Axes:
    patches = Range(1, tiles.best * longest.best, tiles.most * longest.most)
    return {"T": tiles, "U": Range(*(value + 1 for value in (tiles.least, tiles.best, tiles.most))), "P": longest, "S": patches}


def _vision(config: RsvlmConfig, context: int) -> list[Axes]:
    """One for each length of tile: the backend gives tiles of like lengths to one call."""
    borders = (0, *tile_buckets(config))
    tiles = Range(1, 8, max(TILES_PER_CALL, _tiles(config)))
    return [_tiled(tiles, Range(before + 1, longest, longest)) for before, longest in itertools.pairwise(borders)]


def _scene(config: RsvlmConfig, context: int) -> list[Axes]:
    """One scene with all of its tiles."""
    longest, most = tile_buckets(config)[-1], _tiles(config)
    axes = _tiled(Range(1, max(1, most // 4), most), Range(1, longest, longest))
    if config.alignment is not None:
        k = config.alignment.salient_patches
        axes["k"] = Range(1, min(k, tile_buckets(config)[0]), k)
    if config.augmentation is not None:
        cues = config.augmentation.cues_per_level
        axes |= {f"K_{name}": Range(0, cues, cues) for name in cue_names()} | {"Q": Range(0, 16, QUERY_TOKENS)}
    if config.grid_pinpoints:
        newlines = most * config.tile_grid  # fewer than a row of every tile
        tokens = axes["S"]
        axes["Nv"] = Range(1, tokens.best, tokens.most + newlines)
    return [axes]


def _texts(config: RsvlmConfig, context: int) -> list[Axes]:
    longest = config.text_encoder.max_positions if config.text_encoder is not None else 1
    return [{"B": Range(1, 1, ROWS), "N": Range(1, max(1, longest // 2), longest)}]


def _words(config: RsvlmConfig, context: int) -> list[Axes]:
    return [{"N": Range(1, min(128, context), ROWS * context)}]


def _search(config: RsvlmConfig, context: int) -> list[Axes]:
    assert config.alignment is not None
    visual = _tiles(config) * config.alignment.salient_patches
    return [{"V": Range(1, min(8, visual), visual), "M": Range(1, 4096, ENTRIES)}]


def _decoder(config: RsvlmConfig, context: int) -> list[Axes]:
    """A step, then one for each bucket of prompts."""
    assert config.language is not None
    if not 2 <= context <= config.language.max_positions:
        raise ConfigError(
            f"context must be between 2 and the model's {config.language.max_positions} positions, got {context}; choose another one"
        )
    rows, buckets = Range(1, 1, ROWS), token_buckets(context)
    steps = [{"B": rows, "N": Range(1, 1, 1)}]
    return steps + [{"B": rows, "N": Range(before + 1, most, most)} for before, most in itertools.pairwise(buckets)]
