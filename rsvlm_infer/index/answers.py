"""Owns answers about views of an archive from their kept features: no scene is read, no vision encoder runs. Knows no search."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..backends.base import Backend, Embeddings, ImageFeatures, Query, StagedBackend
from ..config import LEVELS, RsvlmConfig
from ..contract import tap_names
from ..engine.checks import check_integer, check_text
from ..engine.engine import Engine
from ..errors import InputError
from ..imagery.pack import without_patches
from ..imagery.plan import TilePlan
from ..models.load import embedder_digest
from ..tasks.answer import AnswerDraft
from ..tasks.caption import CAPTION_PROMPT
from ..tasks.generation import GenerationSettings, build_request, check_labels
from ..tasks.result import Answer
from ..tasks.scene import PreparedScene
from ..text.tokenizer import Tokenizer
from .archive import F32, Archive, Segment
from .encode import kept_taps

PLANNED_BEFORE = (
    "the checkpoint plans by the question, but this view was planned before it; ask the scene for a plan of its own"
)


class Answerer(Protocol):
    """What answering asks of a model; RSVLM has it."""

    tokenizer: Tokenizer
    engine: Engine
    folder: Path | None

    @property
    def backend(self) -> Backend: ...
    @property
    def config(self) -> RsvlmConfig: ...
    def embed_text(self, text: str) -> F32: ...


@functools.lru_cache(maxsize=4)
def embedder_of(folder: Path) -> str:
    """`embedder_digest` of a checkpoint or package, read once in a process: hashing hundreds of megabytes takes a second."""
    return embedder_digest(folder)


def answer_views(
    model: Answerer,
    archive: Archive,
    views: Sequence[str],
    question: str | None = None,
    *,
    choices: Sequence[str] | None = None,
    batch_size: int = 4,
    generation: GenerationSettings | None = None,
) -> Iterator[Answer]:
    """Answers about views in their order, lazily, `batch_size` at a time, from what the vision encoder gave when they were indexed.

    With float32 features an answer is the one that the model gives to the view's pixels, planned without the question. A model that was
    put together without a folder must be of the archive's checkpoint.

    Args:
        views: names as `Hit.view_name` and `Archive.views` have them.
        question: None asks for a caption. choices: the answer is exactly one of them.
        generation: how to continue the prompt; default greedy, at most 64 tokens.

    Raises:
        InputError: an archive without features, a view that it does not have, or words that do not fit. CheckpointError: features of
            another checkpoint, backend or precision.
    """
    backend = model.backend
    if model.folder is not None:
        archive.require_embedder(embedder_of(model.folder))
    archive.require_features(backend.name, backend.precision)
    assert isinstance(backend, StagedBackend)  # it kept the features
    check_integer("batch_size", batch_size)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}; raise it")
    if question is not None:
        check_text("question", question)
        if not question.strip():
            raise InputError("question must not be blank; pass a question, or None for a caption")
    choices = None if choices is None else check_labels(choices, "choices")
    settings = generation or GenerationSettings()
    places = [_place(archive, name) for name in views]
    words = question or CAPTION_PROMPT
    query = None
    if model.config.augmentation is not None:
        query = Query(np.array(model.tokenizer.encode(words), dtype=np.int32), model.embed_text(words))
    warnings = (PLANNED_BEFORE,) if question is not None and model.config.dris.query_aware else ()

    def answers() -> Iterator[Answer]:
        for first in range(0, len(places), batch_size):
            started = time.perf_counter()
            drafts = []
            for segment, view in places[first : first + batch_size]:
                prepared, features = _recalled(segment, view, backend, query)
                prepared = dataclasses.replace(prepared, warnings=prepared.warnings + warnings)
                request, text = build_request(model.tokenizer, model.config, words, features, settings, choices)
                model.engine.check(request)
                drafts.append(AnswerDraft(prepared, features, request, text, waited_ms=0.0))
            waited_ms = (time.perf_counter() - started) * 1e3
            for draft in drafts:
                draft.waited_ms = waited_ms
            for event in model.engine.generate([draft.request for draft in drafts]):
                drafts[event.request_index].record(event)
            yield from (draft.answer() for draft in drafts)

    return answers()


def _place(archive: Archive, name: str) -> tuple[Segment, int]:
    segment_name, _, index = name.partition("/")
    for segment in archive.segments:
        if segment.counts.name == segment_name and index.isdecimal() and int(index) < segment.counts.views:
            return segment, int(index)
    raise InputError(f"archive {archive.folder} has no view {name!r}; pass names of finds of a search in this opened archive")


def _recalled(segment: Segment, view: int, backend: StagedBackend, query: Query | None) -> tuple[PreparedScene, ImageFeatures]:
    """One view as it was prepared, and its visual tokens for this question."""
    started = time.perf_counter()
    kept = segment.features(view)
    plan = TilePlan.from_dict(kept.plan)
    names = kept_taps(backend.config)
    taps = {name: np.asarray(tap, np.float32) for name, tap in zip(names, kept.taps, strict=True)}
    taps = {name: taps.get(name, taps[names[-1]]) for name in tap_names()}  # nothing reads a tap that is not kept
    row = segment.views[view]
    scene = segment.scene(int(row["scene"]))
    whole = (int(row["height"]), int(row["width"])) == (scene.height, scene.width)
    source = scene.source if whole else f"{scene.source} at row {row['row_off']}, column {row['col_off']}"
    packed = without_patches(plan, backend.config, source, scene.gsd_native_m)
    read = time.perf_counter()
    cues, texts = backend.find_cues(_embeddings(segment, view, len(plan.tiles)), query)
    found = time.perf_counter()
    tokens = backend.bridge(taps, packed, cues)
    assert tokens is not None  # features are kept of models that write text, and those have a projector
    features = backend.features_of(tokens)
    encode_ms, augment_ms = (time.perf_counter() - found) * 1e3, (found - read) * 1e3 if query is not None else 0.0
    effective = float(row["gsd_effective_m"])
    prepared = PreparedScene(
        source=source,
        plan=plan,
        num_tokens=packed.num_tokens,
        read_ms=(read - started) * 1e3,
        plan_ms=0.0,
        gsd_native_m=scene.gsd_native_m,
        gsd_effective_m=None if np.isnan(effective) else effective,
        warnings=kept.warnings,
        packed=packed,
        preprocess_ms=0.0,
    )
    return prepared, dataclasses.replace(features, cues=texts, encode_ms=encode_ms, augment_ms=augment_ms)


def _embeddings(segment: Segment, view: int, num_tiles: int) -> Embeddings:
    """As the alignment gave them; an absent level is empty."""
    found = {level: segment.embeddings(level)[segment.rows_of_view(level, view)] for level in LEVELS}
    rows = found["object"]
    objects = rows.reshape(num_tiles, -1, segment.embed_size) if len(rows) else rows
    return Embeddings(objects, found["region"], found["scene"][0])
