"""cue_search: exact, ties by the lowest row, the same alone and in a crowd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.cue_search import cue_search as native
from rsvlm_infer.ops import cue_search as module
from rsvlm_infer.ops.cue_search import TOLERANCE, cue_search
from rsvlm_infer.ops.registry import resolve
from tests.native import limited_to, needs_native, per_instruction_set


def unit(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    x = rng.standard_normal(shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)


def by_hand(
    visual: NDArray[Any], query: NDArray[Any] | None, entries: NDArray[Any], k: int, beta: float
) -> tuple[list[float], list[int]]:
    """The definition, one entry at a time, in exact float64."""
    scored = []
    for row, entry in enumerate(entries.astype(np.float64)):
        best = max(float(np.dot(entry, one.astype(np.float64))) for one in visual)
        asked = 0.0 if query is None else beta * float(np.dot(entry, query.astype(np.float64)))
        scored.append((-np.float32(best + asked), row))
    scored.sort()
    return [float(-score) for score, _ in scored[:k]], [row for _, row in scored[:k]]


def test_known_scores() -> None:
    entries = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float16)
    visual = np.array([[1, 0], [0, 1]], np.float32)
    scores, rows = cue_search(visual, None, entries, 3, 0.5)
    assert rows.tolist() == [0, 1, 2]  # 1, 1, 0.8: a tie by row
    np.testing.assert_allclose(scores, [1, 1, 0.8], atol=1e-3)
    scores, rows = cue_search(visual, np.array([0, 1], np.float32), entries, 4, 0.5)
    assert rows.tolist() == [1, 2, 0, 3]
    np.testing.assert_allclose(scores, [1.5, 1.2, 1.0, 0.0], atol=1e-3)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    scores, rows = cue_search(visual[:1], np.array([0, 1], np.float32), entries, 1, -2.0)
    assert rows.tolist() == [0]


@given(
    entries=st.integers(0, 40),
    visual=st.integers(1, 5),
    width=st.sampled_from([1, 7, 64]),
    k=st.integers(1, 50),
    beta=st.floats(-2, 2),
    asked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_the_definition(entries: int, visual: int, width: int, k: int, beta: float, asked: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = unit(rng, entries, width, dtype=np.float16)
    if entries > 3:
        base[2] = base[0]  # an entry that is there twice
    seen, query = unit(rng, visual, width), unit(rng, width) if asked else None
    scores, rows = cue_search(seen, query, base, k, beta)
    expected_scores, expected_rows = by_hand(seen, query, base, k, beta)
    assert len(scores) == len(rows) == min(k, entries)
    np.testing.assert_allclose(scores, expected_scores, atol=TOLERANCE)
    assert rows.tolist() == expected_rows


def test_equal_entries_tie_by_row_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    entries = np.repeat(unit(rng, 1, 96, dtype=np.float16), 1000, axis=0)
    visual = unit(rng, 17, 96)
    scores, rows = cue_search(visual, visual[0], entries, 5, 0.5)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert len(set(scores.tolist())) == 1
    monkeypatch.setattr(module, "_CHUNK", 7)
    chunked_scores, chunked_rows = cue_search(visual, visual[0], entries, 5, 0.5)
    assert chunked_rows.tolist() == rows.tolist()
    assert chunked_scores.tobytes() == scores.tobytes()


def test_a_strided_view_and_order_of_embeddings_change_nothing() -> None:
    rng = np.random.default_rng(1)
    entries, visual = unit(rng, 50, 24, dtype=np.float16), unit(rng, 6, 24)
    expected = cue_search(visual, None, entries, 5, 0.0)
    wide = np.zeros((50, 48), np.float16)
    wide[:, ::2] = entries
    for variant in (cue_search(visual[::-1], None, entries, 5, 0.0), cue_search(visual, None, wide[:, ::2], 5, 0.0)):
        assert variant[0].tobytes() == expected[0].tobytes()
        assert variant[1].tolist() == expected[1].tolist()


def test_no_entries() -> None:
    scores, rows = cue_search(np.ones((1, 4), np.float32), None, np.zeros((0, 4), np.float16), 5, 0.5)
    assert (scores.shape, rows.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"visual": np.zeros((0, 4), np.float32)}, r"visual must be \[V >= 1, De\]"),
        ({"visual": np.zeros((2, 3), np.float32)}, r"got \[2, 3\] and \[5, 4\]"),
        ({"visual": np.zeros(4, np.float32)}, r"got \[4\]"),
        ({"query": np.zeros(3, np.float32)}, r"query must be \[De\] with De = 4, got \[3\]"),
        ({"visual": np.full((1, 4), np.nan, np.float32)}, "must be finite"),
        ({"query": np.full(4, np.inf, np.float32)}, "must be finite"),
        ({"beta": float("nan")}, "must be finite"),
    ],
)
def test_contract(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "visual": np.ones((1, 4), np.float32),
        "query": None,
        "entries": np.ones((5, 4), np.float16),
        "k": 2,
        "beta": 0.5,
    }
    with pytest.raises(InputError, match=message):
        cue_search(**{**arguments, **changes})


def test_the_registry_finds_it() -> None:
    assert resolve("cue_search", "eager") is cue_search


@per_instruction_set
@settings(max_examples=40)
@given(
    entries=st.integers(0, 300),
    visual=st.integers(1, 60),
    width=st.sampled_from([1, 7, 64, 257]),
    k=st.integers(1, 50),
    beta=st.floats(-2, 2),
    asked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_native_is_eager(isa: str, entries: int, visual: int, width: int, k: int, beta: float, asked: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = unit(rng, entries, width, dtype=np.float16)
    if entries > 3:
        base[2] = base[0]
    seen, query = unit(rng, visual, width), unit(rng, width) if asked else None
    expected_scores, expected_rows = cue_search(seen, query, base, k, beta)
    with limited_to(isa):
        scores, rows = native(seen, query, base, k, beta)
        for _ in range(3):
            again = native(seen, query, base, k, beta)
            assert (again[0].tobytes(), again[1].tobytes()) == (scores.tobytes(), rows.tobytes())
    np.testing.assert_allclose(scores, expected_scores, atol=TOLERANCE)
    assert rows.tolist() == expected_rows.tolist()
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


@needs_native
def test_native_checks_what_eager_checks() -> None:
    one = np.ones((1, 4), np.float32)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        native(one, None, np.ones((5, 4), np.float16), 0, 0.5)
    with pytest.raises(InputError, match="entries must be float16"):
        native(one, None, np.ones((5, 4), np.float32), 1, 0.5)  # type: ignore[arg-type]
    assert resolve("cue_search", "native") is native
