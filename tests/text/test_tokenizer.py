"""tokenizer: ids and text, streams that join to the whole, and files that must not be opened."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rsvlm_infer.errors import CheckpointError
from rsvlm_infer.text import tokenizer as module
from rsvlm_infer.text.tokenizer import StreamDecoder, Tokenizer
from tests.base_files import CONTROL, MERGES, vocabulary


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: a token is a run of bytes, so a character may be split over tokens."""
    vocab = {token: index for index, token in enumerate(vocabulary())}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return core


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama's kind: words with a leading mark, unknown characters as single bytes, a begin token by post-processing."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("▁", "a"), ("a", "b"), ("▁a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


BOTH = pytest.mark.parametrize(
    "tokenizer", [Tokenizer(byte_level()), Tokenizer(byte_fallback())], ids=["byte_level", "fallback"]
)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(index) for index in ids), decoder.finish()]


def test_known_ids_and_special_tokens() -> None:
    tokenizer = Tokenizer(byte_level())
    words = vocabulary()
    ids = tokenizer.encode("the in<|im_end|>")
    assert [words[index] for index in ids] == ["t", "he", "Ġ", "in", "<|im_end|>"]
    assert tokenizer.decode(ids) == "the in"
    assert tokenizer.decode(ids, skip_special=False) == "the in<|im_end|>"
    assert tokenizer.id_of("<|im_end|>") == 2
    assert tokenizer.special_tokens == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert tokenizer.vocab_size == len(words) == 264
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    with pytest.raises(CheckpointError, match="must hold the token '<image>'"):
        tokenizer.id_of("<image>")


def test_begin_token_only_when_asked() -> None:
    tokenizer = Tokenizer(byte_fallback())
    assert tokenizer.encode("ab") == [263]
    assert tokenizer.encode("ab", add_special=True) == [1, 263]


def test_nothing_is_cut_or_padded() -> None:
    core = byte_level()
    core.enable_truncation(max_length=3)
    core.enable_padding(length=5)
    assert len(Tokenizer(core).encode("x y")) == 3
    assert len(Tokenizer(core).encode("abcdefgh")) == 8


@BOTH
@given(text=st.text(max_size=40))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    text = "".join(character for character in text if character not in "\u2581")  # Llama's own mark for a blank
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(stream(tokenizer, ids)) == text


@given(ids=st.lists(st.integers(min_value=0, max_value=263), max_size=40))
def test_stream_joins_to_the_whole_for_any_bytes(ids: list[int]) -> None:
    """Also when the bytes are no UTF-8 at all."""
    tokenizer = Tokenizer(byte_level())
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(min_value=0, max_value=264), max_size=40))
def test_stream_of_byte_tokens_shows_at_least_what_the_whole_shows(ids: list[int]) -> None:
    """Llama's decoder takes back characters when a wrong byte follows them; a stream cannot, and must not show less."""
    tokenizer = Tokenizer(byte_fallback())
    joined, whole = "".join(stream(tokenizer, ids)), tokenizer.decode(ids)
    if "\ufffd" in whole:
        remaining = iter(joined)
        assert all(character in remaining for character in whole.replace("\ufffd", ""))
    else:
        assert joined == whole


def test_a_wrong_byte_costs_one_mark_in_a_stream() -> None:
    tokenizer = Tokenizer(byte_fallback())
    kanji = [3 + byte for byte in "日".encode()]
    wrong, a = 3 + 0x80, tokenizer.id_of("▁a")
    assert stream(tokenizer, [*kanji, wrong, a]) == ["", "", "日", "", "\ufffd a", ""]
    assert tokenizer.decode([*kanji, wrong, a]) == "\ufffd\ufffd\ufffd\ufffd a"


def test_incomplete_characters_are_held_back() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a🚀é!")
    assert len(ids) == 8  # 1 + 4 + 2 + 1 bytes
    assert stream(tokenizer, ids) == ["a", "", "", "", "🚀", "", "é", "!", ""]
    assert stream(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]  # the answer was cut inside a character
    assert stream(tokenizer, [*ids[:3], 1, *ids[3:5]]) == ["a", "", "", "", "", "🚀", ""]  # a special token in between


def test_leading_blanks_survive_in_a_stream() -> None:
    tokenizer = Tokenizer(byte_fallback())
    ids = tokenizer.encode("ab ab a")
    assert stream(tokenizer, ids) == ["ab", " ab", " a", ""]


def test_numpy_ids_are_accepted() -> None:
    np = pytest.importorskip("numpy")
    tokenizer = Tokenizer(byte_level())
    ids = np.array(tokenizer.encode("the"), dtype=np.int32)
    assert tokenizer.decode(ids) == "the"
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(index) for index in ids) == "the"


# --- files ------------------------------------------------------------------------------------------------------------


def test_from_folder(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("the") == Tokenizer(byte_level()).encode("the")


def _zip_bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.json", b" " * (80 << 20))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_zip_bomb(), "must be a JSON object, got a zip archive"),
        (gzip.compress(b"{}" * 1000), "got a gzip archive"),
        (pickle.dumps({"version": "1.0"}), "got a pickle"),
        (b"", "it begins with b''"),
        (b"[1, 2]", r"it begins with b'\[1, '"),
        (b"\x00\x01\x02\x03", "it begins with"),
        (b"{}", "must be a tokenizer"),
        (b'{"version": "1.0", "model": {"type": "Evil"}}', "must be a tokenizer"),
        (b"{" * 100_000, "must be a tokenizer"),
        (b'{"a": "\xff\xfe"}', "must be a tokenizer"),
    ],
    ids=["zip", "gzip", "pickle", "empty", "list", "bytes", "no model", "unknown model", "deep", "no utf-8"],
)
def test_foreign_files_are_refused_with_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "restore it" in str(caught.value)


def test_truncated_or_flipped_files_are_refused_or_read(tmp_path: Path) -> None:
    """No damage may leave as anything but a CheckpointError: the parser's own panics are no Exceptions."""
    whole = byte_level().to_str().encode()
    file = tmp_path / "tokenizer.json"
    for length in (1, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="must be a tokenizer"):
            Tokenizer.from_folder(tmp_path)
    draws = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draws.randrange(1, len(damaged))] = draws.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            Tokenizer.from_folder(tmp_path).encode("the in")
        except CheckpointError:
            continue


def test_huge_file_is_refused_without_being_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as sparse:
        sparse.write(b"{")
        sparse.truncate(module.MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="must be at most 64 MiB, it is 64 MiB"):
        Tokenizer.from_folder(tmp_path)
    content = json.dumps({"pad": "x" * 100}).encode()
    monkeypatch.setattr(module, "MAX_BYTES", len(content))
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="must be a tokenizer"):  # at the limit the content decides
        Tokenizer.from_folder(tmp_path)


def test_absent_file_or_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="must be a readable file, it is not"):
            Tokenizer.from_folder(folder)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        Tokenizer.from_folder(tmp_path)
