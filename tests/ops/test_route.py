"""Routing against a plain Python loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from rsvlm_infer.ops.route import route


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
