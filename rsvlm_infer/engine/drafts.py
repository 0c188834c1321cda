"""Guesses of the next tokens from what was already said: the prompt, the answer so far, and texts that came with the request.

Owns the look-up and the count of guesses that came true. Knows token ids only; the model decides what is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_MATCH = 3  # tokens that must agree before a guess, tried from long to short; one alone guesses wrong too often
SHORTEST_MATCH = 2
TRIAL_TOKENS = 12  # after so many guesses a row goes on only when a third came true: less does not pay for the larger step
LEAST_ACCEPTED = 1 / 3


@dataclass
class DraftCounts:
    """Guessed tokens, how many of them the model chose too, and steps of the model that checked guesses."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0

    def record(self, drafted: int, accepted: int) -> None:
        """One step."""
        self.drafted += drafted
        self.accepted += accepted
        self.steps += 1

    @property
    def acceptance(self) -> float:
        """Share of guesses that came true; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Drafter:
    """Guesses for one row: what followed the last two or three tokens when they last stood somewhere."""

    def __init__(self, prompt: Sequence[int], hints: Sequence[Sequence[int]] = ()) -> None:
        """hints: token ids of texts whose words the answer may use, for example retrieved cues."""
        self._texts: list[list[int]] = []
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}  # tokens -> text and place behind them
        self._drafted = self._accepted = 0
        for hint in hints:
            self._begin(hint)
        self._begin([token for token in prompt if token >= 0])  # placeholders of images are no words

    def _begin(self, tokens: Sequence[int]) -> None:
        self._texts.append([])
        for token in tokens:
            self.add(int(token))

    def add(self, token: int) -> None:
        """One more token of the answer. The place before it becomes known only now, so a row never finds its own end."""
        text = self._texts[-1]
        for length in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            if len(text) >= length:
                self._places[tuple(text[-length:])] = (len(self._texts) - 1, len(text))
        text.append(token)

    def guess(self, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may follow; none when nothing is known or guesses keep failing."""
        if self._drafted >= TRIAL_TOKENS and self._accepted < LEAST_ACCEPTED * self._drafted:
            return ()
        own = self._texts[-1]
        for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            found = self._places.get(tuple(own[-length:])) if len(own) >= length else None
            if found is not None:
                text, place = found
                return tuple(self._texts[text][place : place + max(count, 0)])
        return ()

    def record(self, drafted: int, accepted: int) -> None:
        """How the last guess fared."""
        self._drafted += drafted
        self._accepted += accepted
