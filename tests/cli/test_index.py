"""`rsvlm index` and `rsvlm search`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.cli import index as commands
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.index.writer import MERGED
from rsvlm_infer.pipeline import RSVLM
from tests.cli.running import objects, run
from tests.tasks.telling_model import StagedTellingBackend, TellingBackend, load_tokenizer, picture


@pytest.fixture(autouse=True)
def digest(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The digest of the fake checkpoint, which a test may change."""
    values = {"embedder": "e" * 64}
    monkeypatch.setattr(commands, "embedder_of", lambda path: values["embedder"])
    return values


@pytest.fixture
def archive(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    folder = str(tmp_path / "archive")
    assert run(capsys, "index", files["red"], files["green"], files["blue"], "-o", folder, "--date", "2020-02-03")[0] == 0
    return folder


def test_index_adds_once_and_says_what_failed(
    files: dict[str, str], tmp_path: Path, backend: TellingBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "archive")
    code, out, err = run(capsys, "index", files["red"], files["bad"], files["green"], "-o", folder)
    assert code == 3
    assert out == f"{files['red']}\tadded\tviews 1\n{files['green']}\tadded\tviews 1\n"
    assert f"{files['bad']} cannot be" in err
    assert "2 scene, 2 region, 2 object embeddings" in err
    encoded = len(backend.encoded)
    code, out, _ = run(capsys, "index", files["green"], files["blue"], "-o", folder, "--format", "json")
    assert code == 0
    assert objects(out) == [
        {"source": files["green"], "state": "known", "as": files["green"]},
        {"source": files["blue"], "state": "added", "views": 1, "acquired": None},
    ]
    assert len(backend.encoded) == encoded + 1, "what is there is not encoded again"
    assert len(Archive.open(folder).segments) == 2


def test_index_refuses_another_encoding_and_a_foreign_folder(
    files: dict[str, str], archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "index", files["red"], "-o", archive, "--window", "64")
    assert code == 2
    assert "was encoded in another way: window_px 1024 is now 64" in err
    code, _, err = run(capsys, "index", files["red"], "-o", str(Path(files["red"]).parent))
    assert code == 2
    assert "must be a new folder or an archive" in err
    code, _, err = run(capsys, "index", files["red"], "-o", str(tmp_path / "x"), "--date", "soon")
    assert code == 2
    assert "--date must be an ISO 8601 date" in err
    assert not (tmp_path / "x").exists()


def last_byte_word(colour: int) -> str:
    """Words that the fake text side takes for a colour: it looks at the last byte."""
    return next(word for word in "abc" if (1 + ord(word)) % 3 == colour)


@pytest.mark.parametrize("level", ["all", "scene", "region", "object"])
def test_words_find_their_colour(level: str, files: dict[str, str], archive: str, capsys: pytest.CaptureFixture[str]) -> None:
    for index, colour in enumerate(("red", "green", "blue")):
        code, out, _ = run(capsys, "search", archive, last_byte_word(index), "--level", level, "--top", "1")
        assert code == 0
        score, source, window, date, place = out.rstrip("\n").split("\t")
        assert source == files[colour]
        seen = picture(colour)[0, 0] / 127.5 - 1  # as the fake encoder gets it
        assert float(score) == pytest.approx(seen[index] / np.linalg.norm(seen), abs=1e-4)
        assert window == "row 0 column 0 28 x 28"
        assert (date, place) == ("2020-02-03", "-")


@pytest.mark.parametrize("level", [None, "scene", "region", "object"])
def test_an_image_finds_its_like(
    level: str | None, files: dict[str, str], archive: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if level is None else ["--level", level]
    code, out, _ = run(capsys, "search", archive, "--near", files["green"], "--format", "json", *options)
    assert code == 0
    found = objects(out)
    assert found[0]["source"] == files["green"]
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-5)
    assert len(found) == 3


def test_an_image_is_planned_as_the_archive_was(
    files: dict[str, str], tmp_path: Path, backend: TellingBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "dris")
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)).save(large)
    assert run(capsys, "index", str(large), "-o", folder, "--tiling", "dris", "--max-tiles", "6")[0] == 0
    tiles = len(backend.encoded[-1].boxes)
    assert tiles > 1
    assert run(capsys, "search", folder, "--near", str(large), "--level", "region")[0] == 0
    assert len(backend.encoded) == 2
    assert len(backend.encoded[-1].boxes) == tiles


