"""Text to token ids and back, whole or token by token. Knows one file, tokenizer.json, and no prompt format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from ..errors import CheckpointError

MAX_BYTES = 64 << 20  # the largest public tokenizer.json (Gemma's) has 33 MiB
_FOREIGN = {b"PK": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\x80": "a pickle"}
_UNFINISHED = "\ufffd"  # what the decoder shows for bytes that are no whole character yet


class Tokenizer:
    """The checkpoint's tokenizer. Nothing is ever cut or padded, whatever the file asks for."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.special_tokens: frozenset[str] = frozenset(
            token.content for token in core.get_added_tokens_decoder().values() if token.special
        )

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """From `tokenizer.json` in a checkpoint folder. The file is read as plain JSON: nothing is unpacked or executed.

        Raises:
            CheckpointError: the file is absent, larger than 64 MiB, no JSON (an archive, a pickle), truncated or no tokenizer.
        """
        file = Path(path) / "tokenizer.json"
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise CheckpointError(
                f"{file} must be a readable file, it is not ({error.strerror}); restore it from the checkpoint's source"
            ) from None
        if len(content) > MAX_BYTES:
            raise CheckpointError(
                f"{file} must be at most {MAX_BYTES >> 20} MiB, it is {file.stat().st_size >> 20} MiB; "
                "restore it from the checkpoint's source"
            )
        if content.lstrip()[:1] != b"{":
            kind = next(
                (name for magic, name in _FOREIGN.items() if content.startswith(magic)), f"it begins with {content[:4]!r}"
            )
            raise CheckpointError(f"{file} must be a JSON object, got {kind}; restore it from the checkpoint's source")
        try:
            return cls(tokenizers.Tokenizer.from_buffer(content))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust side raises Exception, and its panics are no Exceptions
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{file} must be a tokenizer of the tokenizers library, it is not ({reason}); restore it"
            ) from None

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id that text can give."""
        return 1 + max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text. Special tokens that are written out in it are recognised.

        Args:
            add_special: also add what the tokenizer itself puts around a text (a begin token, CLIP's two).
        """
        return list(self._core.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return str(self._core.decode([int(index) for index in ids], skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int:
        """The id of one token.

        Raises:
            CheckpointError: the vocabulary has no such token.
        """
        index = self._core.token_to_id(token)
        if index is None:
            raise CheckpointError(
                f"tokenizer.json must hold the token {token!r}, it does not; pass a checkpoint whose tokenizer has it"
            )
        return int(index)


class StreamDecoder:
    """Text of one answer as its tokens come: the pieces join to what `Tokenizer.decode` makes of all of them.

    A piece is held back while its last character is incomplete, because a character of text may be several byte tokens.
    One difference: Llama's decoder shows whole runs of bytes as U+FFFD for one wrong byte in them; what was shown stays shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # tokens before here no longer influence how later ones are shown
        self._shown = 0  # tokens before here are shown

    def push(self, token_id: int) -> str:
        """Adds a token; the text that is now certain, often one word, possibly nothing."""
        self._ids.append(int(token_id))
        return self._release(final=False)

    def finish(self) -> str:
        """No more tokens: the rest, where an incomplete character becomes U+FFFD."""
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        text = self._tokenizer.decode(self._ids[self._context :])
        piece = text[len(before) :] if text.startswith(before) else self._tokenizer.decode(self._ids[self._shown :])
        if not piece or (piece.endswith(_UNFINISHED) and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return piece
