"""Owns the trie of allowed answers for constrained decoding. Knows only token ids."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError


class ChoiceNode:
    """What may follow one prefix: token id -> node; `complete` when the prefix itself is a choice."""

    __slots__ = ("children", "complete")

    def __init__(self) -> None:
        self.children: dict[int, ChoiceNode] = {}
        self.complete = False


class ChoiceTrie:
    """Allowed token sequences.

    Raises:
        InputError: no choices, an empty choice, or two choices with the same tokens.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        if len(choices) == 0:
            raise InputError("choices must hold at least one token sequence, got none; pass the allowed answers")
        self.root = ChoiceNode()
        self.longest = max(len(choice) for choice in choices)
        self.needs_end = False  # some choice begins with another one, so an end token has to tell them apart
        for index, choice in enumerate(choices):
            if len(choice) == 0:
                raise InputError(f"choice {index} must hold at least one token, got none; remove empty choices")
            node = self.root
            for token_id in choice:
                self.needs_end |= node.complete
                node = node.children.setdefault(int(token_id), ChoiceNode())
            if node.complete:
                raise InputError(f"choices must differ in their tokens, got choice {index} twice; remove the repeated one")
            node.complete = True
            self.needs_end |= bool(node.children)
