"""Retrieval recalls by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.retrieval import retrieval_scores, retrieval_texts


def test_texts_are_capitalised_and_shared_texts_are_right_for_both_images() -> None:
    texts, positives = retrieval_texts({"a": ["a river .", "green field ."], "b": ["a bridge .", "A river ."]})
    assert texts == ["A river .", "Green field .", "A bridge .", "A river ."]
    np.testing.assert_array_equal(positives, [[True, True, False, True], [True, False, True, True]])


def test_recalls_by_hand() -> None:
    # 12 images, one text each; text i ranks its own image at position i (0 = first)
    similarity = np.zeros((12, 12))
    for text in range(12):
        others = [image for image in range(12) if image != text]
        for rank, image in enumerate([*others[:text], text, *others[text:]]):
            similarity[image, text] = -rank
    scores = retrieval_scores(similarity, np.eye(12, dtype=bool))
    assert scores.text_to_image_r1 == pytest.approx(1 / 12)
    assert scores.text_to_image_r5 == pytest.approx(5 / 12)
    assert scores.text_to_image_r10 == pytest.approx(10 / 12)
    assert scores.mean_recall == pytest.approx(np.mean(list(scores.to_dict().values())[:6]))


def test_any_image_that_carries_the_text_is_a_hit() -> None:
    positives = np.array([[True], [True], [True]])
    assert retrieval_scores(np.array([[0.1], [0.9], [0.2]]), positives).text_to_image_r1 == 1.0


def test_ties_keep_column_order() -> None:
    similarity = np.ones((2, 2))
    scores = retrieval_scores(similarity, np.eye(2, dtype=bool))
    assert scores.image_to_text_r1 == 0.5
    assert scores.text_to_image_r1 == 0.5


@pytest.mark.parametrize(
    ("similarity", "positives", "message"),
    [
        (np.zeros((2, 3)), np.ones((3, 2), dtype=bool), "equal non-empty"),
        (np.zeros((0, 0)), np.zeros((0, 0), dtype=bool), "equal non-empty"),
        (np.array([[np.nan]]), np.array([[True]]), "finite"),
        (np.zeros((2, 1)), np.array([[True], [False]]), "at least one match"),
    ],
)
def test_bad_input_names_the_problem(similarity: np.ndarray, positives: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        retrieval_scores(similarity, positives)
