"""Owns the way from token ids to shown text: stop strings across token borders, and outer blanks. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from ..text.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Decodes one answer as its tokens come.

    Text is released only when no later token can take it back: a tail that may begin a stop string, or that is blank and may
    be the end, is held. So the pieces from `take` always join to the final `text`, which has no outer blanks.
    `stops` must not hold an empty string; `GenerationSettings` checks that.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self._taken = 0

    def accept(self, token_id: int) -> bool:
        """Adds one token; True once a stop string is complete."""
        self._extend(self._decoder.push(token_id))
        return self.stopped

    def finish(self) -> None:
        """No more tokens: releases what was held, without trailing blanks."""
        self._extend(self._decoder.finish())
        self._release(len(self._held))
        self._held = ""

    def take(self) -> str:
        """The text released since the last call."""
        piece = self.text[self._taken :]
        self._taken = len(self.text)
        return piece

    def _extend(self, piece: str) -> None:
        if self.stopped:
            return
        self._held += piece
        found = [position for position in (self._held.find(stop) for stop in self._stops) if position >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            self._release(len(self._held))
        else:
            self._release(len(self._held) - self._open_tail())

    def _open_tail(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> None:
        body = self._held[:length].rstrip()
        self._held = self._held[len(body) :]
        self.text += body if self.text else body.lstrip()
