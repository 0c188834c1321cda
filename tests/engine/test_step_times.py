"""How many guesses pay: by assumption at first, by what steps took afterwards."""

from __future__ import annotations

import pytest

from rsvlm_infer.engine.step_times import ASSUMED_SLOPE, FORGET_STEPS, KEPT_TIMES, StepTimes


def _timed(seconds: dict[int, float]) -> StepTimes:
    times = StepTimes()
    for tokens, each in seconds.items():
        times.record(tokens, each)
    return times


def test_before_any_step_a_further_token_costs_a_share_of_the_first() -> None:
    assert StepTimes().prices(3) == pytest.approx([1 - ASSUMED_SLOPE, 1, 1 + ASSUMED_SLOPE, 1 + 2 * ASSUMED_SLOPE])
    assert StepTimes().worth(1, [0.9, 0.8]) == 2
    assert StepTimes().worth(1, [0.1, 0.05]) == 0
    assert StepTimes().worth(1, []) == 0


def test_free_tokens_are_all_taken_and_dear_ones_are_not() -> None:
    chances = [0.4, 0.2, 0.1]
    assert _timed({1: 1.0, 4: 1.0}).worth(1, chances) == 3
    assert _timed({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}).worth(1, chances) == 0
    assert _timed({1: 1.0, 2: 1.0, 3: 1.6, 4: 1.7}).worth(1, chances) == 1  # where steps come in pairs
    assert (
        _timed({1: 1.0, 2: 1.3, 3: 1.3, 4: 1.3}).worth(1, [0.29, 0.28, 0.27]) == 3
    )  # over a stair that one guess does not pay


def test_rows_are_counted_with_their_guesses() -> None:
    times = _timed({4: 1.0, 5: 1.1})
    assert times.worth(4, [0.5]) == 1  # 4.5 / 1.1 > 4 / 1
    assert times.worth(4, [0.3]) == 0


def test_the_fastest_of_the_last_times_counts() -> None:
    times = StepTimes()
    for seconds in (9.0, 1.0, 9.0):
        times.record(2, seconds)
    assert times.prices(2)[2] == 1.0
    for _ in range(KEPT_TIMES):
        times.record(2, 5.0)
    assert times.prices(2)[2] == 5.0


def test_a_longer_step_is_never_cheaper_than_a_shorter_one() -> None:
    assert _timed({1: 3.0, 2: 2.0, 3: 4.0, 4: 1.0}).prices(4)[1:] == [1.0] * 4  # the slow ones were disturbed


def test_an_old_time_is_forgotten() -> None:
    times = _timed({2: 100.0})
    for _ in range(FORGET_STEPS - 1):
        times.record(1, 1.0)
    assert times.prices(2)[2] == 100.0
    times.record(1, 1.0)
    assert times.prices(2)[2] == pytest.approx(1 + ASSUMED_SLOPE)


def test_without_learning_nothing_is_timed() -> None:
    times = StepTimes(learn=False)
    times.record(2, 100.0)
    assert times.prices(2) == StepTimes().prices(2)
