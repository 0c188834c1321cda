"""Owns the loop from prompts to tokens: prefill, choose, decode until every row is done. Knows no text, no raster, no framework."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.base import Backend, DraftingBackend, GreedyBackend, Prompt
from ..errors import InputError
from ..models.draft_table import DraftTable
from .checks import check_integer
from .choices import ChoiceTrie
from .drafts import Draft, DraftCounts, Drafter
from .request import ChoiceScores, FinishReason, Request, TokenEvent
from .sampling import choose_token, log_softmax
from .step_times import StepTimes

DRAFT_ROWS = 8  # tokens of one step with guesses; beyond, the step is bound by arithmetic, and a guess costs what it saves


class Engine:
    """Generates with one backend; at most `max_batch` rows share a KV cache.

    A backend that can check several tokens of a row in one step gets up to `draft_tokens` guesses per row, as many as pay by
    `step_times`. What is generated does not change: a guess only counts when the model chooses it too. `drafts` counts how many did;
    0 turns guessing off.
    """

    def __init__(
        self,
        backend: Backend,
        max_batch: int = 16,
        draft_tokens: int = DRAFT_ROWS - 1,
        *,
        draft_table: DraftTable | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        check_integer("max_batch", max_batch)
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, got {max_batch}; raise it")
        self.backend = backend
        self._chooser = backend if isinstance(backend, GreedyBackend) else None
        self.max_batch = max_batch
        self._drafting = backend if isinstance(backend, DraftingBackend) else None
        self.draft_tokens = draft_tokens
        self.draft_table = draft_table
        self.drafts = DraftCounts()
        self._step_times = step_times or StepTimes()

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Tokens of all requests as they are chosen; each request's last event is `finished`.

        Prompts may differ in length and in images. A finished row leaves the batch and costs nothing more.

        Raises:
            InputError: a prompt that does not fit the model, before anything runs.
        """
        for index, request in enumerate(requests):
            self.check(request, index)
        return self._run(requests, time.perf_counter())

    def _run(self, requests: Sequence[Request], called: float) -> Iterator[TokenEvent]:
        for first in range(0, len(requests), self.max_batch):
            group = requests[first : first + self.max_batch]
            rows = [_Row(first + i, request, self.draft_table) for i, request in enumerate(group)]
            capacity = max(row.request.token_ids.size + row.request.max_new_tokens for row in rows)

            started = time.perf_counter()
            queue_ms = (started - called) * 1e3
            logits, cache = self.backend.prefill([row.request.prompt for row in rows], capacity)  # [B, V]
            chosen = [[row.choose(logits[i])] for i, row in enumerate(rows)]
            while True:
                step_ms = (time.perf_counter() - started) * 1e3
                for row, tokens in zip(rows, chosen, strict=True):
                    for place, token_id in enumerate(tokens, start=1):
                        reason = row.finish_reason if place == len(tokens) else None
                        yield TokenEvent(row.index, token_id, step_ms / len(tokens), reason, queue_ms)

                started = time.perf_counter()
                alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
                if not alive:
                    break
                if len(alive) < len(rows):
                    cache = self.backend.keep(cache, alive)
                    rows = [rows[i] for i in alive]
                chosen = self._step(rows, cache, np.array([chosen[i][-1] for i in alive], dtype=np.int32))

    def _step(self, rows: list[_Row], cache: Any, token_ids: npt.NDArray[np.int32]) -> list[list[int]]:
        """Feeds `token_ids` [B], and guesses behind them; the next tokens of every row, one without guesses.

        When all rows are greedy and the backend can, logits stay where they are. One step per call: a row may end at any token, and a
        step after its end costs more than reading a few ids.
        """
        started = time.process_time()  # of all threads: what the machine does besides is no cost of a guess
        taken = self._check_drafts(rows, cache, token_ids)
        if taken is None and self._chooser is not None and all(row.request.greedy for row in rows):
            ids = self._chooser.decode_greedy(cache, token_ids, 1)[:, 0]
            taken = [[row.accept(int(token_id))] for row, token_id in zip(rows, ids, strict=True)]
        if taken is None:
            logits = self.backend.decode(cache, token_ids)  # [B, V]
            taken = [[row.choose(logits[i])] for i, row in enumerate(rows)]
        guessed = sum(len(row.draft.tokens) for row in rows)
        self.drafts.record(len(rows), guessed, sum(map(len, taken)) - len(rows))
        self._step_times.record(len(rows) + guessed, time.process_time() - started)
        return taken

    def _check_drafts(self, rows: list[_Row], cache: Any, token_ids: npt.NDArray[np.int32]) -> list[list[int]] | None:
        """The step with the guesses that pay; None when none does."""
        free = DRAFT_ROWS - len(rows)
        if self._drafting is None or self.draft_tokens < 1 or free < 1:
            return None
        for row in rows:
            row.guess(min(self.draft_tokens, free))
        chances = sorted((chance for row in rows for chance in row.draft.chances), reverse=True)[:free]
        count = self._step_times.worth(len(rows), chances)
        _shorten(rows, count)
        if count == 0:
            return None
        fed = [(int(token), *row.draft.tokens) for token, row in zip(token_ids, rows, strict=True)]
        checked = self._drafting.decode_drafts(cache, fed)  # [1 + guesses, V] of each row
        taken = [row.take(own) for row, own in zip(rows, checked, strict=True)]
        self._drafting.accept(cache, [len(tokens) for tokens in taken])
        return taken

    def score_choices(self, prompt: Prompt, choices: Sequence[Sequence[int]]) -> ChoiceScores:
        """Mean log-probability per token of each choice after one prompt, by teacher forcing.

        The prompt is prefilled once per `max_batch` choices; choices that begin alike share their rows.

        Raises:
            InputError: an empty, repeated or too long choice, or a prompt that does not fit the model.
        """
        ordered = [tuple(int(token_id) for token_id in choice) for choice in choices]
        longest = ChoiceTrie(ordered).longest
        self.check(Request(prompt.token_ids, prompt.images, max_new_tokens=longest))
        self._check_ids(np.array([token_id for choice in ordered for token_id in choice]), "choices", 0)
        log_probs = np.zeros(len(ordered))
        prefill_ms = decode_ms = 0.0
        for first in range(0, len(ordered), self.max_batch):
            group = range(first, min(first + self.max_batch, len(ordered)))
            started = time.perf_counter()
            logits, cache = self.backend.prefill([prompt], prompt.token_ids.size + longest)  # [1, V]
            prefilled = time.perf_counter()
            rows: dict[tuple[int, ...], int] = {(): 0}  # prefix -> row of the cache
            for depth in range(longest):
                row_log_probs = log_softmax(logits)
                for i in group:
                    if len(ordered[i]) > depth:
                        log_probs[i] += row_log_probs[rows[ordered[i][:depth]], ordered[i][depth]]
                prefixes = list(dict.fromkeys(ordered[i][: depth + 1] for i in group if len(ordered[i]) > depth + 1))
                if not prefixes:
                    break
                cache = self.backend.keep(cache, [rows[prefix[:-1]] for prefix in prefixes])
                logits = self.backend.decode(cache, np.array([prefix[-1] for prefix in prefixes], dtype=np.int32))
                rows = {prefix: row for row, prefix in enumerate(prefixes)}
            prefill_ms += (prefilled - started) * 1e3
            decode_ms += (time.perf_counter() - prefilled) * 1e3
        lengths = np.array([len(choice) for choice in ordered])
        return ChoiceScores(log_probs / lengths, prefill_ms, decode_ms)

    def check(self, request: Request, index: int = 0) -> None:
        """Contracts on the host, once, before a launch.

        Raises:
            InputError: no language model, a wrong count of placeholders, ids out of the vocabulary, or too many tokens.
        """
        config = self.backend.config
        if config.language is None:
            raise InputError(
                "this checkpoint has no language model, so it cannot generate; use classify, embed_image or embed_text"
            )
        placeholders = request.token_ids == config.image_token_id
        visual = sum(image.num_tokens for image in request.images)
        if int(placeholders.sum()) != visual:
            raise InputError(
                f"request {index}: image placeholders must equal the visual tokens {visual}, got {int(placeholders.sum())}; "
                "build the prompt with count_tokens(plan)"
            )
        self._check_ids(request.token_ids[~placeholders], "token_ids", index)
        needed, context = request.token_ids.size + request.max_new_tokens, config.language.max_positions
        if needed > context:
            raise InputError(
                f"request {index}: prompt of {request.token_ids.size} tokens ({visual} of them visual) and max_new_tokens="
                f"{request.max_new_tokens} need {needed} positions, but the model has {context}; lower max_visual_tokens, "
                "max_tiles or max_new_tokens, or shorten the prompt"
            )

    def _check_ids(self, token_ids: npt.NDArray[np.integer], name: str, index: int) -> None:
        language = self.backend.config.language
        if (
            language is not None
            and token_ids.size
            and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < language.vocab_size
        ):
            raise InputError(
                f"request {index}: {name} must be in 0..{language.vocab_size - 1}, got {token_ids.min()}..{token_ids.max()}; "
                "use this checkpoint's tokenizer"
            )


