"""Label prompts, methods, ranking."""

from __future__ import annotations

import numpy as np
import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.tasks.classify import choice_prompt, choose_method, classification, label_prompts
from rsvlm_infer.tasks.generation import check_labels
from tests.tasks.telling_model import telling_config


def test_prompts_fill_the_template() -> None:
    assert label_prompts(["forest ", "sea"], "{label}, seen from {label}") == ["forest, seen from forest", "sea, seen from sea"]
    assert choice_prompt(["forest", "sea"]) == (
        "Classify this remote sensing image as one of: forest, sea. Answer with the label only."
    )
    with pytest.raises(InputError, match=r"template must contain \{label\}, got 'a photo'"):
        label_prompts(["sea"], "a photo")
    with pytest.raises(InputError, match=r"template must be a text, got None \(NoneType\)"):
        label_prompts(["sea"], None)  # type: ignore[arg-type]


def test_auto_prefers_alignment() -> None:
    assert choose_method("auto", telling_config()) == "alignment"
    assert choose_method("language", telling_config()) == "language"
    assert choose_method("auto", telling_config(alignment=None)) == "language"


def test_a_method_without_its_parts_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"available: \['language'\]"):
        choose_method("alignment", telling_config(alignment=None))
    with pytest.raises(InputError, match="method must be"):
        choose_method("guess", telling_config())  # type: ignore[arg-type]


def test_classification_ranks_and_keeps_ties_in_order() -> None:
    result = classification(["a", "b", "c", "d"], np.array([0.1, 0.3, 0.3, 0.2]), 10.0, "alignment", source="x.png")
    assert result.label == "b"
    assert list(result.scores) == ["b", "c", "d", "a"]
    weights = np.exp([3.0, 3.0, 2.0, 1.0])
    np.testing.assert_allclose(list(result.scores.values()), weights / weights.sum())
    assert result.raw_scores == {"b": 0.3, "c": 0.3, "d": 0.2, "a": 0.1}
    assert result.to_dict()["label"] == "b"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("sea", "must be a list of texts, got the single text 'sea'"),
        (["sea"], "at least two texts"),
        ([], "at least two texts"),
        (["sea", " "], "must not be blank"),
        (["sea", "forest", " sea "], r"must differ, got \['sea'\]"),
        (["sea", 3], r"labels\[1\] must be a text, got 3 \(int\)"),
        (None, r"must be a list of texts, got None \(NoneType\)"),
    ],
)
def test_labels_are_checked(labels: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(labels, "labels")
