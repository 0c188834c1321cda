"""Owns RSVLM, the class that users meet: images and words in, answers out. Knows no framework and no command line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from .backends import load_backend, require_backend
from .backends.base import Backend, DraftingBackend, Embeddings, ImageFeatures, Query
from .config import LEVELS, RsvlmConfig, Tiling
from .contract import DRAFTS
from .engine.checks import check_integer, check_text, check_texts
from .engine.engine import Engine
from .engine.request import Request
from .errors import CheckpointError, InputError, RsvlmError
from .models.checkpoint import folder_digest
from .models.draft_table import DraftTable
from .models.package import Package, is_package
from .scenes.answers import DEFAULT_BATCH, SceneAnswers
from .scenes.record import Mode
from .scenes.run import open_scene_run
from .scenes.settings import RunSettings
from .tasks.answer import AnswerDraft
from .tasks.caption import CAPTION_PROMPT
from .tasks.classify import LABEL_TEMPLATE, Method, choice_prompt, choose_method, classification, label_prompts
from .tasks.generation import GenerationSettings, build_request, check_labels, choice_ids, prompt_ids
from .tasks.result import Answer, Classification, Timings
from .tasks.retrieve import alignment_scores, require_alignment, text_ids
from .tasks.scene import PreparedScene, RegionScores, ScenePlan, SceneSettings, plan_image, prepare_scene, source_name
from .text.tokenizer import Tokenizer

DEFAULT_NAME = "rsvlm-135m"


class SceneOptions(TypedDict, total=False):
    """How to read and plan an image; what is left out is the checkpoint's own value. See `SceneSettings`."""

    bands: tuple[int, ...] | None
    max_pixels: int | None
    tiling: Tiling | None
    max_tiles: int | None
    max_visual_tokens: int | None


