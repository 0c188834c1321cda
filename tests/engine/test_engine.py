"""The generation loop on a model whose tokens are known by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rsvlm_infer.backends.base import GreedyBackend, ImageFeatures, Prompt
from rsvlm_infer.engine import Engine, Request, TokenEvent
from rsvlm_infer.engine.choices import ChoiceTrie
from rsvlm_infer.errors import InputError
from tests.engine.fake_backend import EOS, IMAGE, VOCAB, FakeBackend, GreedyFakeBackend, fake_config


def request(*ids: int, **changes: Any) -> Request:
    return Request(np.array(ids, dtype=np.int32), **({"stop_ids": (EOS,)} | changes))


def tokens(events: list[TokenEvent], index: int) -> list[int]:
    return [event.token_id for event in events if event.request_index == index]


def test_greedy_walks_to_the_stop_id() -> None:
    events = list(Engine(FakeBackend()).generate([request(9, 4)]))
    assert tokens(events, 0) == [5, 6, 7, EOS]
    assert [event.finish_reason for event in events] == [None, None, None, "stop_id"]
    assert [event.finished for event in events] == [False, False, False, True]
    assert all(event.step_ms > 0 for event in events)


def test_length_stops_and_one_token_needs_no_decode() -> None:
    backend = FakeBackend()
    events = list(Engine(backend).generate([request(1, max_new_tokens=1)]))
    assert (tokens(events, 0), events[0].finish_reason, backend.decodes) == ([2], "length", [])


def test_a_batch_gives_each_request_what_it_gets_alone_and_drops_finished_rows() -> None:
    requests = [request(9, 9, 5), request(1), request(3, 2, max_new_tokens=2), request(6)]
    backend = FakeBackend()
    events = list(Engine(backend).generate(requests))
    for index, each in enumerate(requests):
        assert tokens(events, index) == tokens(list(Engine(FakeBackend()).generate([each])), 0)
    assert [tokens(events, index) for index in range(4)] == [[6, 7, 0], [2, 3, 4, 5, 6, 7, 0], [3, 4], [7, 0]]
    assert backend.prefills == [4]
    assert backend.decodes == [4, 2, 1, 1, 1, 1]  # rows 2 and 3 end at the second token, row 0 at the third


def test_more_requests_than_a_batch_run_one_batch_after_the_other() -> None:
    backend = FakeBackend()
    events = list(Engine(backend, max_batch=2).generate([request(5), request(6), request(7)]))
    assert [tokens(events, index) for index in range(3)] == [[6, 7, 0], [7, 0], [0]]
    assert backend.prefills == [2, 1]


def outcome(events: list[TokenEvent]) -> list[tuple[int, int, str | None]]:
    return [(event.request_index, event.token_id, event.finish_reason) for event in events]


def test_greedy_requests_take_ids_from_a_backend_that_chooses() -> None:
    seen: list[int] = []

    def requests() -> list[Request]:
        watched = request(1, on_token=lambda token_id: bool(seen.append(token_id)) or token_id == 4)
        return [request(9, 9, 5), watched, request(3, 2, max_new_tokens=2), request(6, seed=3, top_p=0.5)]

    backend, plain = GreedyFakeBackend(), FakeBackend()
    assert isinstance(backend, GreedyBackend)
    assert not isinstance(plain, GreedyBackend)
    events = list(Engine(backend).generate(requests()))
    watched, seen[:] = list(seen), []
    assert outcome(events) == outcome(list(Engine(plain).generate(requests())))
    assert watched == seen == [2, 3, 4]
    assert all(event.step_ms > 0 for event in events)
    assert (backend.decodes, backend.chosen, plain.decodes) == ([], [4, 2], [4, 2])


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"allowed": ((2, 3), (2, 4)), "max_new_tokens": 2}])
def test_a_batch_with_another_kind_of_request_takes_logits_until_that_one_ends(other: dict[str, Any]) -> None:
    requests = [request(3), request(1, **({"max_new_tokens": 3} | other))]
    backend = GreedyFakeBackend()
    events = list(Engine(backend).generate(requests))
    assert tokens(events, 0) == [4, 5, 6, 7, EOS]
    assert tokens(events, 1) == tokens(list(Engine(FakeBackend()).generate([requests[1]])), 0)
    together = len(tokens(events, 1)) - 1
    assert backend.decodes == [2] * together
    assert backend.chosen == [1] * (4 - together)


class Clock:
    """A monotonic clock that moves only when told, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_later_group_says_how_long_it_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill takes 2 s and a decode step 1 s: [6 7 0] and [7 0] end after 2 + 1 + 1 s, and only then the third one starts."""
    clock, backend = Clock(), FakeBackend()
    monkeypatch.setattr("time.perf_counter", clock)
    prefill, decode = backend.prefill, backend.decode

    def slow_prefill(*arguments: Any) -> Any:
        clock.now += 2
        return prefill(*arguments)

    def slow_decode(*arguments: Any) -> Any:
        clock.now += 1
        return decode(*arguments)

    monkeypatch.setattr(backend, "prefill", slow_prefill)
    monkeypatch.setattr(backend, "decode", slow_decode)
    events = list(Engine(backend, max_batch=2).generate([request(5), request(6), request(7)]))
    assert [(event.request_index, event.queue_ms, event.step_ms) for event in events] == [
        (0, 0.0, 2000.0),
        (1, 0.0, 2000.0),
        (0, 0.0, 1000.0),
        (1, 0.0, 1000.0),
        (0, 0.0, 1000.0),
        (2, 4000.0, 2000.0),
    ]


def test_no_requests_is_no_work() -> None:
    backend = FakeBackend()
    assert list(Engine(backend).generate([])) == []
    assert backend.prefills == []


def test_on_token_stops_a_row_and_never_sees_the_stop_id() -> None:
    seen: list[int] = []

    def watch(token_id: int) -> bool:
        seen.append(token_id)
        return token_id == 6

    events = list(Engine(FakeBackend()).generate([request(3, on_token=watch), request(5, on_token=lambda _: False)]))
    assert (tokens(events, 0), seen) == ([4, 5, 6], [4, 5, 6])
    assert [event.finish_reason for event in events if event.finished] == ["stop_text", "stop_id"]


def script(*steps: dict[int, float]) -> list[list[float]]:
    """Logits of each step from the probabilities of a few ids."""
    rows = []
    for step in steps:
        row = np.full(VOCAB, -30.0)
        row[list(step)] = np.log(list(step.values()))
        rows.append(row.tolist())
    return rows


def test_a_seed_fixes_the_draws_whatever_the_batch() -> None:
    steps = script(*[{1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}] * 12)
    backend = FakeBackend(scripts={20: steps, 21: steps})
    sampled = {"temperature": 1.0, "max_new_tokens": 12}
    alone = tokens(list(Engine(backend).generate([request(20, seed=7, **sampled)])), 0)
    again = [request(21, seed=1, **sampled), request(20, seed=7, **sampled), request(20, seed=8, **sampled)]
    events = list(Engine(backend).generate(again))
    assert tokens(events, 1) == alone
    assert tokens(events, 2) != alone
    assert tokens(events, 0) != alone


def test_constrained_choice_follows_the_trie() -> None:
    """Token 9 would win everywhere; [4, 5] and [4, 6, 2] are all that is allowed."""
    steps = script({9: 0.9, 3: 0.05, 4: 0.05}, {9: 0.9, 5: 0.04, 6: 0.06}, {9: 0.9, 2: 0.1})
    events = list(Engine(FakeBackend(scripts={20: steps})).generate([request(20, allowed=((4, 5), (4, 6, 2), (7,)))]))
    assert (tokens(events, 0), events[-1].finish_reason) == ([4, 6, 2], "choice")


@pytest.mark.parametrize(("end", "more", "expected"), [(0.2, 0.1, [4, EOS]), (0.1, 0.2, [4, 5])])
def test_a_choice_that_begins_another_ends_with_the_end_token(end: float, more: float, expected: list[int]) -> None:
    steps = script({4: 1.0}, {EOS: end, 5: more, 9: 0.7})
    events = list(Engine(FakeBackend(scripts={20: steps})).generate([request(20, allowed=((4,), (4, 5)))]))
    assert tokens(events, 0) == expected
    assert events[-1].finish_reason == ("stop_id" if expected[-1] == EOS else "choice")


def test_score_choices_is_the_mean_log_probability() -> None:
    steps = script({4: 0.5, 7: 0.25, 9: 0.25}, {5: 0.125, 6: 0.5, 9: 0.375}, {2: 1.0})
    choices = [(4, 5), (4, 6, 2), (7,), (4,)]
    expected = [
        (np.log(0.5) + np.log(0.125)) / 2,
        (np.log(0.5) + np.log(0.5)) / 3,
        np.log(0.25),
        np.log(0.5),
    ]
    for max_batch, prefills in ((16, 1), (1, 4), (3, 2)):
        backend = FakeBackend(scripts={20: steps})
        scores = Engine(backend, max_batch).score_choices(Prompt(np.array([20, 8], dtype=np.int32)), choices)
        np.testing.assert_allclose(scores.log_probs, expected, atol=1e-6)
        assert backend.prefills == [1] * prefills
        assert scores.prefill_ms > 0
        assert scores.decode_ms > 0


def test_score_choices_shares_the_rows_of_equal_beginnings() -> None:
    backend = FakeBackend(scripts={20: script(*[{1: 0.5, 2: 0.5}] * 3)})
    Engine(backend).score_choices(Prompt(np.array([20], dtype=np.int32)), [(1, 1, 1), (1, 1, 2), (1, 2), (2,)])
    assert backend.decodes == [1, 1]  # after 1, and after 1 1


def image(num_tokens: int) -> ImageFeatures:
    return ImageFeatures(None, num_tokens)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(IMAGE, 3, images=(image(2),)), r"request 0: image placeholders must equal the visual tokens 2, got 1"),
        (request(3, IMAGE), r"visual tokens 0, got 1"),
        (request(3, VOCAB), r"token_ids must be in 0..31, got 3..32"),
        (request(3, -5), r"got -5..3"),
        (request(*[1] * 124, max_new_tokens=5), r"need 129 positions, but the model has 128; lower max_visual_tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_runs(bad: Request, message: str) -> None:
    backend = FakeBackend()
    with pytest.raises(InputError, match=message):
        Engine(backend).generate([bad])
    assert backend.prefills == []


def test_a_prompt_may_fill_the_context_exactly() -> None:
    events = list(Engine(FakeBackend()).generate([request(*[1] * 124, max_new_tokens=4)]))
    assert tokens(events, 0) == [2, 3, 4, 5]


def test_a_model_without_language_cannot_generate() -> None:
    config = fake_config(language=None, projector=None, alignment=None)
    with pytest.raises(InputError, match="no language model"):
        Engine(FakeBackend(config)).generate([request(1)])


def test_score_choices_refuses_ids_out_of_the_vocabulary() -> None:
    with pytest.raises(InputError, match=r"choices must be in 0..31, got 1..99"):
        Engine(FakeBackend()).score_choices(Prompt(np.array([1], dtype=np.int32)), [(1,), (99,)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a finite number"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, got 2.5 \(float\); pass an int"),
        ({"max_new_tokens": True}, r"max_new_tokens must be a whole number, got True \(bool\)"),
        ({"temperature": "0"}, r"temperature must be a number, got '0' \(str\); pass a float"),
        ({"top_p": None}, r"top_p must be a number, got None \(NoneType\)"),
        ({"seed": 1.0}, "seed must be a whole number, got 1.0"),
        ({"allowed": ()}, "choices must hold at least one"),
        ({"allowed": ((1,), ())}, "choice 1 must hold at least one token"),
        ({"allowed": ((1, 2), (1, 2))}, "choice 1 twice"),
        ({"allowed": ((1, 2, 3),), "max_new_tokens": 2}, "longest choice of 3 tokens, got 2"),
        ({"allowed": ((1,), (1, 2)), "stop_ids": ()}, "stop_ids must hold an end token"),
        ({"allowed": ((1, 2), (1,)), "stop_ids": ()}, "stop_ids must hold an end token"),
    ],
)
def test_settings_out_of_range_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        request(1, **changes)


def test_an_empty_prompt_and_a_matrix_are_refused() -> None:
    for ids in (np.zeros(0, np.int32), np.zeros((1, 3), np.int32)):
        with pytest.raises(InputError, match="non-empty vector"):
            Request(ids)


def test_max_batch_is_checked() -> None:
    with pytest.raises(InputError, match="max_batch must be at least 1, got 0"):
        Engine(FakeBackend(), max_batch=0)
    with pytest.raises(InputError, match=r"max_batch must be a whole number, got 1.5 \(float\)"):
        Engine(FakeBackend(), max_batch=1.5)  # type: ignore[arg-type]


def test_trie_knows_when_an_end_token_is_needed() -> None:
    assert not ChoiceTrie([(1, 2), (1, 3)]).needs_end
    assert ChoiceTrie([(1,), (1, 3)]).needs_end
    assert ChoiceTrie([(1, 3), (1,)]).needs_end
    assert ChoiceTrie([(1, 3, 4), (2,)]).longest == 3
