"""Guesses from what was said: where they come from, that they change nothing, and how they are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.backends.base import DraftingBackend
from rsvlm_infer.engine import Engine, Request
from rsvlm_infer.engine.drafts import TRIAL_TOKENS, Drafter
from tests.native import needs_native


def test_guesses_what_followed_the_last_tokens() -> None:
    drafter = Drafter([-200, 1, 2, 3], [(7, 8, 9, 10, 11, 12)])
    assert drafter.guess(3) == ()  # (2, 3) stands at the end only
    drafter.add(8)
    drafter.add(9)
    assert drafter.guess(3) == (10, 11, 12)
    assert drafter.guess(1) == (10,)
    assert drafter.guess(0) == ()
    for token in (5, 1, 2):
        drafter.add(token)
    assert drafter.guess(2) == (3, 8)  # its own prompt and answer are one text


def test_the_longest_and_then_the_latest_match_wins() -> None:
    drafter = Drafter([], [(1, 2, 3, 4), (9, 2, 3, 5), (2, 3, 6)])
    for token in (1, 2, 3):
        drafter.add(token)
    assert drafter.guess(1) == (4,)
    other = Drafter([], [(1, 2, 3, 4), (9, 2, 3, 5), (2, 3, 6)])
    for token in (8, 2, 3):
        other.add(token)
    assert other.guess(1) == (6,)


def test_stops_when_guesses_keep_failing() -> None:
    drafter = Drafter([1, 2, 3, 1, 2])
    assert drafter.guess(1) == (3,)
    drafter.record(TRIAL_TOKENS, TRIAL_TOKENS // 3)
    assert drafter.guess(1) == (3,)
    drafter.record(1, 0)
    assert drafter.guess(1) == ()


def _tokens(engine: Engine, requests: Sequence[Request]) -> tuple[list[list[int]], list[Any]]:
    found: list[list[int]] = [[] for _ in requests]
    reasons: list[Any] = [None] * len(requests)
    for event in engine.generate(requests):
        assert reasons[event.request_index] is None  # nothing comes after the last event
        found[event.request_index].append(event.token_id)
        reasons[event.request_index] = event.finish_reason
    return found, reasons


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_answers_with_guesses_are_the_same_answers(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("torch", reason="packages are made with torch")
    from rsvlm_infer.backends.native import NativeBackend
    from tests.backends.native_packages import CONFIG, write_package

    language = dataclasses.replace(CONFIG.language, hidden_size=64, intermediate_size=96)
    backend = NativeBackend.load(write_package(tmp_path, dataclasses.replace(CONFIG, language=language), precision)[1])
    assert isinstance(backend, DraftingBackend)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 300, n).astype(np.int32) for n in (5, 30, 12)]
    plain, _ = _tokens(Engine(backend, draft_tokens=0), [Request(ids, max_new_tokens=40) for ids in prompts])
    stops = [max(answer, key=answer.index) for answer in plain]  # the word that comes last for the first time
    # the answer itself as a hint, once as it is and once with wrong words in it: most and some of the guesses come true
    wrong = [[token if place % 7 else 299 - token for place, token in enumerate(answer)] for answer in plain]
    shares = []
    for hints in (plain, wrong):
        counts = []
        for rows in ((0,), (1,), (0, 1), (0, 1, 2)):
            requests = [Request(prompts[i], max_new_tokens=40, hints=(tuple(hints[i]),), stop_ids=(stops[i],)) for i in rows]
            engine = Engine(backend)
            found, reasons = _tokens(engine, requests)
            assert found == [plain[i][: plain[i].index(stops[i]) + 1] for i in rows]
            assert reasons == ["stop_id"] * len(rows)
            counts.append(engine.drafts)
        drafted, accepted = sum(each.drafted for each in counts), sum(each.accepted for each in counts)
        assert 0 < accepted < drafted
        assert sum(each.steps for each in counts) > 0
        shares.append(accepted / drafted)
    assert shares[0] > max(0.5, shares[1])
    sampled = [
        Request(prompts[1], max_new_tokens=30, temperature=0.7, seed=5, hints=hint) for hint in ((), tuple(map(tuple, plain)))
    ]
    assert _tokens(Engine(backend, draft_tokens=0), sampled[:1]) == _tokens(Engine(backend), sampled[1:])


def test_a_backend_without_drafts_gets_none() -> None:
    from tests.engine.fake_backend import FakeBackend

    backend = FakeBackend()
    assert not isinstance(backend, DraftingBackend)
    assert _tokens(Engine(backend), [Request(np.array([1, 2, 1, 2, 1], np.int32), max_new_tokens=4)])[1] == ["length"]
