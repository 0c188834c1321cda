"""Routing in Triton against the eager definition: integers equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.triton import route as twin
from rsvlm_infer.kernels.triton.route import route
from rsvlm_infer.ops.route import route as eager
from tests.kernels.triton_cases import EPSILON, prefix_sums, random_tensor
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits


def _check(logits: torch.Tensor, level_offsets: torch.Tensor, k: int) -> None:
    actual, expected = route(logits, level_offsets, k), eager(logits, level_offsets, k)
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1])
    reference = eager(logits.cpu().float(), level_offsets.cpu(), k)[2]
    assert actual[2].dtype == torch.float32
    assert_parity(actual[2], expected[2], reference, epsilon=4 * EPSILON[torch.float32])  # exp and one division


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [
        ((1, 0, 0), 12, 2),
        ((1, 1, 1), 3, 1),  # groups of one
        ((7, 0, 13), 12, 2),
        ((5, 5, 5), 6, 2),  # k = experts of the group
        (AWKWARD_LENGTHS[1:], 12, 4),
        ((300,), 1, 1),  # E = 1
        ((65,), 5, 3),
        ((33, 40), 128, 8),
    ],
)
def test_awkward_groups(tokens: tuple[int, ...], experts: int, k: int, device: torch.device) -> None:
    _check(random_tensor(0, sum(tokens), experts, device=device), prefix_sums(list(tokens), device), k)


def test_ties_go_to_the_lowest_expert(device: torch.device) -> None:
    logits = torch.randint(0, 2, (200, 12), generator=torch.Generator().manual_seed(0)).float().to(device)
    _check(logits, prefix_sums([70, 65, 65], device), 3)
    _check(torch.zeros(50, 12, device=device), prefix_sums([20, 10, 20], device), 2)


def test_infinities_and_other_groups(device: torch.device) -> None:
    logits = random_tensor(1, 40, 6, device=device)
    logits[:, 1] = -torch.inf
    logits[3, :3] = torch.tensor([0.0, -torch.inf, -torch.inf])
    logits[:20, 3:] = torch.inf
    logits[20:, :3] = torch.nan
    _check(logits, prefix_sums([20, 20], device), 2)


def test_nan_reaches_the_weights_and_nothing_else(device: torch.device) -> None:
    logits = random_tensor(1, 10, 4, device=device)
    logits[4, 2] = torch.nan
    offsets, permutation, weights = route(logits, prefix_sums([10], device), 2)
    assert weights.isnan().any(dim=1).nonzero().flatten().tolist() == [4]
    assert sorted(permutation.tolist()) == list(range(20))
    assert int(offsets[-1]) == 20


def test_many_blocks_per_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(twin, "COUNTS_AT_ONCE", 2)
    monkeypatch.setattr(twin, "tokens_per_block", lambda experts: 16)
    _check(random_tensor(2, 151, 6, device=device), prefix_sums([50, 51, 50], device), 2)


def test_no_token(device: torch.device) -> None:
    expert_offsets, permutation, weights = route(torch.zeros((0, 6), device=device), prefix_sums([0, 0, 0], device), 2)
    assert expert_offsets.tolist() == [0] * 7
    assert permutation.numel() == 0
    assert weights.shape == (0, 2)


@given(
    tokens=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    group=st.integers(1, 9),
    k=st.integers(1, 9),
    values=st.sampled_from([2, 5, 1000]),
    half=st.booleans(),
)
@settings(max_examples=40)
def test_drawn_shapes(device: torch.device, tokens: list[int], group: int, k: int, values: int, half: bool) -> None:
    shape = (sum(tokens), group * len(tokens))
    logits = (
        torch.randint(0, values, shape, generator=torch.Generator().manual_seed(values)).float() / 7
    )  # few values: many ties
    _check(logits.to(device, torch.float16 if half else torch.float32), prefix_sums(tokens, device).long(), min(k, group))


@pytest.mark.gpu
def test_twenty_runs_give_the_same_bits(device: torch.device) -> None:
    logits, offsets = random_tensor(0, 6000, 12, device=device), prefix_sums([2000, 2000, 2000], device)
    first = route(logits, offsets, 2)
    for _ in range(20):
        for one, other in zip(route(logits, offsets, 2), first, strict=True):
            assert_same_bits(one, other)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(InputError, match="multiple of 3 columns"):
        route(torch.zeros(4, 7, device=device), prefix_sums([1, 1, 2], device), 1)
    with pytest.raises(InputError, match="k of route must be 1 to 2"):
        route(torch.zeros(4, 6, device=device), prefix_sums([1, 1, 2], device), 3)