class _Row:
    """The progress of one request: its draws, its place in the choice trie, and why it ended."""

    def __init__(self, index: int, request: Request, draft_table: DraftTable | None) -> None:
        self.index = index
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.count = 0
        self.generator = np.random.default_rng(request.seed)
        self.node = None if request.allowed is None else ChoiceTrie(request.allowed).root
        table = draft_table if request.allowed is None else None  # which knows free answers
        self.drafter = Drafter(request.token_ids.tolist(), request.hints, table)
        self.draft = Draft()  # what this step checks

    def guess(self, count: int) -> None:
        """At most `count` guesses, none that the row has no room for, and none behind its end."""
        room = self.request.max_new_tokens - self.count - 1
        self.draft = self.drafter.guess(min(count, room)).before(self.request.stop_ids)

    def take(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """Chooses from logits [1 + guesses, V] of the last token and of the draft, as long as guesses come true."""
        tokens = [self.choose(logits[0])]
        for guess, following in zip(self.draft.tokens, logits[1:], strict=True):
            if self.finish_reason is not None or tokens[-1] != guess:
                break
            tokens.append(self.choose(following))
        self.drafter.record(self.draft, len(tokens) - 1)
        return tokens

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id from logits [V]; see `accept`."""
        request = self.request
        return self.accept(choose_token(logits, request.temperature, request.top_p, self.generator, self._allowed_ids()))

    def accept(self, token_id: int) -> int:
        """Takes this token as the row's next one and gives it back; sets `finish_reason` when it is the last one."""
        request = self.request
        self.count += 1
        self.drafter.add(token_id)
        if self.node is not None:
            self.node = self.node.children.get(token_id)
            if self.node is None or not self.node.children:
                self.finish_reason = "choice" if self.node is not None else "stop_id"
        elif token_id in request.stop_ids:
            self.finish_reason = "stop_id"
        if self.finish_reason != "stop_id" and request.on_token is not None and request.on_token(token_id):
            self.finish_reason = self.finish_reason or "stop_text"
        if self.finish_reason is None and self.count >= request.max_new_tokens:
            self.finish_reason = "length"
        return token_id

    def _allowed_ids(self) -> npt.NDArray[np.int64] | None:
        if self.node is None:
            return None
        ids = list(self.node.children)
        if self.node.complete:
            ids.append(self.request.stop_ids[0])
        return np.array(sorted(ids), dtype=np.int64)


def _shorten(rows: list[_Row], count: int) -> None:
    """Leaves the `count` likeliest guesses of all rows. A draft's chances fall, so what is left of one is its beginning."""
    ranked = sorted(
        ((-chance, place, index) for index, row in enumerate(rows) for place, chance in enumerate(row.draft.chances)),
    )[:count]
    kept = [index for _, _, index in ranked]
    for index, row in enumerate(rows):
        row.draft = row.draft.first(kept.count(index))
