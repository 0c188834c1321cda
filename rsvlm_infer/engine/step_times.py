"""Owns what a step costs by the tokens that it feeds, as measured while answers are made, and how many guesses pay at that price.

Knows no token and no model. Where a step is bound by reading weights, four tokens cost what one costs; where it is bound by arithmetic,
a wrong guess is paid for. Which of the two holds depends on precision, kernels, threads and machine, so it is measured and not assumed.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence

ASSUMED_SLOPE = 0.2  # before a count was timed: the share of a single step that each further token adds
KEPT_TIMES = 8  # of each count; the fastest counts, because other work only ever adds
FORGET_STEPS = 256  # a time that is older says little: the machine may have been busy then, and the count is to be tried again


class StepTimes:
    """Processor seconds of steps by the number of tokens that they feed, all rows together.

    Args:
        learn: False keeps to the assumed slope, so that the same requests make the same guesses on any machine.
    """

    def __init__(self, *, learn: bool = True) -> None:
        self._learn = learn
        self._times: dict[int, deque[tuple[int, float]]] = {}
        self._steps = 0

    def record(self, tokens: int, seconds: float) -> None:
        """One step."""
        if self._learn:
            self._steps += 1
            self._times.setdefault(tokens, deque(maxlen=KEPT_TIMES)).append((self._steps, seconds))

    def prices(self, most: int) -> list[float]:
        """What steps of 0 to `most` tokens cost, in one unit; they never fall, because a longer step does all that a shorter one does."""
        known = {
            tokens: min(fresh)
            for tokens, times in self._times.items()
            if (fresh := [seconds for step, seconds in times if step > self._steps - FORGET_STEPS])
        }
        for shorter, longer in reversed(list(itertools.pairwise(sorted(known)))):
            known[shorter] = min(known[shorter], known[longer])
        return [_price(known, tokens) for tokens in range(most + 1)]

    def worth(self, rows: int, chances: Sequence[float]) -> int:
        """How many guesses to check beside the `rows` tokens that are certain: as many as give most tokens for the time.

        chances: those of the guesses, of all rows, the best first.
        """
        prices = self.prices(rows + len(chances))
        expected, best, most = float(rows), 0, rows / prices[rows] if prices[rows] else math.inf
        for count, chance in enumerate(chances, start=1):
            expected += chance
            if expected > most * prices[rows + count]:
                best, most = count, expected / prices[rows + count]
        return best


def _price(known: dict[int, float], tokens: int) -> float:
    """Seconds of a step: timed, or from the nearest count that was, between those of the counts below and above."""
    if not known:
        return _assumed(tokens)
    nearest = min(known, key=lambda count: (abs(count - tokens), count))
    least = max((seconds for count, seconds in known.items() if count <= tokens), default=0.0)
    most = min((seconds for count, seconds in known.items() if count >= tokens), default=math.inf)
    return min(max(known[nearest] * _assumed(tokens) / _assumed(nearest), least), most)


def _assumed(tokens: int) -> float:
    return 1 + ASSUMED_SLOPE * (tokens - 1)
