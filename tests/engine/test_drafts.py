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
from rsvlm_infer.engine.drafts import TRIAL_PROMISED, Draft, Drafter
from rsvlm_infer.engine.step_times import StepTimes
from rsvlm_infer.models.draft_table import START, DraftTable
from tests.native import needs_native


def test_guesses_what_followed_the_last_tokens() -> None:
    drafter = Drafter([-200, 1, 2, 3], [(7, 8, 9, 10, 11, 12)])
    assert drafter.guess(3) == Draft()  # (2, 3) stands at the end only
    drafter.add(8)
    drafter.add(9)
    assert drafter.guess(3).tokens == (10, 11, 12)
    assert drafter.guess(1).tokens == (10,)
    assert drafter.guess(0) == Draft()
    for token in (5, 1, 2):
        drafter.add(token)
    assert drafter.guess(2).tokens == (3, 8)  # its own prompt and answer are one text


def test_the_longest_and_then_the_latest_match_wins() -> None:
    drafter = Drafter([], [(1, 2, 3, 4), (9, 2, 3, 5), (2, 3, 6)])
    for token in (1, 2, 3):
        drafter.add(token)
    assert drafter.guess(1).tokens == (4,)
    other = Drafter([], [(1, 2, 3, 4), (9, 2, 3, 5), (2, 3, 6)])
    for token in (8, 2, 3):
        other.add(token)
    assert other.guess(1).tokens == (6,)


def test_a_look_up_is_as_sure_as_look_ups_were() -> None:
    drafter = Drafter([1, 2, 3, 4, 1, 2])
    assert drafter.guess(2).chances == (1 / 2, 1 / 4)
    drafter.record(drafter.guess(2), 2)  # both came true
    assert drafter.guess(2).chances == (3 / 4, 9 / 16)
    drafter.record(drafter.guess(2), 0)  # the first was wrong; nobody knows about the second
    assert drafter.guess(1).chances == (3 / 5,)


def test_the_table_continues_the_answer_and_only_the_answer() -> None:
    table = DraftTable({(START, 5): (6, 0.8), (5, 6): (7, 0.5), (2,): (9, 0.9)})
    drafter = Drafter([1, 5], table=table)
    assert drafter.guess(3) == Draft()
    drafter.add(5)
    guess = drafter.guess(3)
    assert guess.tokens == (6, 7)
    assert guess.chances == pytest.approx((0.8, 0.4))
    assert Drafter([2], table=table).guess(3) == Draft()  # a prompt is not what the model said


def test_the_surer_of_look_up_and_table_is_taken() -> None:
    table = DraftTable({(2,): (9, 0.6), (4,): (9, 0.4)})
    drafter = Drafter([1, 2, 3], [(3, 4, 5)], table)
    for token in (1, 2):
        drafter.add(token)
    assert drafter.guess(1) == Draft((9,), (0.6,))
    for token in (3, 4):
        drafter.add(token)
    assert drafter.guess(1) == Draft((5,), (0.5,))


def test_a_draft_ends_before_its_end_token() -> None:
    draft = Draft((4, 5, 0, 6), (0.9, 0.8, 0.7, 0.6))
    assert draft.before((0,)) == Draft((4, 5), (0.9, 0.8))
    assert draft.before(()) == draft
    assert draft.first(1) == Draft((4,), (0.9,))


def test_stops_when_guesses_keep_failing() -> None:
    drafter = Drafter([1, 2, 3, 1, 2])
    promise = Draft((3,), (TRIAL_PROMISED,))
    drafter.record(promise, 2)
    assert drafter.guess(1).tokens == (3,)  # half of what was promised
    drafter.record(Draft((3,), (0.5,)), 0)
    assert drafter.guess(1) == Draft()


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
            engine = Engine(backend, step_times=StepTimes(learn=False))
            found, reasons = _tokens(engine, requests)
            assert found == [plain[i][: plain[i].index(stops[i]) + 1] for i in rows]
            assert reasons == ["stop_id"] * len(rows)
            counts.append(engine.drafts)
        drafted, accepted = sum(each.drafted for each in counts), sum(each.accepted for each in counts)
        assert 0 < accepted < drafted
        assert sum(each.steps for each in counts) > 0
        shares.append(accepted / drafted)
    assert shares[0] > max(0.5, shares[1])
    # a table of the answers guesses without any hint; one of other words changes nothing either
    tables = [DraftTable.from_answers([[*answer, 299] for answer in texts], 4) for texts in (plain, wrong)]
    gains = []
    for table in tables:
        engine = Engine(backend, draft_table=table, step_times=StepTimes(learn=False))
        assert _tokens(engine, [Request(ids, max_new_tokens=40) for ids in prompts])[0] == plain
        assert engine.drafts.all_tokens == sum(len(answer) - 1 for answer in plain)
        gains.append(engine.drafts.tokens_per_step)
    assert gains[0] > max(1.2, gains[1])
    sampled = [
        Request(prompts[1], max_new_tokens=30, temperature=0.7, seed=5, hints=hint) for hint in ((), tuple(map(tuple, plain)))
    ]
    assert _tokens(Engine(backend, draft_tokens=0), sampled[:1]) == _tokens(Engine(backend), sampled[1:])


def test_a_backend_without_drafts_gets_none() -> None:
    from tests.engine.fake_backend import FakeBackend

    backend = FakeBackend()
    assert not isinstance(backend, DraftingBackend)
    engine = Engine(backend, draft_table=DraftTable({(1,): (2, 1.0)}))
    assert _tokens(engine, [Request(np.array([1, 2, 1, 2, 1], np.int32), max_new_tokens=4)])[1] == ["length"]
    assert (engine.drafts.drafted, engine.drafts.all_steps, engine.drafts.tokens_per_step) == (0, 3, 1.0)