class AnswerOptions(SceneOptions, total=False):
    """Also how to generate. See `GenerationSettings`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | Sequence[str]


def default_checkpoint() -> Path:
    """Where `rsvlm pull` puts the default checkpoint: $RSVLM_HOME/rsvlm-135m, or ~/.cache/rsvlm/rsvlm-135m."""
    home = os.environ.get("RSVLM_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "rsvlm") / DEFAULT_NAME


class AnswerStream(Iterator[str]):
    """Pieces of one answer's text as they are generated. They join to the text of the answer that comes without streaming."""

    def __init__(self, pieces: Iterator[str], draft: AnswerDraft) -> None:
        self._pieces = pieces
        self._draft = draft

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream is exhausted.

        Raises:
            InputError: the stream still has pieces.
        """
        if self._draft.finish_reason is None:
            raise InputError("answer is known only when the stream is exhausted; iterate to the end first")
        return self._draft.answer()


class RSVLM:
    """A loaded model. Not safe for use from several threads at once.

    `folder` is the checkpoint or package that it was loaded from, None when it was put together otherwise.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        draft_table: DraftTable | None = None,
        folder: Path | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.folder = folder
        self.engine = Engine(backend, max_batch, draft_table=draft_table)
        self._last_query: tuple[str, Query] | None = None
        self._label_texts: tuple[str, ...] = ()
        self._label_embeddings: npt.NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, backend: str = "auto", precision: str = "auto") -> RSVLM:
        """Loads a checkpoint folder or an exported package; None takes the default checkpoint, which `rsvlm pull` makes.

        Raises:
            CheckpointError: no such folder, or a damaged one. BackendError, MissingDependencyError: it cannot run here.
        """
        folder = default_checkpoint() if path is None else Path(path).expanduser()
        if not folder.is_dir():
            step = "run `rsvlm pull` to make the default checkpoint" if path is None else "pass a folder that holds config.json"
            raise CheckpointError(f"checkpoint folder {folder} does not exist; {step}")
        if is_package(folder):
            require_backend(folder, backend, precision)  # before much is read
            with Package.open(folder).verifying():  # in other threads: hashes take about as long as the tokenizer
                tokenizer = Tokenizer.from_folder(folder)
            loaded = load_backend(folder, backend, precision, verify=False)
        else:
            loaded, tokenizer = load_backend(folder, backend, precision), Tokenizer.from_folder(folder)
        table, drafts = None, folder / DRAFTS
        if isinstance(loaded, DraftingBackend) and loaded.config.language is not None and drafts.is_file():
            table = DraftTable.load(drafts, loaded.config.language.vocab_size)
        return cls(loaded, tokenizer, draft_table=table, folder=folder)

    @property
    def config(self) -> RsvlmConfig:
        return self.backend.config

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the folder that this model was loaded from; of its config when it was put together otherwise."""
        if self.folder is not None:
            return folder_digest(self.folder)
        return hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode()).hexdigest()

    @overload
    def caption(
        self, image: Any, *, prompt: str | None = None, stream: Literal[False] = False, **options: Unpack[AnswerOptions]
    ) -> Answer: ...

    @overload
    def caption(
        self, image: Any, *, prompt: str | None = None, stream: Literal[True], **options: Unpack[AnswerOptions]
    ) -> AnswerStream: ...

    def caption(
        self, image: Any, *, prompt: str | None = None, stream: bool = False, **options: Unpack[AnswerOptions]
    ) -> Answer | AnswerStream:
        """One sentence about an image: a path, bytes, a PIL image, an array [H, W] or [H, W, C], or an open rasterio dataset.

        With `stream` an iterator of text pieces; its `answer` is the whole answer at the end.

        Raises:
            ImageReadError: the image cannot be read. InputError: an option out of its range, or a prompt that does not fit.
        """
        return self._one(image, prompt, None, stream, options)

    @overload
    def ask(
        self,
        image: Any,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[AnswerOptions],
    ) -> Answer: ...

    @overload
    def ask(
        self,
        image: Any,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        stream: Literal[True],
        **options: Unpack[AnswerOptions],
    ) -> AnswerStream: ...

    def ask(
        self,
        image: Any,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        stream: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Answer | AnswerStream:
        """The answer to a question about an image; with `choices` it is exactly one of them. See `caption` for the rest."""
        return self._one(image, _checked_question(question), choices, stream, options)

    def caption_many(
        self,
        images: Iterable[Any],
        *,
        prompt: str | None = None,
        batch_size: int = 4,
        strict: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[Answer]:
        """Captions in the order of the images, read lazily, `batch_size` at a time.

        An image that cannot be used gives an `Answer` with `error` set and does not disturb the others; `strict` raises instead.
        """
        return self._many(images, prompt, None, batch_size, strict, options)

    def ask_many(
        self,
        images: Iterable[Any],
        question: str,
        *,
        choices: Sequence[str] | None = None,
        batch_size: int = 4,
        strict: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[Answer]:
        """The same question about many images; see `caption_many`."""
        return self._many(images, _checked_question(question), choices, batch_size, strict, options)

    def classify(
        self,
        image: Any,
        labels: Sequence[str],
        *,
        method: Method = "auto",
        template: str = LABEL_TEMPLATE,
        **options: Unpack[SceneOptions],
    ) -> Classification:
        """The label that fits an image best.

        method: "alignment" compares embeddings with `template` filled with each label; "language" takes each label's mean
        log-probability per token as the answer; "auto" is alignment when the checkpoint has it.

        Raises:
            InputError: fewer than two labels, repeated or blank ones, or a method that the checkpoint has no parts for.
        """
        labels = check_labels(labels, "labels")
        chosen = choose_method(method, self.config)
        prompts = label_prompts(labels, template)
        scene, _ = _settings(options)
        prepared = prepare_scene(image, self.config, scene)
        features = self._encode([prepared], None)[0]
        if chosen == "alignment":
            alignment = require_alignment(self.config)
            raw: npt.NDArray[Any] = alignment_scores(self.backend.embed_image(features), self._embed_labels(prompts), alignment)
            scale, steps = alignment.logit_scale, (0.0, 0.0)
        else:
            ids = prompt_ids(self.tokenizer, self.config, choice_prompt(labels), features.num_tokens)
            scored = self.engine.score_choices(Request(ids, (features,)).prompt, choice_ids(self.tokenizer, labels))
            raw, scale, steps = scored.log_probs, 1.0, (scored.prefill_ms, scored.decode_ms)
        return classification(
            labels,
            raw,
            scale,
            chosen,
            source=prepared.source,
            plan=prepared.plan,
            timings=Timings(
                prepared.read_ms, prepared.plan_ms, prepared.preprocess_ms, features.encode_ms, features.augment_ms, *steps
            ),
            gsd_native_m=prepared.gsd_native_m,
            gsd_effective_m=prepared.gsd_effective_m,
            warnings=prepared.warnings,
            cues=features.cues,
        )

    def score(self, image: Any, texts: Sequence[str], **options: Unpack[SceneOptions]) -> npt.NDArray[np.float32]:
        """Alignment score [N] of an image with texts, by the checkpoint's level weights; (1, 0, 0) is the plain CLIP score.

        Raises:
            InputError: texts that are no list of texts, or that are empty.
        """
        alignment = require_alignment(self.config)
        embedded = self.embed_text(check_texts("texts", texts))  # first, because it refuses bad texts before the image is read
        return alignment_scores(self.embed_levels(image, **options), embedded, alignment)

    def embed_image(
        self, image: Any, *, level: Literal["object", "region", "scene"] = "scene", **options: Unpack[SceneOptions]
    ) -> npt.NDArray[np.float32]:
        """L2-normalised embedding of an image: scene [De], region [T, De] or object [T, k, De].

        Raises:
            InputError: an unknown level, or one that the checkpoint has no head for.
        """
        levels = require_alignment(self.config).levels
        if level not in levels:
            raise InputError(f"level must be one of {list(levels)} for this checkpoint, got {level!r}; choose one of them")
        embedding: npt.NDArray[np.float32] = getattr(self.embed_levels(image, **options), level)
        return embedding

    def embed_levels(self, image: Any, **options: Unpack[SceneOptions]) -> Embeddings:
        """All alignment embeddings of an image; an absent level is empty."""
        require_alignment(self.config)
        scene, _ = _settings(options)
        return self.backend.embed_image(self._encode([prepare_scene(image, self.config, scene)], None)[0])

    def embed_text(self, text: str | Sequence[str]) -> npt.NDArray[np.float32]:
        """L2-normalised embedding of a text [De], or of several [N, De].

        Raises:
            InputError: no text, a blank or a too long one.
        """
        require_alignment(self.config)
        texts = check_texts("text", [text] if isinstance(text, str) else text)
        if not texts:
            raise InputError("text must hold at least one text, got none; pass some words")
        ids = [text_ids(self.tokenizer, self.config, each) for each in texts]
        embeddings = np.concatenate([self.backend.embed_text(ids[first : first + 64]) for first in range(0, len(ids), 64)])
        return np.asarray(embeddings[0] if isinstance(text, str) else embeddings, dtype=np.float32)

    def plan(self, image: Any, **options: Unpack[SceneOptions]) -> ScenePlan:
        """What the planner decides about an image, without encoding it."""
        return plan_image(image, self.config, _settings(options)[0])

    def scene(
        self, source: Any, mode: Mode = "describe", query: str = "", *, batch_size: int = DEFAULT_BATCH, **options: Any
    ) -> SceneAnswers:
        """Answers about a whole scene, window by window, as a lazy iterator of records that also has the `header`.

        source: a path, or what `caption` takes. mode, query and options are the fields of `scenes.settings.RunSettings`: without
        `window_px` there is one record for the whole scene.

        Raises:
            ImageReadError: the scene cannot be read. InputError: settings that fit neither the checkpoint nor the scene.
        """
        run = open_scene_run(self, source, RunSettings(mode=mode, query=query, **options))
        try:
            return SceneAnswers(run, batch_size)
        except BaseException:
            run.close()
            raise

    def _one(
        self, image: Any, prompt: str | None, choices: Sequence[str] | None, stream: bool, options: AnswerOptions
    ) -> Answer | AnswerStream:
        self._require_language()
        choices = _checked_words(prompt, choices)
        draft = self._drafts([image], prompt, choices, True, *_settings(options))[0]
        assert isinstance(draft, AnswerDraft)  # strict: a failure was raised
        pieces = AnswerStream(self._pieces(draft), draft)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.answer

    def _pieces(self, draft: AnswerDraft) -> Iterator[str]:
        for event in self.engine.generate([draft.request]):
            draft.record(event)
            piece = draft.text.take()
            if piece:
                yield piece

    def _many(
        self,
        images: Iterable[Any],
        prompt: str | None,
        choices: Sequence[str] | None,
        batch_size: int,
        strict: bool,
        options: AnswerOptions,
    ) -> Iterator[Answer]:
        check_integer("batch_size", batch_size)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}; raise it")
        if isinstance(images, (str, bytes, Path)):
            raise InputError(
                f"images must be several images, got the single {source_name(images)!r}; pass a list, or use caption"
            )
        if not isinstance(images, Iterable):
            raise InputError(f"images must be several images, got {type(images).__name__}; pass a list of them")
        choices = _checked_words(prompt, choices)
        self._require_language()
        scene, generation = _settings(options)
        remaining = iter(images)

        def answers() -> Iterator[Answer]:
            while batch := list(itertools.islice(remaining, batch_size)):
                drafts = self._drafts(batch, prompt, choices, strict, scene, generation)
                running = [draft for draft in drafts if isinstance(draft, AnswerDraft)]
                for event in self.engine.generate([draft.request for draft in running]):
                    running[event.request_index].record(event)
                yield from (draft.answer() if isinstance(draft, AnswerDraft) else draft for draft in drafts)

        return answers()

    def _drafts(
        self,
        images: Sequence[Any],
        prompt: str | None,
        choices: Sequence[str] | None,
        strict: bool,
        scene: SceneSettings,
        generation: GenerationSettings,
    ) -> list[AnswerDraft | Answer]:
        """Everything before the language model, for one batch: a draft for each image, or an Answer that holds its error."""
        started = time.perf_counter()
        region_scores = self._region_scores(prompt)
        prepared: list[PreparedScene | Answer] = []
        for image in images:
            try:
                prepared.append(prepare_scene(image, self.config, scene, region_scores))
            except RsvlmError as error:
                if strict:
                    raise
                prepared.append(Answer(source=source_name(image), error=error))
        usable = [item for item in prepared if isinstance(item, PreparedScene)]
        features = iter(self._encode(usable, prompt or CAPTION_PROMPT))
        drafts: list[AnswerDraft | Answer] = []
        for item in prepared:
            if isinstance(item, Answer):
                drafts.append(item)
                continue
            feature = next(features)
            try:
                request, text = build_request(
                    self.tokenizer, self.config, prompt or CAPTION_PROMPT, feature, generation, choices
                )
                self.engine.check(request)
                drafts.append(AnswerDraft(item, feature, request, text, waited_ms=0.0))
            except InputError as error:
                if strict:
                    raise
                drafts.append(Answer(source=item.source, error=error))
        waited_ms = (time.perf_counter() - started) * 1e3
        for draft in drafts:
            if isinstance(draft, AnswerDraft):
                draft.waited_ms = waited_ms
        return drafts

    def _require_language(self) -> None:
        if self.config.language is None:
            raise InputError(
                "this checkpoint has no language model, so it cannot write text; use classify, embed_image or embed_text"
            )

    def _encode(self, prepared: Sequence[PreparedScene], text: str | None) -> list[ImageFeatures]:
        if not prepared:
            return []
        query = None if text is None or self.config.augmentation is None else self._query(text)
        return self.backend.encode([item.packed for item in prepared], [query] * len(prepared))

    def _region_scores(self, text: str | None) -> RegionScores | None:
        """How tiles meet the user's own words; None when the checkpoint does not plan by them or there are none."""
        alignment = self.config.alignment
        if text is None or not self.config.dris.query_aware or alignment is None or LEVELS[1] not in alignment.levels:
            return None
        embedding = self._query(text).embedding
        return lambda packed: self.backend.embed_image(self.backend.encode([packed])[0]).region @ embedding

    def _query(self, text: str) -> Query:
        """The last prompt's query is kept, because many images are asked the same: embedding it is a prefill of its own."""
        if self._last_query is None or self._last_query[0] != text:
            self._last_query = text, Query(np.array(self.tokenizer.encode(text), dtype=np.int32), self.embed_text(text))
        return self._last_query[1]

    def _embed_labels(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, De]; the last label set is kept, because many images are classified by the same labels."""
        if tuple(prompts) != self._label_texts:
            self._label_embeddings = self.embed_text(prompts)
            self._label_texts = tuple(prompts)
        return self._label_embeddings


def _settings(options: SceneOptions | AnswerOptions) -> tuple[SceneSettings, GenerationSettings]:
    """Checked settings from keyword options; an unknown keyword is a TypeError, as for any Python call."""
    scene_names = {item.name for item in fields(SceneSettings)}
    values: dict[str, Any] = dict(options)
    scene = SceneSettings(**{name: value for name, value in values.items() if name in scene_names})
    return scene, GenerationSettings(**{name: value for name, value in values.items() if name not in scene_names})


def _checked_words(prompt: str | None, choices: Sequence[str] | None) -> list[str] | None:
    """The choices as a list. Raises InputError for words of the wrong type, before any image is read."""
    if prompt is not None:
        check_text("prompt", prompt)
    return None if choices is None else check_labels(choices, "choices")


def _checked_question(question: str) -> str:
    check_text("question", question)
    if not question.strip():
        raise InputError("question must not be blank; pass a question, or use caption")
    return question