def test_filters_and_files(archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    word = last_byte_word(0)
    assert run(capsys, "search", archive, word, "--after", "2020-02-04")[:2] == (0, "")
    assert run(capsys, "search", archive, word, "--after", "2020-02-03", "--before", "2020-02-04")[1].count("\n") == 3
    code, out, err = run(capsys, "search", archive, word, "--bbox", "0,0,1,1", "--gsd", "0,5")
    assert (code, out) == (0, "")
    assert "3 scenes do not say what a filter asks for" in err
    sheet, hits = tmp_path / "sheet.png", tmp_path / "hits.geojson"
    code, out, err = run(capsys, "search", archive, word, "-o", str(sheet), "-o", str(hits), "--format", "geojson")
    assert code == 0
    collection: dict[str, Any] = json.loads(out)
    assert collection == json.loads(hits.read_text())
    assert len(collection["features"]) == 3
    with Image.open(sheet) as shown:
        colours = {colour for _, colour in shown.convert("RGB").getcolors(1 << 20) or []}
    assert {tuple(int(value) for value in picture(name)[0, 0]) for name in ("red", "green", "blue")} <= colours


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give a TEXT or --near, got neither"),
        ([" "], "TEXT must not be blank"),
        (["a", "--bbox", "1,2,3"], "--bbox must be 4 numbers with commas"),
        (["a", "--bbox", "1,2,x,4"], "--bbox must be 4 numbers with commas"),
        (["a", "--bbox", "1,5,3,4"], "bbox must be west,south,east,north"),
        (["a", "--gsd", "5"], "--gsd must be 2 numbers"),
        (["a", "--after", "May"], "--after must be an ISO 8601 date"),
        (["a", "--after", "2020-01-02", "--before", "2020-01-01"], "after must be earlier than before"),
        (["a", "--output", "x.csv"], "must end in one of"),
        (["a", "--near", "x.png", "--level", "all"], "--level all scores texts, got --near too"),
    ],
)
def test_wrong_usage_is_said(options: list[str], words: str, archive: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "search", archive, *options)
    assert (code, out) == (2, "")
    assert words in err


def test_an_archive_of_another_checkpoint_is_refused(
    archive: str, digest: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    digest["embedder"] = "f" * 64
    code, _, err = run(capsys, "search", archive, "a")
    assert code == 1
    assert "was encoded by checkpoint eeeeeeeeeeee" in err
    code, _, err = run(capsys, "search", archive + "2", "a")
    assert code == 2
    assert "has no manifest.json" in err


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StagedTellingBackend:
    """In place of the fake that encodes in one step."""
    backend, tokenizer = StagedTellingBackend(), load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda path, backend_name, precision: RSVLM(backend, tokenizer))
    return backend


