"""One opened scene: what it asks of the model, what its records and header say, and that an answer depends on its window alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.config import AlignmentConfig, DrisConfig
from rsvlm_infer.errors import ImageReadError, InputError
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.scenes.record import PixelWindow, SceneRun, WindowRecord
from rsvlm_infer.scenes.run import NO_PIXEL, OpenedSceneRun, open_scene_run
from rsvlm_infer.scenes.settings import RunSettings
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from tests.scenes.telling_scenes import SIDE, fields, telling_model, write_scene
from tests.tasks.telling_model import TellingBackend, load_tokenizer, telling_config

pytest.importorskip("rasterio")

MAP = [["red", "green", "blue"], ["blue", "none", "red"]]
GRID = {"window_px": SIDE}


@pytest.fixture
def model(tmp_path: Path) -> RSVLM:
    return telling_model(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "a.tif", fields(MAP), nodata=0)


def answers(model: RSVLM, path: Path, **settings: object) -> list[WindowRecord]:
    with open_scene_run(model, path, RunSettings(**settings)) as run:  # type: ignore[arg-type]
        return run.answer(run.windows)


def shown(record: WindowRecord) -> dict[str, object]:
    """What must not change: everything but times."""
    return record.to_dict()


def test_a_run_is_a_scene_run(model: RSVLM, path: Path) -> None:
    run: SceneRun = open_scene_run(model, path)
    run.close()


def test_a_grid_names_each_window_and_leaves_out_nodata(model: RSVLM, path: Path) -> None:
    with open_scene_run(model, path, RunSettings(**GRID)) as run:
        records = run.answer(run.windows)
    assert [record.text for record in records] == [f"A {colour} scene." for colour in ("red", "green", "blue", "blue", "red")]
    assert [record.place.index for record in records] == [0, 1, 2, 3, 5]
    assert records[4].place.window == PixelWindow(SIDE, 2 * SIDE, SIDE, SIDE)
    assert (run.header.empty_px, run.header.uniform_px) == (SIDE * SIDE, 0)
    for record in records:
        assert record.valid_share == 1.0
        assert record.num_visual_tokens == 4
        assert record.num_new_tokens == len(f" {record.text}\n") + 1
        assert record.finish_reason == "stop_id"
        assert record.cited == ()  # its window, as a whole
        assert record.gsd_effective_m == pytest.approx(2.0 * SIDE / 28)
        assert min(record.timings.read_ms, record.timings.encode_ms, record.timings.prefill_ms, record.timings.decode_ms) > 0


def test_the_header_says_what_was_opened(model: RSVLM, path: Path) -> None:
    with open_scene_run(model, path, RunSettings(mode="ask", query="Which colour?", stretch=(0, 255))) as run:
        header = run.header
    assert json.loads(json.dumps(header.to_dict())) == {**header.to_dict(), "stretch_low": [0.0] * 3, "stretch_high": [255.0] * 3,
                                                        "transform": [2, 0, 500_000, 0, -2, 5_000_000], "lost": []}  # fmt: skip
    assert (header.height, header.width, header.count, header.dtype) == (2 * SIDE, 3 * SIDE, 3, "uint8")
    assert header.crs is not None
    assert header.crs.startswith("PROJCRS")
    assert (header.gsd_native_m, header.mode, header.query) == (2.0, "ask", "Which colour?")
    assert all(len(value) == 64 for value in (header.content_hash, header.model_hash, header.prompt_hash, header.config_hash))
    assert header.source == str(path)


def test_the_whole_scene_is_one_record_that_cites_its_tiles(tmp_path: Path) -> None:
    backend = TellingBackend(config=telling_config(tiling="dris"))
    model = RSVLM(backend, load_tokenizer(tmp_path / "tokenizer"))
    values = np.random.default_rng(0).integers(1, 255, (3, 224, 224), dtype=np.uint8)
    path = write_scene(tmp_path / "a.tif", values)
    (record,) = answers(model, path, max_visual_tokens=100)
    assert record.place.window == record.place.core == PixelWindow(0, 0, 224, 224)
    assert len(record.cited) > 3
    assert sum(window.height * window.width for window in record.cited) == 224 * 224
    assert record.num_visual_tokens <= 100
    assert backend.prompts == [f"{CAPTION_PROMPT}"] or CAPTION_PROMPT in backend.prompts[0]


def test_a_question_plans_the_whole_scene_twice_and_windows_once(tmp_path: Path) -> None:
    backend = TellingBackend(config=telling_config(tiling="dris"))
    model = RSVLM(backend, load_tokenizer(tmp_path / "tokenizer"))
    values = np.random.default_rng(0).integers(1, 255, (3, 224, 224), dtype=np.uint8)
    path = write_scene(tmp_path / "a.tif", values)
    for settings, passes in (
        ({"mode": "ask", "query": "Where?"}, 2),
        ({"mode": "find", "query": "boats"}, 2),
        ({"mode": "describe"}, 1),
        ({"mode": "ask", "query": "Where?", "query_aware": False}, 1),
        ({"mode": "ask", "query": "Where?", "window_px": 200}, 4),
        ({"mode": "classify", "labels": ("a", "b")}, 1),
    ):
        backend.encoded.clear()
        answers(model, path, **settings)
        assert len(backend.encoded) == passes, settings


def test_find_scores_windows_and_puts_the_best_places_first(tmp_path: Path) -> None:
    alignment = AlignmentConfig(embed_size=3, weights=(0.0, 1.0, 0.0), logit_scale=10.0)
    dris = DrisConfig(leaf_grids=(2, 4), leaf_thresholds=(0.2,), max_tiles=16, max_visual_tokens=128, min_gain=0.0)
    backend = TellingBackend(config=telling_config(tiling="dris", alignment=alignment, dris=dris))
    model = RSVLM(backend, load_tokenizer(tmp_path / "tokenizer"))
    word = next(text for text in ("a", "b", "c") if model.embed_text(text)[2] == 1.0)  # the fake text side's word for blue
    path = write_scene(tmp_path / "a.tif", fields([["red", "green"], ["green", "blue"]]))
    (record,) = answers(model, path, mode="find", query=word)
    blue = model.embed_image(fields([["blue"]]).transpose(1, 2, 0), level="region")[0]
    assert record.score == pytest.approx(float(blue @ model.embed_text(word)), abs=0.02)  # of its best tile
    assert record.text == ""
    best = record.cited[0]
    assert best.row_off >= SIDE
    assert best.col_off >= SIDE
    grid = answers(model, path, mode="find", query=word, window_px=SIDE)
    scores = [record.score or 0.0 for record in grid]
    assert int(np.argmax(scores)) == 3


def test_classify_by_both_methods(model: RSVLM, path: Path) -> None:
    labels = ("a", "b", "c")
    by_alignment = answers(model, path, mode="classify", labels=labels, **GRID)
    for record in by_alignment:
        assert record.label in labels
        assert record.score == max(record.scores.values()) == record.scores[record.label or ""]
        assert sum(record.scores.values()) == pytest.approx(1.0)
    assert len({record.label for record in by_alignment}) > 1
    by_language = answers(model, path, mode="classify", labels=labels, method="language", **GRID)
    assert all(record.num_prompt_tokens > 10 for record in by_language)


def test_choices_hold_an_answer(model: RSVLM, path: Path) -> None:
    records = answers(model, path, mode="ask", query="Which?", choices=(" A red scene.\n", "no"), **GRID)
    assert {record.text for record in records} <= {"A red scene.", "no"}
    assert {record.finish_reason for record in records} == {"choice"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "classify", "labels": ("a", "b")}, {"mode": "find", "query": "boats"}, {"deterministic": True}],
)
def test_an_answer_depends_on_its_window_alone(model: RSVLM, path: Path, settings: dict[str, object]) -> None:
    with open_scene_run(model, path, RunSettings(**GRID, **settings)) as run:  # type: ignore[arg-type]
        together = [shown(record) for record in run.answer(run.windows)]
        alone = [shown(run.answer([place])[0]) for place in reversed(run.windows)]
        again = [shown(record) for record in run.answer([run.windows[3], run.windows[0], run.windows[3]])]
    assert together == alone[::-1]
    assert again == [together[3], together[0], together[3]]


def test_a_crop_at_a_step_gives_the_same_records(model: RSVLM, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(200, 3000, (3, 300, 340), dtype=np.uint16)
    settings = RunSettings(window_px=80, overlap_px=20, stretch=((150, 160, 170), (2900, 2800, 3000)), deterministic=True)
    rasterio = pytest.importorskip("rasterio")
    moved = rasterio.transform.Affine(2, 0, 500_000 + 2 * 60, 0, -2, 5_000_000 - 2 * 120)
    whole = write_scene(tmp_path / "whole.tif", values)
    crop = write_scene(tmp_path / "crop.tif", values[:, 120:, 60:300], transform=moved)
    with open_scene_run(model, whole, settings) as run:
        seen = {(each.place.window.row_off, each.place.window.col_off): each for each in run.answer(run.windows)}
        assert (run.header.stretch_low, run.header.stretch_high) == ((150, 160, 170), (2900, 2800, 3000))
        config = run.header.config_hash
    with open_scene_run(model, crop, settings) as run:
        assert run.header.config_hash == config
        records = run.answer(run.windows)
    same = 0
    for record in records:
        window = record.place.window
        twin = seen.get((window.row_off + 120, window.col_off + 60))
        if twin is None or (twin.place.window.height, twin.place.window.width) != (window.height, window.width):
            continue  # the last window of a row or column lies elsewhere
        same += 1
        moved_back = tuple(
            dataclasses.replace(each, row_off=each.row_off + 120, col_off=each.col_off + 60) for each in record.cited
        )
        assert dataclasses.replace(record, place=twin.place, cited=moved_back, timings=twin.timings) == twin
    assert same >= 9


def test_deterministic_refuses_a_stretch_of_the_scene_and_offers_it(model: RSVLM, tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", np.arange(3 * 80 * 80, dtype=np.uint16).reshape(3, 80, 80))
    with pytest.raises(InputError, match=r"deterministic needs a stretch .* --stretch [\d.]+,[\d.]+,[\d.]+:[\d.]+,") as caught:
        open_scene_run(model, path, RunSettings(deterministic=True))
    low, high = str(caught.value).rsplit(" ", 1)[1].split(":")
    offered = (tuple(map(float, low.split(","))), tuple(map(float, high.split(","))))
    with open_scene_run(model, path, RunSettings(deterministic=True, stretch=offered)) as run:  # type: ignore[arg-type]
        assert run.header.stretch_low == offered[0]


def test_rows_share_a_batch_only_where_that_changes_nothing(path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for precision, name, deterministic, expected in (
        ("float32", "fake", False, [5]),
        ("float32", "fake", True, [1] * 5),
        ("bfloat16", "fake", False, [1] * 5),
        ("int8", "native", False, [5]),
    ):
        backend = TellingBackend(precision=precision, name=name)
        answers(RSVLM(backend, tokenizer), path, deterministic=deterministic, **GRID)
        assert backend.prefills == expected, (precision, name, deterministic)


def test_a_window_whose_pixels_are_all_missing_gets_an_empty_record(model: RSVLM, path: Path) -> None:
    with open_scene_run(model, path, RunSettings(**GRID)) as run:
        inside = dataclasses.replace(run.windows[0], window=PixelWindow(SIDE, SIDE, SIDE, SIDE))
        empty, red = run.answer([inside, run.windows[0]])
    assert (empty.text, empty.valid_share, empty.warnings) == ("", 0.0, (NO_PIXEL,))
    assert red.text == "A red scene."


def test_a_photo_is_a_scene_too(model: RSVLM) -> None:
    pixels = fields([["red", "blue"]]).transpose(1, 2, 0)
    with open_scene_run(model, pixels, RunSettings(**GRID)) as run:
        assert run.header.lost == ("there is no georeference: places are in pixels only",)
        assert run.header.stretch_low == ()
        assert [record.text for record in run.answer(run.windows)] == ["A red scene.", "A blue scene."]


def test_hashes_change_with_what_they_stand_for_only(model: RSVLM, path: Path, tmp_path: Path) -> None:
    def header(file: Path = path, **settings: object) -> dict[str, object]:
        with open_scene_run(model, file, RunSettings(**settings)) as run:  # type: ignore[arg-type]
            return run.header.to_dict()

    own = header()
    assert header() == own
    assert header(max_ram_bytes=100 << 20)["config_hash"] == own["config_hash"]
    for settings in ({"max_new_tokens": 5}, GRID, {"stretch": (0, 200)}, {"query_aware": True}):
        assert header(**settings)["config_hash"] != own["config_hash"]  # type: ignore[arg-type]
        assert header(**settings)["prompt_hash"] == own["prompt_hash"]  # type: ignore[arg-type]
    asked = header(query="How many boats?")
    assert asked["prompt_hash"] != own["prompt_hash"]
    copy = tmp_path / "copy.tif"
    copy.write_bytes(path.read_bytes())
    assert header(copy)["content_hash"] == own["content_hash"]
    changed = write_scene(tmp_path / "changed.tif", fields(MAP, seed=1), nodata=0)
    assert header(changed)["content_hash"] != own["content_hash"]
    copy.with_name("copy.tif.aux.xml").write_text("<PAMDataset/>")
    assert header(copy)["content_hash"] != own["content_hash"]


def test_a_large_file_is_known_by_its_ends_and_its_time(model: RSVLM, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.scenes.identity.WHOLE_BYTES", 1000)
    monkeypatch.setattr("rsvlm_infer.scenes.identity.END_BYTES", 100)

    def content() -> str:
        with open_scene_run(model, path) as run:
            return run.header.content_hash

    own = content()
    assert content() == own
    path.touch()
    assert content() != own


def test_what_the_checkpoint_cannot_do_is_said_before_the_scene_is_opened(tmp_path: Path) -> None:
    config = telling_config(language=None, projector=None, alignment=None)
    model = RSVLM(TellingBackend(config=config), load_tokenizer(tmp_path / "tokenizer"))
    missing = tmp_path / "missing.tif"
    with pytest.raises(InputError, match='mode "describe" needs a language model'):
        open_scene_run(model, missing)
    with pytest.raises(InputError, match="no alignment heads"):
        open_scene_run(model, missing, RunSettings(mode="find", query="boats"))
    with pytest.raises(ImageReadError, match="does not exist"):
        open_scene_run(telling_model(tmp_path), missing)


def test_a_damaged_window_is_an_error_of_that_window(model: RSVLM, tmp_path: Path) -> None:
    values = np.kron(np.random.default_rng(0).integers(1, 255, (3, 16, 64)), np.ones((1, 8, 8))).astype(np.uint8)  # compresses
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    path = write_scene(tmp_path / "a.tif", values, **tiles)
    with open_scene_run(model, path, RunSettings(window_px=128)) as run:
        damage(path)
        assert run.answer([run.windows[0]])[0].text
        with pytest.raises(ImageReadError, match="cannot be read as a raster"):
            run.answer([run.windows[3]])
        assert run.answer([run.windows[0]])[0].text  # and the run goes on


def damage(path: Path) -> None:
    """The last tile's bytes become no deflate stream."""
    content = bytearray(path.read_bytes())
    content[-400:] = b"\xff" * 400
    path.write_bytes(content)


