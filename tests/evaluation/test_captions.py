"""Caption metrics against published numbers and by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rsvlm_infer.errors import InputError, MissingDependencyError
from rsvlm_infer.evaluation.captions import caption_scores, tokenize


def test_tokenize_drops_punctuation_and_case() -> None:
    assert tokenize("  Many  white planes, parked at the airport .") == "many white planes parked at the airport"
    assert tokenize("A two-lane road; it's 3.5 m") == "a two-lane road it's 3 5 m"
    assert tokenize("- . '") == ""


def test_perfect_captions_score_one() -> None:
    captions = {"a": ["a river crosses the green field"], "b": ["many planes stand at the airport"]}
    scores = caption_scores({key: value[0] for key, value in captions.items()}, captions)
    assert scores.bleu_1 == pytest.approx(1.0)
    assert scores.bleu_4 == pytest.approx(1.0)
    assert scores.rouge_l == pytest.approx(1.0)
    assert scores.cider == pytest.approx(10.0)  # 10 is CIDEr's own scale


def test_scores_by_hand() -> None:
    # unigrams: 3 of 4 words are in the reference, equal lengths: no brevity penalty; LCS "a river a field" has 3 words
    scores = caption_scores({"a": "a river near field", "b": ""}, {"a": ["a river crosses field"], "b": ["a road"]})
    only = caption_scores({"a": "a river near field"}, {"a": ["a river crosses field"]})
    assert only.bleu_1 == pytest.approx(0.75, abs=1e-6)
    assert only.rouge_l == pytest.approx(0.75)
    assert only.cider == 0.0  # one image: every word is in every reference set
    assert scores.rouge_l == pytest.approx(0.375)
    assert list(only.to_dict()) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "at least one caption"),
        ({"a": "x"}, {"b": ["x"]}, "same keys"),
        ({"a": "x"}, {"a": []}, "at least one caption per image"),
    ],
)
def test_bad_input_names_the_problem(predictions: dict[str, str], references: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        caption_scores(predictions, references)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(MissingDependencyError, match=r"rsvlm-infer\[eval\]"):
        caption_scores({"a": "x"}, {"a": ["x"]})


@pytest.mark.data
def test_golden_predictions_have_the_published_scores(data_root: Path) -> None:
    """Published with the Java tokenizer: BLEU 69.94 / 53.21 / 42.59 / 35.15, ROUGE-L 52.52, CIDEr 99.41."""
    lines = (data_root / "golden_predictions" / "RSICD_Captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 1093
    scores = caption_scores(
        {str(i): row["answer"] for i, row in enumerate(rows)},
        {str(i): [row[f"caption{k}"] for k in range(5)] for i, row in enumerate(rows)},
    )
    bleu = [100 * value for value in (scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4)]
    assert bleu == pytest.approx([69.94, 53.21, 42.59, 35.15], abs=0.06)
    assert 100 * scores.rouge_l == pytest.approx(52.52, abs=0.06)
    assert 100 * scores.cider == pytest.approx(99.41, abs=0.5)
