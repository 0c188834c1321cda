"""Owns the type checks that options share, so that a wrong type is refused in one line before any work. Knows no option's meaning."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from ..errors import InputError


def check_integer(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a whole number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number, got {_shown(value)}; pass an int")


def check_real(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, got {_shown(value)}; pass a float")


def check_integers(name: str, values: Any, example: str) -> tuple[int, ...]:
    """The whole numbers as a tuple.

    Raises:
        InputError: no sequence, or an item that is no whole number.
    """
    items = tuple(values) if isinstance(values, Iterable) else None
    if items is None or not all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        raise InputError(f"{name} must be a sequence of whole numbers, got {_shown(values)}; pass for example {example}")
    return items


def check_text(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a text that has a UTF-8 form, which a tokenizer needs."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {_shown(value)}; pass a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} must be text in UTF-8, got {value!a}, which holds half a character; retype it") from None


def check_texts(name: str, values: Any) -> list[str]:
    """The texts as a list.

    Raises:
        InputError: a single text, no sequence, or an item that is no text.
    """
    if isinstance(values, str):
        raise InputError(f"{name} must be a list of texts, got the single text {values!r}; pass a list")
    if not isinstance(values, Iterable):
        raise InputError(f"{name} must be a list of texts, got {_shown(values)}; pass a list")
    texts = list(values)
    for index, text in enumerate(texts):
        check_text(f"{name}[{index}]", text)
    return texts


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
