"""The parts of the benchmarks that decide what a number means."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import index_answers
from benchmarks.modules import spaced
from benchmarks.mosaics import make_mosaics, roc_area
from benchmarks.published import MEASURES
from benchmarks.rows import append_rows
from benchmarks.scenes import LAYOUTS, generate
from rsvlm_infer.evaluation.datasets import RSICD_THEMES
from rsvlm_infer.evaluation.sets import TASKS
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.generation import GenerationSettings
from rsvlm_infer.tasks.result import Answer
from tests.tasks.telling_model import StagedTellingBackend, load_tokenizer, picture


def test_roc_area_counts_pairs_and_halves_ties() -> None:
    truth = np.array([True, True, False, False])
    assert roc_area(np.array([4.0, 3.0, 2.0, 1.0]), truth) == 1.0
    assert roc_area(np.array([1.0, 2.0, 3.0, 4.0]), truth) == 0.0
    assert roc_area(np.ones(4), truth) == 0.5
    assert roc_area(np.array([4.0, 1.0, 2.0, 0.0]), truth) == 0.75


def test_spaced_takes_both_ends_and_keeps_order() -> None:
    assert spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert spaced([1, 2], 5) == [1, 2]


def test_rows_are_appended_below_one_header(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rows.csv"
    append_rows(file, [{"a": 1, "b": "x"}])
    append_rows(file, [{"a": 2, "b": "y, z"}])
    append_rows(file, [])
    with file.open(newline="") as read:
        assert list(csv.DictReader(read)) == [{"a": "1", "b": "x"}, {"a": "2", "b": "y, z"}]


def test_measures_name_tasks_that_exist() -> None:
    assert {measure.task for measure in MEASURES} <= set(TASKS)
    assert all(0 < measure.at_least < 2 for measure in MEASURES)


def test_mosaics_ask_as_often_for_what_is_there_as_for_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    entries = []
    for number, theme in enumerate(RSICD_THEMES):
        name = f"{theme}_1.jpg"
        Image.fromarray(np.full((224, 224, 3), 5 * number, np.uint8)).save(tmp_path / "images" / name)
        entries.append({"filename": name, "split": "val", "theme": theme, "captions": [f"a {theme} ."]})
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    mosaics = make_mosaics(tmp_path, 3, 6, seed=1)
    again = make_mosaics(tmp_path, 3, 6, seed=1)
    assert [each.picture.shape[0] for each in mosaics] == [224 * side for side in (6, 8, 12)]
    for each, same in zip(mosaics, again, strict=True):
        assert each.questions == same.questions
        assert sum(present for _, present in each.questions) == len(each.questions) / 2
        assert all((word in each.present) == present for word, present in each.questions)


@pytest.mark.parametrize("module", ["published", "mosaics", "modules"])
def test_help_explains_itself(module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{module}").main()
    assert stop.value.code == 0
    assert "--data" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_scenes_are_a_fifth_nodata_and_the_same_in_both_layouts(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = {}
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.tif"
        generate(path, 1100, layout, overviews=layout == "tiled")
        with rasterio.open(path) as dataset:
            values[layout] = dataset.read()
            assert dataset.profile["tiled"] == (layout == "tiled")
            assert bool(dataset.overviews(1)) == (layout == "tiled")
            assert (dataset.count, dataset.dtypes[0], dataset.nodata) == (4, "uint16", 0)
    assert (values["tiled"] == values["striped"]).all()
    assert (values["tiled"][0] == 0).mean() == pytest.approx(0.2, abs=0.005)


def test_answers_from_features_are_held_to_those_from_pixels(tmp_path: Path) -> None:
    backend = StagedTellingBackend()
    model = RSVLM(backend, load_tokenizer(tmp_path / "tokenizer"))
    images = []
    for colour in ("red", "green", "blue"):
        images.append(tmp_path / f"{colour}.png")
        Image.fromarray(picture(colour)).save(images[-1])
    archive = index_answers.make_archive(tmp_path / "archive", model, images, "float16")
    assert index_answers.feature_bytes(archive) == 3 * 4 * 8 * 2, "3 images of 4 patches, one tap of 8 numbers"
    settings = GenerationSettings(max_new_tokens=4)
    pixels, features = index_answers.from_pixels(model, images, settings), index_answers.from_features(model, archive, settings)

    def wrong(index: int, question: str) -> Answer:
        return pixels((index + 1) % 3, question)

    backend.reply = " {colour}"
    measured = index_answers.measure(model, {index_answers.BASELINE: pixels, "features": features, "wrong": wrong}, 3, 2)
    assert all(len(seconds) == len(first) == 6 for seconds, first, _ in measured.values())
    assert {name: same for name, (_, _, same) in measured.items()} == {
        index_answers.BASELINE: [True] * 6,
        "features": [True] * 6,
        "wrong": [False] * 6,
    }
