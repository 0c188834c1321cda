"""`RSVLM.scene`: records as they are asked for, and a file that is closed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.errors import ImageReadError, InputError
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.scenes.answers import SceneAnswers
from tests.scenes.telling_scenes import SIDE, fields, telling_model, write_scene

pytest.importorskip("rasterio")


@pytest.fixture
def model(tmp_path: Path) -> RSVLM:
    return telling_model(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "a.tif", fields([["red", "green", "blue"]] * 2))


def test_records_come_in_batches_as_they_are_asked_for(model: RSVLM, path: Path) -> None:
    answers = model.scene(path, window_px=SIDE, batch_size=2)
    assert len(answers) == len(answers.windows) == 6
    assert answers.header.mode == "describe"
    assert model.backend.prefills == []  # type: ignore[attr-defined]
    assert next(answers).text == "A red scene."
    assert model.backend.prefills == [2]  # type: ignore[attr-defined]
    assert [record.text for record in answers] == [f"A {colour} scene." for colour in ("green", "blue", "red", "green", "blue")]
    assert model.backend.prefills == [2, 2, 2]  # type: ignore[attr-defined]
    assert list(answers) == []


def test_the_file_is_closed_at_the_end_and_when_left_early(model: RSVLM, path: Path) -> None:
    for leave_early in (False, True):
        with model.scene(path, "find", "boats", window_px=SIDE) as answers:
            next(answers)
            if not leave_early:
                list(answers)
        run = answers._run
        with pytest.raises(InputError, match="is closed"):
            run._scene.read(0, 0, 1, 1)  # type: ignore[attr-defined]


def test_a_run_is_closed_when_the_batch_size_is_wrong(model: RSVLM, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr("rsvlm_infer.scenes.run.OpenedSceneRun.close", lambda self: closed.append(self))
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        model.scene(path, batch_size=0)
    assert len(closed) == 1


def test_errors_of_the_scene_and_of_the_settings_come_at_once(model: RSVLM, path: Path) -> None:
    with pytest.raises(ImageReadError, match="does not exist"):
        model.scene(path.with_name("missing.tif"))
    with pytest.raises(InputError, match="query must hold the question"):
        model.scene(path, "ask")
    assert isinstance(model.scene(path), SceneAnswers)