@pytest.fixture
def remembering(staged: StagedTellingBackend, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """An archive with features whose scenes are gone."""
    folder = str(tmp_path / "archive")
    names = [files[name] for name in ("red", "green", "blue")]
    assert run(capsys, "index", *names, "-o", folder, "--features", "float16")[0] == 0
    for name in names:
        Path(name).unlink()
    return folder


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["--describe"], "Describe this remote sensing image in one sentence."),
        (["--ask", "Which colour?"], "Which colour?"),
        (["--ask", "Which colour?", "--level", "region", "--batch-size", "2"], "Which colour?"),
    ],
)
def test_finds_are_answered_without_their_scenes(
    options: list[str],
    prompt: str,
    remembering: str,
    staged: StagedTellingBackend,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoded = staged.tiles_encoded
    assert encoded == 3
    code, out, _ = run(capsys, "search", remembering, last_byte_word(1), *options)
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    colours = {files[name]: name for name in ("red", "green", "blue")}
    assert [line[-1] for line in lines] == [f"A {colours[line[1]]} scene." for line in lines]
    assert len(lines) == 3
    assert all(prompt in said for said in staged.prompts)
    assert staged.prefills == ([2, 1] if "--batch-size" in options else [3])
    assert (staged.tiles_encoded, staged.encoded) == (encoded, []), "nothing is encoded again"
    code, out, _ = run(capsys, "search", remembering, last_byte_word(1), "--top", "1", "--format", "json", *options)
    assert objects(out)[0]["answer"] == " A green scene.\n".strip()
    assert "answer" not in objects(run(capsys, "search", remembering, last_byte_word(1), "--format", "json")[1])[0]


def test_choices_and_length_bind_answers(remembering: str, capsys: pytest.CaptureFixture[str]) -> None:
    word = last_byte_word(0)
    choices = ["--choice", "yes", "--choice", "no"]
    _, out, _ = run(capsys, "search", remembering, word, "--ask", "Is it red?", *choices, "--format", "json")
    assert {each["answer"] for each in objects(out)} <= {"yes", "no"}
    _, out, _ = run(
        capsys, "search", remembering, word, "--describe", "--max-new-tokens", "4", "--top", "1", "--format", "json"
    )
    assert objects(out)[0]["answer"] == "A r"


def test_answers_stand_in_files(remembering: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plain, told, hits = tmp_path / "plain.png", tmp_path / "told.png", tmp_path / "hits.geojson"
    word = last_byte_word(2)
    assert run(capsys, "search", remembering, word, "-o", str(plain))[0] == 0
    assert run(capsys, "search", remembering, word, "--describe", "-o", str(told), "-o", str(hits))[0] == 0
    assert json.loads(hits.read_text())["features"][0]["properties"]["answer"] == "A blue scene."
    with Image.open(plain) as without, Image.open(told) as with_answers:
        assert with_answers.height > without.height
        below = with_answers.crop((0, without.height - 20, with_answers.width, with_answers.height - 20))
        assert len(below.convert("L").getcolors() or []) > 2, "the words stand below the cards"


def test_answers_need_features_and_fitting_words(
    archive: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        (["--ask", "What?"], "keeps no features to answer from; make it with rsvlm index --features float32"),
        (["--describe"], "keeps no features to answer from"),
        (["--describe", "--ask", "What?"], "--describe asks for a caption, got --ask too"),
        (["--choice", "yes", "--choice", "no"], "--choice needs a question, got none; add --ask QUESTION"),
        (["--ask", "What?", "--choice", "yes"], "--choice must hold at least two texts"),
        (["--ask", " "], "--ask must not be blank"),
    ):
        code, out, err = run(capsys, "search", archive, "a", *options)
        assert (code, out) == (2, "")
        assert words in err
    code, _, err = run(capsys, "index", files["red"], "-o", str(tmp_path / "x"), "--features", "float32")
    assert code == 2
    assert 'features cannot be kept of backend "fake", which encodes in one step' in err
    assert not (tmp_path / "x").exists()


def test_another_backend_or_precision_is_refused(
    remembering: str, staged: StagedTellingBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    staged.precision = "bfloat16"
    code, _, err = run(capsys, "search", remembering, "a", "--describe")
    assert code == 1
    assert "keeps features of backend fake at float32, backend fake at bfloat16 cannot go on from them" in err
    assert run(capsys, "search", remembering, "a")[0] == 0, "searching needs no features"


def test_many_short_runs_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "archive")
    generator = np.random.default_rng(0)
    for index in range(MERGED):
        file = tmp_path / f"{index}.png"
        Image.fromarray(generator.integers(0, 255, (30, 30, 3), np.uint8)).save(file)
        code, _, err = run(capsys, "index", str(file), "-o", folder)
        assert code == 0
        assert (f"merged {MERGED} segments" in err) == (index == MERGED - 1)
    archive = Archive.open(folder)
    assert len(archive.segments) == 1
    assert [Path(scene.source).name for _, scene in archive.scenes()] == [f"{index}.png" for index in range(MERGED)]
