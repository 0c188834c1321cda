"""Owns one opened scene and the answers to its windows. Knows the model by its public parts, no output file and no journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..backends.base import ImageFeatures, Query
from ..config import LEVELS
from ..engine.request import Request
from ..errors import InputError
from ..imagery.source import Scene
from ..tasks.answer import AnswerDraft
from ..tasks.classify import choice_prompt, choose_method, classification
from ..tasks.generation import GenerationSettings, build_request, choice_ids, prompt_ids
from ..tasks.result import Timings
from ..tasks.retrieve import alignment_scores, require_alignment
from ..tasks.scene import PreparedScene, RegionScores, prepare_opened, source_name
from .identity import config_hash, content_hash, json_hash
from .reading import WindowPixels, WindowReader
from .record import GridWindow, PixelWindow, SceneHeader, WindowRecord
from .settings import RunSettings
from .windows import Grid, select

if TYPE_CHECKING:
    from ..pipeline import RSVLM

NO_PIXEL = "no valid pixel in this window"
EXACT_PRECISIONS = ("float32", "fp32")  # rows of a batch get the answers that they get alone
EXACT_BACKENDS = ("native",)  # at every precision, bit by bit
_AHEAD_SHARE = 8  # of max_ram_bytes, one part for windows that wait


def open_scene_run(model: RSVLM, source: str | Path | Any, settings: RunSettings | None = None) -> OpenedSceneRun:
    """Opens a scene, fits its stretch, decides its windows. Nothing goes through the model yet.

    Args:
        source: a path, or whatever `open_scene` takes.
        settings: default: one description of the whole scene.

    Raises:
        ImageReadError: the scene cannot be read, or is not allowed. InputError: settings that fit neither the checkpoint nor the scene.
    """
    settings = settings or RunSettings()
    settings.scene.apply(model.config)
    asking = _Asking(model, settings)
    scene = settings.open(source)
    try:
        return OpenedSceneRun(asking, source, scene, settings)
    except BaseException:
        scene.close()
        raise


class OpenedSceneRun:
    """`SceneRun` for one scene and one model. Use it as a context manager, or call `close`. Not for several threads at once."""

    header: SceneHeader
    windows: Sequence[GridWindow]

    def __init__(self, asking: _Asking, source: Any, scene: Scene, settings: RunSettings) -> None:
        self._asking, self._scene, self._settings = asking, scene, settings
        self.source = source_name(source)
        _check_deterministic(scene, settings)
        selection = select(scene, Grid(scene.height, scene.width, settings.grid))
        self.windows = selection.windows
        stretch = ((), ()) if scene.stretch is None else (scene.stretch.low, scene.stretch.high)
        self.header = SceneHeader(
            source=self.source,
            content_hash=content_hash(source, scene),
            height=scene.height,
            width=scene.width,
            count=scene.count,
            dtype=scene.dtype,
            crs=scene.crs_wkt,
            transform=scene.transform,
            gsd_native_m=scene.gsd_native_m,
            stretch_low=stretch[0],
            stretch_high=stretch[1],
            mode=settings.mode,
            query=settings.words,
            model_hash=asking.model_hash,
            prompt_hash=json_hash([settings.mode, *settings.prompts(asking.method)]),
            config_hash=config_hash(asking.model, settings.identity(), stretch, __version__),
            empty_px=selection.empty_px,
            uniform_px=selection.uniform_px,
            lost=scene.lost,
            acquired=scene.acquired,
        )
        ahead = settings.max_ram_bytes // _AHEAD_SHARE
        self._reader = None if settings.grid is None else WindowReader(scene, self.windows, ahead)

    def answer(self, windows: Sequence[GridWindow]) -> list[WindowRecord]:
        """Records of these windows, in their order, as one micro-batch.

        Raises:
            ImageReadError: a window cannot be read. InputError: a prompt that does not fit the model.
        """
        if self._reader is None:
            return [self._asking.about([(place, self._prepare_whole(), None)])[0] for place in windows]
        records: dict[int, WindowRecord] = {}
        seen: list[tuple[GridWindow, PreparedScene, WindowPixels | None]] = []
        for position, (place, pixels) in enumerate(zip(windows, self._reader.take(windows), strict=True)):
            if pixels.mask.any():
                seen.append((place, self._prepare_window(place.window, pixels), pixels))
            else:
                records[position] = WindowRecord(place=place, valid_share=0.0, warnings=(NO_PIXEL,))
        answers = iter(self._asking.about(seen))
        return [records[position] if position in records else next(answers) for position in range(len(windows))]

    def overview(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """The scene in small, for pictures: rgb uint8 [h, w, 3], mask bool [h, w]. It costs no reading beyond that of the stretch."""
        return self._scene.overview()

    def close(self) -> None:
        """Frees what is held open."""
        if self._reader is not None:
            self._reader.close()
        self._scene.close()

    def __enter__(self) -> OpenedSceneRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare_whole(self) -> PreparedScene:
        asking = self._asking
        return prepare_opened(self._scene, self.source, asking.config, self._settings.scene, asking.region_scores)

    def _prepare_window(self, window: PixelWindow, pixels: WindowPixels) -> PreparedScene:
        asking = self._asking
        scene = pixels.scene(self._scene, window)
        settings = dataclasses.replace(self._settings.scene, bands=None)
        prepared = prepare_opened(scene, scene.name, asking.config, settings, asking.region_scores)
        return dataclasses.replace(prepared, read_ms=prepared.read_ms + pixels.read_ms)


class _Asking:
    """One model and one question: prepared images in, records out."""

    def __init__(self, model: RSVLM, settings: RunSettings) -> None:
        self.model, self.settings = model, settings
        self.config = settings.planning(model.config)
        self.method = ""
        if settings.mode == "classify":
            self.method = choose_method(settings.method, model.config)
        elif settings.mode == "find":
            self.method = "alignment"
            require_alignment(model.config)
        elif model.config.language is None:
            raise InputError(
                f'mode "{settings.mode}" needs a language model, which this checkpoint lacks; use mode "classify" or "find"'
            )
        self.model_hash = model.digest
        texts = settings.prompts("alignment") if self.method == "alignment" else ()
        self._texts = model.embed_text(texts) if texts else np.zeros((0, 0), np.float32)  # [N, De]
        self._query = self._augmentation_query()
        self.region_scores = self._region_scores()
        exact = model.backend.precision in EXACT_PRECISIONS or model.backend.name.partition(":")[0] in EXACT_BACKENDS
        self._together = exact and not settings.deterministic

    def about(self, seen: Sequence[tuple[GridWindow, PreparedScene, WindowPixels | None]]) -> list[WindowRecord]:
        """Records of prepared images. Each is encoded on its own, because its embeddings must not depend on its neighbours."""
        encoded = [(place, prepared, pixels, self._encode(prepared)) for place, prepared, pixels in seen]
        if self.settings.mode in ("describe", "ask"):
            return self._told(encoded)
        return [self._classified(*each) if self.settings.mode == "classify" else self._found(*each) for each in encoded]

    def _encode(self, prepared: PreparedScene) -> ImageFeatures:
        return self.model.backend.encode([prepared.packed], [self._query])[0]

    def _told(
        self, encoded: Sequence[tuple[GridWindow, PreparedScene, WindowPixels | None, ImageFeatures]]
    ) -> list[WindowRecord]:
        settings, engine = self.settings, self.model.engine
        generation = GenerationSettings(max_new_tokens=settings.max_new_tokens)
        drafts = []
        for _, prepared, _, features in encoded:
            request, text = build_request(
                self.model.tokenizer, self.config, settings.words, features, generation, settings.choices or None
            )
            engine.check(request)
            drafts.append(AnswerDraft(prepared, features, request, text, waited_ms=0.0))
        for group in [drafts] if self._together else [[draft] for draft in drafts]:
            for event in engine.generate([draft.request for draft in group]):
                group[event.request_index].record(event)
        records = []
        for (place, prepared, pixels, _), draft in zip(encoded, drafts, strict=True):
            answer = draft.answer()
            records.append(
                dataclasses.replace(
                    self._record(place, prepared, pixels, answer.timings),
                    text=answer.text,
                    num_prompt_tokens=answer.tokens.prompt,
                    num_new_tokens=answer.tokens.generated,
                    finish_reason=answer.finish_reason,
                )
            )
        return records

    def _classified(
        self, place: GridWindow, prepared: PreparedScene, pixels: WindowPixels | None, features: ImageFeatures
    ) -> WindowRecord:
        labels, steps, prompt_tokens = self.settings.labels, (0.0, 0.0), 0
        if self.method == "alignment":
            alignment = require_alignment(self.config)
            raw: npt.NDArray[Any] = alignment_scores(self.model.backend.embed_image(features), self._texts, alignment)
            scale = alignment.logit_scale
        else:
            ids = prompt_ids(self.model.tokenizer, self.config, choice_prompt(labels), features.num_tokens)
            scored = self.model.engine.score_choices(Request(ids, (features,)).prompt, choice_ids(self.model.tokenizer, labels))
            raw, scale, steps = scored.log_probs, 1.0, (scored.prefill_ms, scored.decode_ms)
            prompt_tokens = ids.size - features.num_tokens
        found = classification(labels, raw, scale, self.method, source=prepared.source)
        timings = _timings(prepared, features, *steps)
        return dataclasses.replace(
            self._record(place, prepared, pixels, timings),
            label=found.label,
            score=found.scores[found.label],
            scores=found.scores,
            num_prompt_tokens=prompt_tokens,
        )

    def _found(
        self, place: GridWindow, prepared: PreparedScene, pixels: WindowPixels | None, features: ImageFeatures
    ) -> WindowRecord:
        alignment = require_alignment(self.config)
        embeddings = self.model.backend.embed_image(features)
        score = float(alignment_scores(embeddings, self._texts, alignment)[0])
        record = self._record(place, prepared, pixels, _timings(prepared, features))
        cited = record.cited
        if len(embeddings.region) == len(prepared.plan.tiles) > 1:  # the places that fit best come first
            order = np.argsort(-(embeddings.region[1:] @ self._texts[0]), kind="stable")
            cited = tuple(cited[index] for index in order)
        return dataclasses.replace(record, score=score, cited=cited)

    def _record(
        self, place: GridWindow, prepared: PreparedScene, pixels: WindowPixels | None, timings: Timings
    ) -> WindowRecord:
        """What holds in every mode."""
        plan = prepared.plan
        return WindowRecord(
            place=place,
            cited=tuple(_cited(place.window, tile) for tile in plan.tiles[1:]),  # none: it looked at its window as a whole
            gsd_effective_m=prepared.gsd_effective_m,
            valid_share=prepared.valid_share if pixels is None else pixels.valid_share,
            num_visual_tokens=prepared.num_tokens,
            warnings=prepared.warnings,
            timings=timings,
        )

    def _augmentation_query(self) -> Query | None:
        """The words as the augmentation reads them; classify and find encode without, as `RSVLM` does."""
        model, words = self.model, self.settings.words
        if self.settings.mode not in ("describe", "ask") or model.config.augmentation is None:
            return None
        return Query(np.array(model.tokenizer.encode(words), dtype=np.int32), model.embed_text(words))

    def _region_scores(self) -> RegionScores | None:
        """How tiles meet the question, for a planner that is aware of it."""
        alignment, backend = self.config.alignment, self.model.backend
        asked = self.settings.mode in ("ask", "find") or (self.settings.mode == "describe" and bool(self.settings.query))
        if not asked or not self.config.dris.query_aware or alignment is None or LEVELS[1] not in alignment.levels:
            return None
        words: npt.NDArray[np.float32] = self.model.embed_text(self.settings.words)
        return lambda packed: backend.embed_image(backend.encode([packed])[0]).region @ words


def _check_deterministic(scene: Scene, settings: RunSettings) -> None:
    if not settings.deterministic or not scene.stretch_from_scene:
        return
    assert scene.stretch is not None
    low, high = (",".join(f"{value:g}" for value in edge) for edge in (scene.stretch.low, scene.stretch.high))
    raise InputError(
        f'deterministic needs a stretch that does not come from the scene, got "{settings.stretch}" for {scene.name} with '
        f"{scene.dtype} values; fix it, for example to this scene's own percentiles with --stretch {low}:{high}"
    )


def _cited(window: PixelWindow, tile: Any) -> PixelWindow:
    """A tile of a window in scene pixels, cut at the window's rim."""
    top, left = max(tile.row_off, 0), max(tile.col_off, 0)
    bottom, right = min(tile.row_off + tile.height, window.height), min(tile.col_off + tile.width, window.width)
    return PixelWindow(window.row_off + top, window.col_off + left, bottom - top, right - left)


def _timings(prepared: PreparedScene, features: ImageFeatures, prefill_ms: float = 0.0, decode_ms: float = 0.0) -> Timings:
    """Without a first token: no text was written."""
    return Timings(
        prepared.read_ms,
        prepared.plan_ms,
        prepared.preprocess_ms,
        features.encode_ms,
        features.augment_ms,
        prefill_ms,
        decode_ms,
    )
