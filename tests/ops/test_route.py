"""Routing against a plain Python loop over tokens, the native twin against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.route import route as native
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.route import route
from tests.native import needs_native, threads
from tests.parity import assert_parity, assert_same_bits


def _by_hand(logits: list[list[float]], level_offsets: list[int], k: int) -> tuple[list[list[int]], list[list[float]]]:
    levels = len(level_offsets) - 1
    group = len(logits[0]) // levels
    chosen, weights = [], []
    for token, row in enumerate(logits):
        level = next(place for place in range(levels) if level_offsets[place] <= token < level_offsets[place + 1])
        own = range(level * group, (level + 1) * group)
        picked = sorted(own, key=lambda expert: (-row[expert], expert))[:k]
        exponents = [math.exp(row[expert] - row[picked[0]]) for expert in picked]
        chosen.append(picked)
        weights.append([value / sum(exponents) for value in exponents])
    return chosen, weights


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [((1, 1, 1), 3, 1), ((7, 0, 13), 12, 2), ((5, 5, 5), 6, 2), ((64, 65, 3), 12, 4)]
)
def test_equals_a_loop_over_tokens(tokens: tuple[int, ...], experts: int, k: int) -> None:
    offsets = [0, tokens[0], tokens[0] + tokens[1], sum(tokens)]
    logits = torch.randn((sum(tokens), experts), generator=torch.Generator().manual_seed(0))
    expert_offsets, permutation, weights = route(logits, torch.tensor(offsets), k)
    chosen, expected = _by_hand(logits.tolist(), offsets, k)
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert expert_offsets.dtype == permutation.dtype == torch.int32
    for expert in range(experts):
        own = permutation[expert_offsets[expert] : expert_offsets[expert + 1]].tolist()
        assert own == [token * k + slot for token, row in enumerate(chosen) for slot, pick in enumerate(row) if pick == expert]


def test_ties_go_to_the_lowest_expert() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0, 2.0, 2.0]])
    expert_offsets, permutation, weights = route(logits, torch.tensor([0, 1, 2]), 2)
    assert expert_offsets.tolist() == [0, 1, 2, 2, 3, 4, 4]
    assert permutation.tolist() == [0, 1, 2, 3]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_group_of_one_is_the_level_itself() -> None:
    logits = torch.randn((6, 3), generator=torch.Generator().manual_seed(1))
    expert_offsets, permutation, weights = route(logits, torch.tensor([0, 2, 4, 6]), 1)
    assert expert_offsets.tolist() == [0, 2, 4, 6]
    assert permutation.tolist() == [0, 1, 2, 3, 4, 5]
    assert (weights == 1).all()


def test_logits_of_other_groups_do_not_matter() -> None:
    logits = torch.randn((4, 6), generator=torch.Generator().manual_seed(2))
    loud = logits.clone()
    loud[:2, 3:] = 1e9
    loud[2:, :3] = float("inf")
    for one, other in zip(route(logits, torch.tensor([0, 2, 4]), 2), route(loud, torch.tensor([0, 2, 4]), 2), strict=True):
        assert torch.equal(one, other)


def test_no_token() -> None:
    expert_offsets, permutation, weights = route(torch.zeros((0, 6)), torch.tensor([0, 0, 0, 0]), 2)
    assert expert_offsets.tolist() == [0] * 7
    assert permutation.numel() == 0
    assert weights.shape == (0, 2)


def _levels(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _same_route(logits: torch.Tensor, level_offsets: torch.Tensor, k: int) -> None:
    actual, eager = native(logits, level_offsets, k), route(logits, level_offsets, k)
    assert_same_bits(actual[0], eager[0])
    assert_same_bits(actual[1], eager[1])
    reference = route(logits.double(), level_offsets, k)  # its weights are float32 too: one rounding of exact logits
    assert_parity(actual[2], eager[2], reference[2], epsilon=2.0**-23)


@needs_native
@settings(max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 13, 64, 65]), min_size=1, max_size=4),
    group=st.integers(1, 9),
    k=st.integers(1, 9),
    coarse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_native_is_eager(lengths: list[int], group: int, k: int, coarse: bool, dtype: torch.dtype) -> None:
    logits = torch.randn((sum(lengths), group * len(lengths)), generator=torch.Generator().manual_seed(group))
    if coarse:
        logits = logits.round()  # many ties
    _same_route(logits.to(dtype), _levels(lengths), min(k, group))


@needs_native
def test_native_ranks_nan_and_infinity_as_eager_does() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, nan, inf], [-inf, -inf, -inf], [inf, inf, 0.0], [nan, nan, -inf], [-0.0, 0.0, -1.0]])
    for k in (1, 2, 3):
        actual, eager = native(logits, torch.tensor([0, 5]), k), route(logits, torch.tensor([0, 5]), k)
        for one, other in zip(actual, eager, strict=True):
            assert_same_bits(one, other)


@needs_native
def test_native_gives_the_same_bits_always() -> None:
    lengths, experts, k = [3000, 0, 5000], 48, 3
    logits = torch.randn((sum(lengths), experts), generator=torch.Generator().manual_seed(3))
    first = native(logits, _levels(lengths), k)
    for run in range(20):
        with threads(1 + run % 3):
            for one, other in zip(native(logits, _levels(lengths), k), first, strict=True):
                assert_same_bits(one, other)
    alone = native(logits[7:8], torch.tensor([0, 1, 1, 1]), k)
    assert_same_bits(alone[2], first[2][7:8])


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    logits = torch.zeros((4, 6))
    for arguments, message in (
        ((logits, torch.tensor([0, 2, 4]), 4), "k must be in 1..3, the experts of one level, got 4"),
        ((logits, torch.tensor([0, 2, 4]), 0), "k must be in 1..3, the experts of one level, got 0"),
        ((logits, torch.tensor([0, 1, 2, 3, 4]), 1), "experts must be a positive multiple of levels, got 6 and 4"),
        ((logits, torch.tensor([0, 5]), 1), "level_offsets must rise from 0 to 4 tokens, got an end of 5"),
        ((logits, torch.tensor([0, 3, 2, 4]), 1), "level_offsets must rise"),
        ((logits[0], torch.tensor([0, 4]), 1), r"logits must be \[N, E\]"),
    ):
        with pytest.raises(InputError, match=message):
            native(*arguments)
    assert resolve("route", "native") is native
    expert_offsets, permutation, weights = native(logits[:0], torch.tensor([0, 0, 0]), 2)
    assert expert_offsets.tolist() == [0] * 7
    assert (permutation.shape, weights.shape) == ((0,), (0, 2))