def test_closing_twice_is_no_error(model: RSVLM, path: Path) -> None:
    run = open_scene_run(model, path, RunSettings(**GRID))
    assert isinstance(run, OpenedSceneRun)
    run.answer(run.windows[:1])
    run.close()
    run.close()


@pytest.mark.wheels
@pytest.mark.slow
def test_the_real_model_says_the_same_alone_and_in_batches(tmp_path: Path, default_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    model = RSVLM.from_pretrained(default_checkpoint)
    rng = np.random.default_rng(2)
    values = np.kron(rng.integers(1, 255, (3, 12, 18)), np.ones((1, 32, 32))).astype(np.uint8)
    path = write_scene(tmp_path / "a.tif", np.maximum(values, 1))
    for settings in (
        {"max_new_tokens": 12},
        {"mode": "find", "query": "water"},
        {"mode": "classify", "labels": ("sea", "city")},
    ):
        with open_scene_run(model, path, RunSettings(window_px=192, max_visual_tokens=64, **settings)) as run:  # type: ignore[arg-type]
            together = [shown(record) for record in run.answer(run.windows)]
            alone = [shown(run.answer([place])[0]) for place in run.windows]
            pairs = [shown(record) for at in (0, 2, 4) for record in run.answer(run.windows[at : at + 2])]
        assert len(together) == 6
        assert together == alone == pairs
