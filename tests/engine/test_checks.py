"""Options of the wrong type: what came, and what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.engine.checks import check_integer, check_integers, check_real, check_text, check_texts
from rsvlm_infer.errors import InputError


def test_numpy_values_are_as_good_as_python_ones() -> None:
    check_integer("seed", np.int32(3))
    check_real("top_p", np.float32(0.5))
    check_real("top_p", 1)
    assert check_integers("bands", np.array([3, 2, 1]), "(1,)") == (3, 2, 1)
    assert check_texts("labels", (name for name in ("sea", "forêt"))) == ["sea", "forêt"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_integer("seed", "a"), "seed must be a whole number, got 'a' (str); pass an int"),
        (lambda: check_real("top_p", False), "top_p must be a number, got False (bool); pass a float"),
        (
            lambda: check_integers("bands", 5, "(1,)"),
            "bands must be a sequence of whole numbers, got 5 (int); pass for example (1,)",
        ),
        (
            lambda: check_integers("bands", (1, "2"), "(1,)"),
            "bands must be a sequence of whole numbers, got (1, '2') (tuple); pass for example (1,)",
        ),
        (lambda: check_text("question", None), "question must be a text, got None (NoneType); pass a str"),
        (
            lambda: check_text("prompt", "a\udcff"),
            "prompt must be text in UTF-8, got 'a\\udcff', which holds half a character; retype it",
        ),
        (lambda: check_texts("texts", "sea"), "texts must be a list of texts, got the single text 'sea'; pass a list"),
        (lambda: check_texts("texts", 7), "texts must be a list of texts, got 7 (int); pass a list"),
        (lambda: check_texts("texts", ["a", 3]), "texts[1] must be a text, got 3 (int); pass a str"),
        (lambda: check_integer("seed", "x" * 99), f"seed must be a whole number, got '{'x' * 56}... (str); pass an int"),
    ],
)
def test_a_wrong_type_names_argument_value_and_next_step(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value) == message
