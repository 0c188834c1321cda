"""Exact match, by hand and against a published number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.answers import exact_match, match_by_class, matches, normalize_answer


def test_normalize_ignores_case_space_and_punctuation() -> None:
    assert normalize_answer(" Storage tanks. ") == "storagetanks"
    assert normalize_answer("0 m2") == "0m2"
    assert normalize_answer("sea_lake / Sea-Lake") == "sealakesealake"
    assert normalize_answer("1,000.") == "1000"


@pytest.mark.parametrize(
    ("one", "other"), [("1.5", "15"), ("1-10", "110"), ("river", "rivers"), ("\u662f", "\u5426"), ("-", "?")]
)
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert matches([one], [other]) == [False]
    assert matches([f" {one} "], [one]) == [True]


def test_exact_match_and_recall_by_class() -> None:
    truths = ["forest", "forest", "storagetanks", "river"]
    guesses = ["Forest", "river", "storage tanks", "rivers"]
    assert matches(guesses, truths) == [True, False, True, False]
    assert exact_match(guesses, truths) == 0.5
    assert match_by_class(guesses, truths) == {"forest": 0.5, "river": 0.0, "storagetanks": 1.0}


@pytest.mark.parametrize(("guesses", "truths"), [([], []), (["a"], ["a", "b"])])
def test_lengths_are_checked(guesses: list[str], truths: list[str]) -> None:
    with pytest.raises(InputError, match="same non-zero length"):
        exact_match(guesses, truths)


@pytest.mark.data
def test_golden_classification_has_the_published_accuracy(data_root: Path) -> None:
    lines = (data_root / "golden_predictions" / "UCM.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2100
    accuracy = exact_match([row["answer"] for row in rows], [row["annotation"] for row in rows])
    assert 100 * accuracy == pytest.approx(92.57, abs=0.005)
