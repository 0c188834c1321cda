"""Words fit their width."""

from __future__ import annotations

import pytest

from rsvlm_infer.errors import MissingDependencyError
from rsvlm_infer.imagery import lettering


def test_lines_fit_and_nothing_is_lost_that_has_room() -> None:
    pytest.importorskip("matplotlib")
    words = "many ships are in a harbour near several large storage tanks"
    lines = lettering.wrapped(words, 16, 150)
    assert " ".join(lines) == words
    assert len(lines) > 2
    assert all(lettering.font(16).getlength(line) <= 150 for line in lines)
    cut = lettering.wrapped(words, 16, 150, max_lines=2)
    assert len(cut) == 2
    assert cut[0] == lines[0]
    assert cut[1].endswith("…")
    assert lettering.font(16).getlength(cut[1]) <= 150


def test_a_word_that_is_too_long_is_shortened() -> None:
    pytest.importorskip("matplotlib")
    short = lettering.shortened("w" * 500, 12, 100)
    assert short.startswith("www")
    assert short.endswith("…")
    assert lettering.font(12).getlength(short) <= 100
    assert lettering.font(12).getlength("w" + short) > 100
    assert lettering.shortened("×² größer", 12, 500) == "×² größer"


def test_without_the_font_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lettering.font.cache_clear()
    monkeypatch.setattr(lettering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"rsvlm-infer\[report\]"):
        lettering.font(12)
    lettering.font.cache_clear()
