"""Buckets: they cover every dynamic axis of every contract, without gaps, and engines know TensorRT's limits before it does."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.export.packages import CONFIGS  # skips without torch, onnx, onnxruntime

# isort: split
from rsvlm_export.tensorrt.profiles import Range, profiles, tile_buckets, token_buckets
from rsvlm_infer.contract import KINDS, graph_contracts
from rsvlm_infer.errors import ConfigError

CONTEXT = 300


@pytest.mark.parametrize("name", CONFIGS)
def test_every_axis_of_every_graph_has_a_range(name: str) -> None:
    config = CONFIGS[name]
    for contract in graph_contracts(config, "tensorrt", "fp16", CONTEXT).values():
        for profile in profiles(config, contract, CONTEXT):
            assert all(
                0 <= each.least <= each.best <= each.most for each in [*profile.axes.values(), *profile.scalars.values()]
            )
            for item in contract.inputs:
                least, best, most = profile.shapes(item)
                assert len(least) == len(best) == len(most) == len(item.shape)
                fixed = [axis for axis in item.shape if isinstance(axis, int)]
                assert [side for side, axis in zip(best, item.shape, strict=True) if isinstance(axis, int)] == fixed


def test_buckets_follow_one_another_without_gap() -> None:
    config = CONFIGS["full"]
    assert tile_buckets(config) == (4, 16, 64)
    assert tile_buckets(CONFIGS["llava"]) == (64,)
    assert token_buckets(CONTEXT) == (1, 128, CONTEXT)
    assert token_buckets(1024) == (1, 128, 512, 1024)
    contracts = graph_contracts(config, "tensorrt", "fp16", CONTEXT)
    for graph, axis, last in (("vision", "P", 64), ("decoder", "N", CONTEXT)):
        ranges = [profile.axes[axis] for profile in profiles(config, contracts[graph], CONTEXT)]
        assert (ranges[0].least, ranges[-1].most) == (1, last)
        assert all(before.most + 1 == after.least for before, after in itertools.pairwise(ranges))


def test_a_call_takes_every_scene_that_the_config_plans() -> None:
    """DRIS's most tiles, and LLaVA-NeXT's largest canvas with its base tile and newlines."""
    for name, tiles in (("full", 12), ("llava_next", 5 if CONFIGS["llava_next"].dris.max_tiles < 5 else 12)):
        config = CONFIGS[name]
        contract = graph_contracts(config, "tensorrt", "fp16", CONTEXT)["bridge"]
        (profile,) = profiles(config, contract, CONTEXT)
        assert profile.axes["T"] == Range(1, tiles // 4, tiles)
        assert profile.axes["U"].most == tiles + 1
        assert profile.axes["S"].most == tiles * 64
        assert profile.axes["Nv"].most == tiles * (64 + 8)
    wide = dataclasses.replace(CONFIGS["llava_next"], grid_pinpoints=((32, 32 * 20),))
    (profile,) = profiles(wide, graph_contracts(wide, "tensorrt", "fp16", CONTEXT)["bridge"], CONTEXT)
    assert profile.axes["T"].most == 21


@pytest.mark.parametrize("context", [1, 513])
def test_a_context_without_positions_is_refused(context: int) -> None:
    config = CONFIGS["full"]
    contract = graph_contracts(config, "tensorrt", "fp16", context)["decoder"]
    with pytest.raises(ConfigError, match=rf"context must be between 2 and the model's 512 positions, got {context}"):
        profiles(config, contract, context)


def test_engines_are_a_kind_of_package_with_its_own_decoder() -> None:
    assert "tensorrt" in KINDS
    onnx, engines = graph_contracts(CONFIGS["full"]), graph_contracts(CONFIGS["full"], "tensorrt", "bf16", CONTEXT)
    assert set(onnx) == set(engines)
    caches = [item for item in engines["decoder"].inputs if item.name.startswith("past_")]
    assert {(item.dtype, item.shape) for item in caches} == {("bfloat16", ("B", 2, CONTEXT, 16))}
    assert "places" in {item.name for item in engines["vision"].inputs} - {item.name for item in onnx["vision"].inputs}
