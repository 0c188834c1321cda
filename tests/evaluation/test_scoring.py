"""Scores of whole sets, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.scoring import candidate_texts, score_set
from rsvlm_infer.evaluation.sets import EvaluationSet, Item, Task


def make(task: Task, items: list[tuple[str, tuple[str, ...], str]], labels: dict[str, str] | None = None) -> EvaluationSet:
    return EvaluationSet(
        task, "made up", "r", None, tuple(Item(key, None, truths, "", kind) for key, truths, kind in items), labels or {}
    )


CLASSES = make(
    "classify",
    [("1", ("forest",), ""), ("2", ("forest",), ""), ("3", ("bareland",), ""), ("4", ("river",), "")],
    {"forest": "forest", "bareland": "bare land", "river": "river", "sea": "sea"},
)


def test_classes_have_a_confusion_matrix() -> None:
    scores = score_set(CLASSES, {"1": "Forest.", "2": "river", "3": "bare land", "4": "a lake"})
    assert scores["metrics"] == {"class_accuracy": 0.5, "class_accuracy_mean": pytest.approx(1.5 / 3)}
    assert scores["classes"] == {
        "bareland": {"accuracy": 1.0, "items": 1},
        "forest": {"accuracy": 0.5, "items": 2},
        "river": {"accuracy": 0.0, "items": 1},
    }
    assert scores["confusion"]["columns"] == ["bareland", "forest", "river", "sea", None]
    assert scores["confusion"]["counts"] == {
        "bareland": [1, 0, 0, 0, 0],
        "forest": [0, 1, 1, 0, 0],
        "river": [0, 0, 0, 0, 1],
        "sea": [0, 0, 0, 0, 0],
    }
    assert "letters and digits" in scores["matcher"]


def test_only_items_with_a_prediction_count() -> None:
    assert score_set(CLASSES, {"1": "forest"})["metrics"]["class_accuracy"] == 1.0
    with pytest.raises(InputError, match="got none"):
        score_set(CLASSES, {})


def test_answers_by_kind() -> None:
    data = make("vqa", [("1", ("yes",), "presence"), ("2", ("no",), "presence"), ("3", ("12",), "count"), ("4", ("x",), "")])
    scores = score_set(data, {"1": "Yes.", "2": "yes", "3": " 12", "4": "x"})
    assert scores["metrics"] == {"answer_accuracy": 0.75, "answer_accuracy_mean": pytest.approx(2.5 / 3)}
    assert scores["kinds"] == {
        "count": {"accuracy": 1.0, "items": 1},
        "presence": {"accuracy": 0.5, "items": 2},
        "unnamed": {"accuracy": 1.0, "items": 1},
    }


def test_captions_name_their_tokenizer() -> None:
    data = make("caption", [("a", ("a river near a field",), ""), ("b", ("a road",), "")])
    scores = score_set(data, {"a": "A river near a field.", "b": "a road"})
    assert list(scores["metrics"]) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    assert scores["metrics"]["rouge_l"] == pytest.approx(1.0)
    assert "no Java" in scores["tokenizer"]


RETRIEVAL = make("retrieval", [("a", ("a river .", "a road ."), ""), ("b", ("A road .", "a field ."), "")])


def test_retrieval_compares_each_distinct_text_once() -> None:
    assert candidate_texts(RETRIEVAL) == ["A river .", "A road .", "A field ."]
    scores = score_set(RETRIEVAL, {"a": [0.1, 0.2, 0.9], "b": [0.5, 0.3, 0.8]})
    # image a meets "A field ." first; text "A river ." meets image b first; "A road ." is right for both, "A field ." meets a
    assert scores["metrics"]["image_to_text_r1"] == 0.5
    assert scores["metrics"]["text_to_image_r1"] == 0.5
    assert scores["metrics"]["mean_recall"] == pytest.approx((0.5 + 0.5 + 4) / 6)
    assert (scores["texts"], scores["distinct_texts"]) == (4, 3)


def test_a_failed_image_leaves_retrieval_with_its_texts() -> None:
    scores = score_set(RETRIEVAL, {"b": [0.9, 0.1, 0.2]})
    assert scores["metrics"]["image_to_text_r1"] == 1.0  # "A river ." belongs to the failed image only
    assert scores["texts"] == 2


@pytest.mark.parametrize(
    ("data", "predictions", "message"),
    [
        (CLASSES, {"1": [1.0]}, "must be texts"),
        (RETRIEVAL, {"a": [1.0]}, "must be 3 similarities.*got 1"),
        (RETRIEVAL, {"a": "x"}, "must be 3 similarities.*got 'x'"),
        (RETRIEVAL, {"a": ["x", "y", "z"]}, "numbers only"),
        (make("classify", [("1", ("pond",), "")], {"sea": "sea"}), {"1": "sea"}, r"among the 1 classes.*\['pond'\]"),
    ],
)
def test_wrong_predictions_are_named(data: EvaluationSet, predictions: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_set(data, predictions)
