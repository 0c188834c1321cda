"""Guesses of the next tokens: from what was already said (prompt, answer so far, texts that came with the request), or from a table
of what the model tends to say.

Owns the look-up, how sure a guess is, and the count of guesses that came true. Knows token ids only; the model decides what is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.draft_table import START, DraftTable

LONGEST_MATCH = 3  # tokens that must agree before a guess, tried from long to short; one alone guesses wrong too often
SHORTEST_MATCH = 2
TRIAL_PROMISED = (
    4.0  # after guesses that promised so many tokens, a row goes on only when half of them came: it speaks of other things
)
LEAST_KEPT = 0.5


@dataclass
class DraftCounts:
    """Guessed tokens, how many of them the model chose too, and steps of the model that checked guesses.

    `all_steps` and `all_tokens` are those of decode with and without guesses: one token per row and step without.
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    all_steps: int = 0  # of rows: a step of three rows counts three
    all_tokens: int = 0

    def record(self, rows: int, drafted: int, accepted: int) -> None:
        """One step of `rows` rows."""
        self.drafted += drafted
        self.accepted += accepted
        self.steps += drafted > 0
        self.all_steps += rows
        self.all_tokens += rows + accepted

    @property
    def acceptance(self) -> float:
        """Share of guesses that came true; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gets from one step of decode; 1 without guesses."""
        return self.all_tokens / self.all_steps if self.all_steps else 1.0


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow; `chances` are those that a token and all before it come true, so they fall."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def first(self, count: int) -> Draft:
        """Its first `count` tokens."""
        return Draft(self.tokens[:count], self.chances[:count])

    def before(self, ends: Sequence[int]) -> Draft:
        """What comes before the first end token: a row that ends needs no step after it."""
        return self.first(next((place for place, token in enumerate(self.tokens) if token in ends), len(self.tokens)))


class Drafter:
    """Guesses for one row: what followed the last tokens when they last stood somewhere, or what follows them in the table.

    A look-up is as sure as this row's look-ups were, with one of each kind before the first; the surer of look-up and table is taken.
    """

    def __init__(self, prompt: Sequence[int], hints: Sequence[Sequence[int]] = (), table: DraftTable | None = None) -> None:
        """hints: token ids of texts whose words the answer may use, for example retrieved cues. table: of the model's own answers."""
        self._texts: list[list[int]] = []
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}  # tokens -> text and place behind them
        self._table = table
        self._answer = [START]
        self._looked_up = False  # whether the last guess was
        self._tried = self._true = 0  # guesses of look-ups, up to the first wrong one of a step
        self._promised = self._kept = 0.0
        for hint in hints:
            self._begin(hint)
        self._begin([token for token in prompt if token >= 0])  # placeholders of images are no words

    def _begin(self, tokens: Sequence[int]) -> None:
        self._texts.append([])
        for token in tokens:
            self._append(int(token))

    def _append(self, token: int) -> None:
        """The place before a token becomes known only with the token, so a row never finds its own end."""
        text = self._texts[-1]
        for length in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            if len(text) >= length:
                self._places[tuple(text[-length:])] = (len(self._texts) - 1, len(text))
        text.append(token)

    def add(self, token: int) -> None:
        """One more token of the answer."""
        self._append(token)
        self._answer.append(token)

    def guess(self, count: int) -> Draft:
        """Up to `count` tokens that may follow; none when nothing is known or guesses keep failing."""
        if count < 1 or (self._promised >= TRIAL_PROMISED and self._kept < LEAST_KEPT * self._promised):
            return Draft()
        looked_up, known = self._look_up(count), self._from_table(count)
        self._looked_up = bool(looked_up.tokens) and looked_up.chances[0] >= (known.chances or (0.0,))[0]
        return looked_up if self._looked_up else known

    def _look_up(self, count: int) -> Draft:
        own = self._texts[-1]
        for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            found = self._places.get(tuple(own[-length:])) if len(own) >= length else None
            if found is not None:
                text, place = found
                tokens = tuple(self._texts[text][place : place + count])
                each = (self._true + 1) / (self._tried + 2)
                return Draft(tokens, tuple(each**power for power in range(1, len(tokens) + 1)))
        return Draft()

    def _from_table(self, count: int) -> Draft:
        """A chain: what follows the answer, what follows that, ..."""
        answer, chance = list(self._answer), 1.0
        chances: list[float] = []
        while self._table is not None and len(chances) < count:
            found = self._table.follow(answer)
            if found is None:
                break
            answer.append(found[0])
            chance *= found[1]
            chances.append(chance)
        return Draft(tuple(answer[len(self._answer) :]), tuple(chances))

    def record(self, checked: Draft, accepted: int) -> None:
        """How much of the last guess was checked by the model, and how many of its tokens came true."""
        self._promised += sum(checked.chances)
        self._kept += accepted
        if self._looked_up:
            self._tried += min(accepted + 1, len(checked.tokens))
            self._true += accepted
