"""Answers from kept features are those of the pixels, on every backend, without scenes and without the vision encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_export.native import export_native
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import CheckpointError, InputError
from rsvlm_infer.index.answers import PLANNED_BEFORE, answer_views
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.index.encode import EncodeSettings, content_hash, opened
from rsvlm_infer.index.search import ArchiveQuery, search
from rsvlm_infer.index.writer import ArchiveWriter
from rsvlm_infer.models.load import embedder_digest
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.generation import GenerationSettings
from rsvlm_infer.tasks.scene import SceneSettings
from tests.export.packages import SPEAKING, make_pair

WINDOW = 90
SHAPES = {"small": (40, 50), "tall": (88, 33), "cut": (60, 150)}  # the last is cut in two windows
QUESTIONS = ("Is there a ship?", "How many trees are there?", None)
SHORT = GenerationSettings(max_new_tokens=12)
VARIANTS: dict[str, RsvlmConfig] = {
    "full": SPEAKING,
    "augmented": dataclasses.replace(SPEAKING, experts=None),
    "plain": dataclasses.replace(SPEAKING, experts=None, augmentation=None),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    files = {}
    for name, shape in SHAPES.items():
        coarse = generator.integers(0, 256, (-(-shape[0] // 5), -(-shape[1] // 5), 3), dtype=np.uint8)
        files[name] = folder / f"{name}.png"
        Image.fromarray(coarse.repeat(5, axis=0).repeat(5, axis=1)[: shape[0], : shape[1]]).save(files[name])
    return files


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RSVLM:
    variant, backend = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    pair = make_pair(folder, VARIANTS[variant])
    if backend == "native":
        return RSVLM.from_pretrained(export_native(pair.checkpoint, folder / "native", "fp32"))
    return RSVLM.from_pretrained(pair.checkpoint if backend == "eager" else pair.package, backend)


def made(folder: Path, model: RSVLM, files: list[Path], **changes: Any) -> Archive:
    settings = EncodeSettings(changes.pop("scene", SceneSettings()), WINDOW, **{"features": "float32", **changes})
    assert model.config.alignment is not None
    assert model.folder is not None
    with ArchiveWriter(
        folder, embedder_digest(model.folder), model.config.alignment.embed_size, settings.encoding_by(model)
    ) as writer:
        for file in files:
            with opened(file, content_hash(file), model, settings) as scene:
                writer.add(scene.record, scene.views())
    return Archive.open(folder)


def pixels(images: dict[str, Path], archive: Archive) -> list[np.ndarray]:
    """What each view shows, in their order."""
    shown = []
    for segment in archive.segments:
        for row in segment.views:
            with Image.open(segment.scene(int(row["scene"])).source) as image:
                whole = np.asarray(image)
            shown.append(
                whole[row["row_off"] : row["row_off"] + row["height"], row["col_off"] : row["col_off"] + row["width"]].copy()
            )
    return shown


ALL = ["full-eager", "full-native", "full-onnx", "augmented-eager", "plain-eager", "plain-native", "augmented-onnx"]


@pytest.mark.parametrize("tiling", ["dris", "anyres", "fixed"])
@pytest.mark.parametrize("model", ALL, indirect=True)
def test_answers_are_those_of_the_pixels(
    model: RSVLM, tiling: Any, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = made(tmp_path, model, list(images.values()), scene=SceneSettings(tiling=tiling))
    views = list(archive.views())
    assert len(views) == 4
    shown = pixels(images, archive)
    truth = {}
    for question in QUESTIONS:
        ask = (
            model.caption
            if question is None
            else lambda image, question=question, **options: model.ask(image, question, **options)
        )
        truth[question] = [ask(image, tiling=tiling, max_new_tokens=12) for image in shown]
    assert len({answer.token_ids for answers in truth.values() for answer in answers}) > 4, "images and questions matter"

    def refused(*_: Any) -> Any:
        raise AssertionError("the vision encoder ran")

    monkeypatch.setattr(type(model.backend), "encode", refused)
    monkeypatch.setattr(type(model.backend), "encode_tiles", refused)
    monkeypatch.setattr(Image, "open", refused)
    for question, expected in truth.items():
        found = list(answer_views(model, archive, views, question, batch_size=3, generation=SHORT))
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
        assert [answer.cues for answer in found] == [answer.cues for answer in expected]
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
        assert [answer.plan for answer in found] == [answer.plan for answer in expected]
        assert [answer.warnings for answer in found] == [answer.warnings for answer in expected]
    sources = [answer.source for answer in found]
    assert sources[:2] == [str(images["small"]), str(images["tall"])]
    assert sources[2:] == [f"{images['cut']} at row 0, column {column}" for column in (0, 75)]
    choices = ["yes", "no"]
    chosen = list(answer_views(model, archive, views[:1], QUESTIONS[0], choices=choices))
    assert chosen[0].text in choices


@pytest.mark.parametrize("model", ["full-eager", "plain-eager"], indirect=True)
def test_what_is_kept_is_what_answering_reads(model: RSVLM, images: dict[str, Path], tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", model, [images["small"]])
    half = made(tmp_path / "half", model, [images["small"]], features="float16")
    levels = 1 if model.config.experts is None else 3
    patches = whole.segments[0].counts.patches
    assert patches == model.plan(str(images["small"])).plan.num_patches
    exact = whole.segments[0].features(0)
    assert exact.taps.shape == (levels, patches, model.config.vision.hidden_size)
    size = exact.taps.size
    assert (tmp_path / "whole" / "segments" / "000001" / "features.f32").stat().st_size == 4 * size
    assert (tmp_path / "half" / "segments" / "000001" / "features.f16").stat().st_size == 2 * size
    rounded = half.segments[0].features(0)
    np.testing.assert_array_equal(rounded.taps, exact.taps.astype(np.float16))
    assert rounded.plan == exact.plan
    assert len(list(answer_views(model, half, list(half.views()), "What?", generation=SHORT))) == 1
    plain = made(tmp_path / "without", model, [images["small"]], features=None)
    for level in ("object", "region", "scene"):  # the same embeddings with features and without
        np.testing.assert_array_equal(plain.segments[0].embeddings(level), whole.segments[0].embeddings(level))


@pytest.mark.parametrize("model", ["full-eager"], indirect=True)
def test_finds_lead_to_their_views(model: RSVLM, images: dict[str, Path], tmp_path: Path) -> None:
    archive = made(tmp_path, model, list(images.values()))
    for level in ("all", "scene", "region", "object"):
        result = search(archive, ArchiveQuery(level, model.embed_text("water")), 100)
        answers = answer_views(model, archive, [hit.view_name for hit in result.hits], "What?", generation=SHORT)
        for hit, answer in zip(result.hits, answers, strict=True):
            row, col, height, width = hit.view
            assert answer.plan is not None
            assert (answer.plan.scene_height, answer.plan.scene_width) == (height, width)
            assert answer.source.startswith(hit.scene.source)
            assert (f"row {row}, column {col}" in answer.source) == (width < hit.scene.width)


@pytest.mark.parametrize("model", ["full-eager"], indirect=True)
def test_what_cannot_be_answered_is_refused(
    model: RSVLM, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = made(tmp_path / "a", model, [images["small"]])
    views = list(archive.views())
    without = made(tmp_path / "without", model, [images["small"]], features=None)
    with pytest.raises(InputError, match=r"keeps no features to answer from; make it with rsvlm index --features"):
        answer_views(model, without, views, "What?")
    with pytest.raises(InputError, match="question must not be blank"):
        answer_views(model, archive, views, " ")
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        answer_views(model, archive, views, batch_size=0)
    for name in ("000001/1", "000009/0", "000001/-1", "x"):
        with pytest.raises(InputError, match=f"has no view '{name}'"):
            answer_views(model, archive, [name])
    with pytest.raises(InputError, match=r"was encoded in another way: features \{.*\} is now None"):
        made(tmp_path / "a", model, [images["tall"]], features=None)
    with pytest.raises(InputError, match=r"was encoded in another way: features None is now \{"):
        made(tmp_path / "without", model, [images["tall"]])
    with pytest.raises(InputError, match='features must be "float32" or "float16", got'):
        made(tmp_path / "b", model, [images["tall"]], features="int8")
    manifest = archive.manifest
    archive.manifest = dataclasses.replace(manifest, embedder="f" * 64)
    with pytest.raises(CheckpointError, match="was encoded by checkpoint ffffffffffff, it cannot be used with checkpoint"):
        answer_views(model, archive, views, "What?")
    archive.manifest = manifest
    monkeypatch.setattr(model.backend, "precision", "bfloat16")
    with pytest.raises(
        CheckpointError, match="keeps features of backend eager at float32, backend eager at bfloat16 cannot go on"
    ):
        answer_views(model, archive, views, "What?")


@pytest.mark.parametrize("model", ["full-eager"], indirect=True)
def test_a_plan_without_the_question_is_said(model: RSVLM, images: dict[str, Path], tmp_path: Path) -> None:
    archive = made(tmp_path, model, [images["small"]])
    assert isinstance(model.backend, EagerBackend)
    dris = dataclasses.replace(model.config.dris, query_aware=True)
    aware = EagerBackend(model.backend.model, knowledge=model.backend.knowledge)
    aware.config = dataclasses.replace(model.config, dris=dris)
    other = RSVLM(aware, model.tokenizer)
    (asked,) = answer_views(other, archive, list(archive.views()), "What?", generation=SHORT)
    (told,) = answer_views(other, archive, list(archive.views()), generation=SHORT)
    assert PLANNED_BEFORE in asked.warnings
    assert PLANNED_BEFORE not in told.warnings


@pytest.mark.parametrize("model", ["full-eager"], indirect=True)
def test_features_beyond_float16_are_refused(
    model: RSVLM, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(model.backend).encode_tiles  # type: ignore[attr-defined]

    def large(self: Any, scenes: Any) -> Any:
        found = encode(self, scenes)
        found[0]["tap_scene"][0, 0] = 1e5
        return found

    monkeypatch.setattr(type(model.backend), "encode_tiles", large)
    with pytest.raises(InputError, match=r"features must be finite float16 numbers, they reach 1e\+05; use --features float32"):
        made(tmp_path / "half", model, [images["small"]], features="float16")
    assert not list(Archive.open(tmp_path / "half").scenes())
    assert len(list(made(tmp_path / "whole", model, [images["small"]]).scenes())) == 1
