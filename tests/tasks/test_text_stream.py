"""Stop strings across token borders, outer blanks, and pieces that join to the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsvlm_infer.tasks.text_stream import TextStream
from rsvlm_infer.text.tokenizer import Tokenizer
from tests.tasks.telling_model import byte_ids, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(tokenizer: Tokenizer, text: str, stops: tuple[str, ...] = ()) -> tuple[str, list[str], int]:
    """The text, its pieces, and how many tokens were taken."""
    stream = TextStream(tokenizer, stops)
    pieces = []
    count = 0
    for token_id in byte_ids(text):
        count += 1
        stopped = stream.accept(token_id)
        pieces.append(stream.take())
        if stopped:
            break
    stream.finish()
    pieces.append(stream.take())
    return stream.text, [piece for piece in pieces if piece], count


def test_text_comes_piece_by_piece_without_outer_blanks(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "\n a  b \n")[:2] == ("a  b", ["a", "  b"])


def test_a_stop_string_across_token_borders_cuts_the_text_before_it(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "one two###three", ("###",)) == ("one two", ["o", "n", "e", " t", "w", "o"], 10)


def test_a_broken_beginning_of_a_stop_string_is_given_back(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "a##b#", ("###",)) == ("a##b#", ["a", "##b", "#"], 5)


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "xyz end", ("end", "z"))[0] == "xy"


def test_a_blank_stop_string_works_in_the_middle_and_at_the_start(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "first\nsecond", ("\n",))[0] == "first"
    assert run(tokenizer, "\n\nsecond", ("\n\n",)) == ("", [], 2)


def test_characters_of_several_bytes_come_whole(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, "é 木")[:2] == ("é 木", ["é", " 木"])
    assert run(tokenizer, "a木b", ("木",))[0] == "a"


def test_nothing_is_added_after_a_stop(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("b",))
    assert [stream.accept(token_id) for token_id in byte_ids("abc")] == [False, True, True]
    stream.finish()
    assert stream.text == "a"


@given(
    text=st.text(alphabet="ab \né", max_size=20), stops=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=3), max_size=2)
)
def test_streaming_never_changes_the_text(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    whole, pieces, _ = run(tokenizer, text, tuple(stops))
    assert "".join(pieces) == whole
    # the first stop string to be complete wins, as tokens come one by one
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min((end for end, _ in ends), default=None)
    cut = min((start for end, start in ends if end == first_end), default=len(text))
    assert whole == text[:cut].strip()
