"""The language model's works, the same for every peer: prompts from the inputs folder, and what is timed. Knows no peer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEW_TOKENS = 24
PROMPT = 84
PREFILLS = (80, 320)

Prefill = Callable[[list[int]], int]  # forgets everything, reads a prompt, gives the first new token
Decode = Callable[[int, int], list[int]]  # feeds that token, then its own choices: so many more tokens


def prompt_tokens(inputs: Path, tokens: int, round_index: int) -> list[int]:
    """`tokens` ids of a text that begins elsewhere in each round and work, so that no peer can reuse what it kept of the last one."""
    text: list[int] = json.loads((inputs / "text.json").read_text(encoding="utf-8"))
    start = (tokens + 7 * round_index) % len(text)
    turned = text[start:] + text[:start]
    return (turned * (tokens // len(turned) + 1))[:tokens]


def text_works(inputs: Path, prefill: Prefill, decode: Decode) -> dict[str, Callable[[int], dict[str, Any]]]:
    """`prefill N` for each length, and `answer`: a prompt and its continuation, which gives `answer` and `decode` (per token)."""

    def prefill_work(tokens: int, round_index: int) -> dict[str, Any]:
        ids = prompt_tokens(inputs, tokens, round_index)
        started = time.perf_counter()
        prefill(ids)
        return {"seconds": {f"prefill {tokens}": time.perf_counter() - started}}

    def answer_work(round_index: int) -> dict[str, Any]:
        ids = prompt_tokens(inputs, PROMPT, round_index)
        started = time.perf_counter()
        first = prefill(ids)
        begun = time.perf_counter()
        rest = decode(first, NEW_TOKENS - 1)
        ended = time.perf_counter()
        return timed_answer(ended - started, (ended - begun) / (NEW_TOKENS - 1), [first, *rest])

    works: dict[str, Callable[[int], dict[str, Any]]] = {}
    for tokens in PREFILLS:
        works[f"prefill {tokens}"] = lambda round_index, tokens=tokens: prefill_work(tokens, round_index)  # type: ignore[misc]
    return works | {"answer": answer_work}


def timed_answer(whole: float, per_token: float, tokens: Sequence[int]) -> dict[str, Any]:
    """The answer of the work `answer`."""
    return {"seconds": {"answer": whole, "decode": per_token}, "tokens": [int(token) for token in tokens]}
