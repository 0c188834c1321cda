"""One token from one row of logits."""

from __future__ import annotations

import numpy as np
import pytest

from rsvlm_infer.engine.sampling import choose_token, log_softmax
from rsvlm_infer.errors import BackendError


def draw(logits: list[float], temperature: float, top_p: float, seed: int, allowed: list[int] | None = None) -> int:
    ids = None if allowed is None else np.array(allowed)
    return choose_token(np.array(logits, dtype=np.float32), temperature, top_p, np.random.default_rng(seed), ids)


def test_log_softmax_matches_hand_values() -> None:
    logits = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]], dtype=np.float32))
    expected = np.log(np.array([[1 / 8, 2 / 8, 5 / 8], [0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-7)


def test_log_softmax_survives_large_logits() -> None:
    np.testing.assert_allclose(log_softmax(np.array([1e30, 1e30], dtype=np.float32)), np.log([0.5, 0.5]))


@pytest.mark.parametrize(("logits", "expected"), [([1, 3, 2], 1), ([5, 5, 5], 0), ([0, 7, 7], 1), ([-np.inf, -2, -3], 1)])
def test_greedy_takes_the_best_and_the_lowest_id_on_ties(logits: list[float], expected: int) -> None:
    assert draw(logits, 0.0, 1.0, seed=3) == expected


def test_greedy_draws_nothing() -> None:
    generator = np.random.default_rng(5)
    choose_token(np.array([0.0, 1.0], dtype=np.float32), 0.0, 1.0, generator)
    assert generator.random() == np.random.default_rng(5).random()


def test_sampling_follows_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.2, 0.3])
    generator = np.random.default_rng(0)
    logits = np.log(probabilities).astype(np.float32)
    counts = np.bincount([choose_token(logits, 1.0, 1.0, generator) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, probabilities, atol=0.03)


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.6, 0.4], dtype=np.float32))
    generator = np.random.default_rng(0)
    cold = np.mean([choose_token(logits, 0.25, 1.0, generator) for _ in range(2000)])
    assert cold == pytest.approx(0.4**4 / (0.4**4 + 0.6**4), abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = list(np.log([0.5, 0.2, 0.3]))
    assert {draw(logits, 1.0, 0.5, seed) for seed in range(50)} == {0}
    assert {draw(logits, 1.0, 0.51, seed) for seed in range(50)} == {0, 2}
    assert {draw(logits, 1.0, 1.0, seed) for seed in range(50)} == {0, 1, 2}


def test_top_p_breaks_ties_by_lowest_id() -> None:
    assert {draw([1.0, 1.0, 1.0, 1.0], 1.0, 0.5, seed) for seed in range(50)} == {0, 1}


def test_allowed_ids_are_the_only_candidates() -> None:
    logits = [9.0, 1.0, 2.0, 2.0]
    assert draw(logits, 0.0, 1.0, 0, allowed=[1, 2, 3]) == 2
    assert {draw(logits, 1.0, 1.0, seed, allowed=[1, 3]) for seed in range(40)} == {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_overflowed_are_an_error(bad: float) -> None:
    with pytest.raises(BackendError, match="try float32"):
        draw([0.0, bad, 1.0], 0.0, 1.0, 0)


def test_logits_that_are_all_forbidden_are_an_error() -> None:
    with pytest.raises(BackendError, match="finite"):
        draw([-np.inf, -np.inf], 1.0, 1.0, 0)
