"""`rsvlm run` on a fake model: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.cli.run import duration, estimate_text, progress_text
from rsvlm_infer.errors import BackendError
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.scenes.estimate import NOTHING_MEASURED, Estimate
from rsvlm_infer.scenes.job import Progress
from tests.cli.running import objects, run
from tests.scenes.folders import contents
from tests.tasks.telling_model import TellingBackend

WriteJob = Callable[..., str]


def paint(path: Path, colour: tuple[int, int, int], height: int = 56, width: int = 84) -> str:
    """A scene of 2 x 3 windows of 28 pixels, each of the colour and a little noise, so that none is uniform."""
    noise = np.random.default_rng(0).integers(0, 20, (height, width, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)
    return path.name


@pytest.fixture
def write_job(tmp_path: Path, checkpoint: str) -> WriteJob:
    """Two good scenes and a corrupt one unless told otherwise."""
    (tmp_path / "scenes").mkdir()
    paint(tmp_path / "scenes" / "fields.png", (10, 200, 10))
    paint(tmp_path / "scenes" / "roofs.png", (200, 10, 10))
    (tmp_path / "scenes" / "broken.png").write_bytes(b"not an image")

    def write(*lines: str, scenes: str = '["scenes/*.png"]') -> str:
        head = [f"scenes = {scenes}", 'output = "out"', f'checkpoint = "{checkpoint}"', "window = 28"]
        (tmp_path / "job.toml").write_text("\n".join([*head, *lines]))
        return str(tmp_path / "job.toml")

    return write


def test_a_job_writes_a_folder_for_each_scene_and_lists_the_corrupt_one_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write_job: WriteJob
) -> None:
    code, out, err = run(capsys, "run", write_job())
    assert (code, out) == (3, f"{tmp_path / 'out'}\t12 of 12 windows of 3 scenes answered, 12 of them now\n")
    (line,) = err.splitlines()
    assert line.startswith("rsvlm: quarantined: ")
    assert line.count("broken.png") == 1
    assert sorted(contents(tmp_path / "out")) == [
        "fields/header.json",
        "fields/records.jsonl",
        "job.json",
        "roofs/header.json",
        "roofs/records.jsonl",
    ]
    records = [json.loads(line) for line in (tmp_path / "out" / "roofs" / "records.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == ["A red scene."] * 6
    assert records[5]["place"]["window"] == {"row_off": 28, "col_off": 56, "height": 28, "width": 28}
    header = json.loads((tmp_path / "out" / "fields" / "header.json").read_text())
    assert (header["mode"], header["height"], header["width"]) == ("describe", 56, 84)


def test_the_same_command_again_answers_nothing_and_loads_no_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(scenes='["scenes/fields.png"]')
    assert run(capsys, "run", job) == (0, f"{tmp_path / 'out'}\t6 of 6 windows of 1 scenes answered, 6 of them now\n", "")
    before = contents(tmp_path / "out")

    def refuse(*arguments: object) -> RSVLM:
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr(RSVLM, "from_pretrained", refuse)
    code, out, err = run(capsys, "run", job, "--format", "json")
    (values,) = objects(out)
    assert (code, err) == (0, "")
    assert (values["answered"], values["computed"], values["quarantined"], values["lowered"]) == (6, 0, [], [])
    assert contents(tmp_path / "out") == before


def test_formats_are_written_beside_the_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write_job: WriteJob
) -> None:
    scenes = '["scenes/roofs.png"]'
    code, _, err = run(capsys, "run", write_job('formats = ["geojson", "quicklook"]', scenes=scenes))
    assert (code, err) == (0, "")
    before = contents(tmp_path / "out")
    assert sorted(before) == [
        "job.json",
        *(f"roofs/{name}" for name in ("header.json", "records.jsonl", "roofs.geojson", "roofs.png")),
    ]
    with Image.open(tmp_path / "out" / "roofs" / "roofs.png") as picture:
        red, green, _ = np.asarray(picture.convert("RGB"), float).mean((0, 1))
    assert red > green
    features = json.loads(before["roofs/roofs.geojson"])["features"]
    assert sum(each["properties"].get("text") == "A red scene." for each in features) == 6
    run(capsys, "run", write_job('formats = ["geojson"]', scenes=scenes))
    assert sorted(set(before) - set(contents(tmp_path / "out"))) == ["roofs/roofs.png"]


def test_another_question_is_asked_anew_and_the_old_answers_stay_known(
    capsys: pytest.CaptureFixture[str], write_job: WriteJob, backend: TellingBackend
) -> None:
    scenes = '["scenes/fields.png"]'
    for lines, computed in (([], 6), (['mode = "ask"', 'query = "Is it green?"'], 6), ([], 0), (["budget = 64"], 6)):
        _, out, _ = run(capsys, "run", write_job(*lines, scenes=scenes), "-f", "json")
        assert objects(out)[0]["computed"] == computed, lines


def test_only_corrupt_scenes_is_code_one(capsys: pytest.CaptureFixture[str], write_job: WriteJob) -> None:
    code, _, err = run(capsys, "run", write_job(scenes='["scenes/broken.png"]'))
    assert (code, err.count("\n")) == (1, 1)


def test_a_dry_run_tells_what_it_would_take_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, write_job: WriteJob
) -> None:
    job = write_job("micro_batch = 3", 'tiling = "dris"')
    code, out, err = run(capsys, "run", job, "--dry-run")
    assert (code, err.count("\n")) == (3, 1)
    rows = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert list(rows) == ["scenes", "windows", "area", "visual tokens", "text tokens", "memory", "time", "measured on"]
    assert rows["scenes"] == "3, 1 cannot be opened"
    assert rows["windows"] == "12, of them 0 answered already"
    assert rows["area"] == "0.00941 Mpx, beside 0 Mpx without content"
    assert rows["visual tokens"] == "about 48, at most 1,536"
    assert rows["measured on"].startswith("3 windows of ")
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "run", job, "--dry-run", "--format", "json")
    (values,) = objects(out)
    assert (code, values["windows"], values["workers"], values["visual_tokens"]) == (3, 12, 1, 48)
    run(capsys, "run", job)
    _, out, _ = run(capsys, "run", job, "--dry-run", "--format", "json")
    (values,) = objects(out)
    assert (values["answered"], values["seconds"], values["measured"]) == (12, 0.0, "12 windows in the journal")


def test_retry_tries_quarantined_windows_again(
    capsys: pytest.CaptureFixture[str], write_job: WriteJob, backend: TellingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job("micro_batch = 2", scenes='["scenes/fields.png"]')
    plain = backend.encode

    def refuse(*arguments: object) -> object:
        raise RuntimeError("a cosmic ray")

    monkeypatch.setattr(backend, "encode", refuse)
    code, out, err = run(capsys, "run", job)
    assert (code, err.count("\n")) == (1, 6)
    assert "window at row 28 and column 56: RuntimeError: a cosmic ray" in err
    monkeypatch.setattr(backend, "encode", plain)
    assert run(capsys, "run", job)[0] == 1
    code, out, err = run(capsys, "run", job, "--retry")
    assert (code, err) == (0, "")
    assert "6 of 6 windows" in out


def test_little_memory_is_told(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_job: WriteJob,
    backend: TellingBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = backend.prefill
    most = [1]

    def prefill(sequences: list[object], capacity: int) -> object:
        if len(sequences) > most[0]:
            raise MemoryError
        return plain(sequences, capacity)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "prefill", prefill)
    code, _, err = run(capsys, "run", write_job(scenes='["scenes/fields.png"]'))
    assert code == 0
    assert err.splitlines() == [
        "rsvlm: warning: out of memory with 4 windows at a time; 2 from now on",
        "rsvlm: warning: out of memory with 2 windows at a time; 1 from now on",
    ]
    most[0] = 0
    for tiling, budgets in (("dris", [16, 8, 4]), ("fixed", [])):
        lines = ("budget = 32", f'tiling = "{tiling}"')
        code, _, err = run(capsys, "run", write_job(*lines, scenes='["scenes/fields.png"]'))
        assert code == 1  # no budget helps: dris goes down to the base tile's 4 tokens, fixed has nothing to lower
        lowered = [f"out of memory with {2 * budget} visual tokens for a window; {budget} from now on" for budget in budgets]
        assert [line.partition("warning: ")[2] for line in err.splitlines() if "visual tokens" in line] == lowered
        assert err.count("quarantined") == 6


@pytest.mark.parametrize(
    ("lines", "arguments", "code", "words"),
    [
        (["qerry = 1"], [], 1, "unknown keys ['qerry']"),
        (['mode = "ask"'], [], 2, "query must hold the question"),
        (['formats = ["shapefile"]'], [], 2, "formats must be a list of ['geojson'"),
        (["budget = 2"], [], 1, 'max_visual_tokens must be at least 4 with tiling "fixed", got 2'),
        (['tiling = "anyres"'], [], 1, "needs a checkpoint with grid_pinpoints"),
        ([], ["--workers", "2"], 2, 'workers need engine "ray", got engine "local"'),
        (['engine = "ray"'], [], 1, "ray is not installed; run pip install 'rsvlm-infer[ray]'"),
        (['checkpoint = "elsewhere"'], [], 1, "Cannot overwrite a value"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_job: WriteJob,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("rsvlm_infer.scenes.cluster.library_version", lambda name: None)
    found, out, err = run(capsys, "run", write_job(*lines), *arguments)
    assert (found, out) == (code, ""), err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "job.json").exists()


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_format_that_cannot_be_written_stops_the_job_before_it_begins(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_job: WriteJob,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setattr("rsvlm_infer.scenes.outputs.write.library_version", lambda name: None if name == "jinja2" else "1")
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    job = write_job('formats = ["geojson", "html"]')
    code, out, err = run(capsys, "run", job, *arguments)
    assert (code, out) == (1, "")
    assert err == (
        "rsvlm: formats ['html'] need jinja2, not installed here; pip install 'rsvlm-infer[report]', or leave these formats out\n"
    )
    assert not (tmp_path / "out").exists()
    scene = str(tmp_path / "scenes" / "roofs.png")
    assert run(capsys, "scene", scene, "-o", str(tmp_path / "out"), "--write", "html", *arguments) == (code, out, err)


def test_items_say_when_a_scene_was_taken_also_after_a_break(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_job: WriteJob,
    backend: TellingBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rasterio = pytest.importorskip("rasterio")
    pixels = np.random.default_rng(0).integers(0, 200, (3, 56, 84), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_500_000)}
    for name, tags in (("dated", {"TIFFTAG_DATETIME": "2020:08:31 17:04:05"}), ("undated", {})):
        path = tmp_path / "scenes" / f"{name}.tif"
        with rasterio.open(path, "w", driver="GTiff", height=56, width=84, count=3, dtype="uint8", **place) as made:
            made.write(pixels)
            made.update_tags(**tags)
    job = write_job('formats = ["stac"]', "micro_batch = 1", scenes='["scenes/*.tif"]')
    assert run(capsys, "run", job)[0] == 0
    whole = contents(tmp_path / "out")
    times = [json.loads(whole[f"{name}/{name}.stac.json"])["properties"]["datetime"] for name in ("dated", "undated")]
    assert times == ["2020-08-31T17:04:05Z", None]
    assert json.loads(whole["dated/header.json"])["acquired"] == "2020-08-31T17:04:05+00:00"

    shutil.rmtree(tmp_path / "out")
    prefill, calls = backend.prefill, iter(range(3))

    def broken(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return prefill(*arguments)

    monkeypatch.setattr(backend, "prefill", broken)
    assert run(capsys, "run", job)[0] not in (0, 3)
    assert "dated/dated.stac.json" not in contents(tmp_path / "out")
    monkeypatch.setattr(backend, "prefill", prefill)
    code, out, _ = run(capsys, "run", job)
    assert (code, out) == (0, f"{tmp_path / 'out'}\t12 of 12 windows of 2 scenes answered, 9 of them now\n")
    assert contents(tmp_path / "out") == whole


def test_a_backend_that_cannot_run_stops_the_job(
    capsys: pytest.CaptureFixture[str], write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> RSVLM:
        raise BackendError("no such device; choose another")

    monkeypatch.setattr(RSVLM, "from_pretrained", refuse)
    code, out, err = run(capsys, "run", write_job())
    assert (code, out, err) == (1, "", "rsvlm: no such device; choose another\n")


def test_engine_local_overrides_a_file_for_a_cluster(capsys: pytest.CaptureFixture[str], write_job: WriteJob) -> None:
    job = write_job('engine = "ray"', "workers = 2", 'ray_address = "auto"', scenes='["scenes/fields.png"]')
    assert run(capsys, "run", job, "--engine", "local")[0] == 0


def test_progress_is_told_in_one_line() -> None:
    progress = Progress(scenes=3)
    assert progress_text(progress) == "0 of 0+ windows · 0 of 3 scenes"
    progress.scenes_known, progress.windows, progress.answered, progress.quarantined = 1, 40, 12, 1
    progress.known_px, progress.done_px, progress.computed_px, progress.computed_m2 = 40_000_000, 12_000_000, 12_000_000, 12e8
    progress.started -= 10
    assert progress_text(progress) == (
        "12 of 40+ windows · 0 of 3 scenes · 1 quarantined · 1.2 Mpx/s · 120 km²/s · about 1 min 30 s left"
    )


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsvlm_infer.cli.run.LINE_EVERY_S", 0.0)
    job = write_job(scenes='["scenes/fields.png"]')
    lines = run(capsys, "run", job)[2].splitlines()
    assert lines[0] == "rsvlm: 0 of 0+ windows · 0 of 1 scenes"
    assert lines[-1].startswith("rsvlm: 6 of 6 windows · 1 of 1 scenes · ")
    assert " Mpx/s · about 0 s left" in lines[-1]
    assert run(capsys, "-q", "run", job)[2] == ""


def test_durations_have_two_units() -> None:
    assert [duration(value) for value in (0.2, 45, 60, 200, 3600, 18_720, 190_000)] == [
        "0 s",
        "45 s",
        "1 min",
        "3 min 20 s",
        "1 h",
        "5 h 12 min",
        "2 d 4 h",
    ]


def test_an_estimate_says_what_it_does_not_know() -> None:
    estimate = Estimate(1, 0, 0, 0, 5_000_000, 0.0, None, 0, None, None, None, None, NOTHING_MEASURED, ())
    assert estimate_text(estimate, 1).splitlines() == [
        "scenes        1",
        "windows       0, of them 0 answered already",
        "area          0 Mpx, 0 km², beside 5 Mpx without content",
        "measured on   nothing was measured: no window is left",
    ]
    known = Estimate(1, 1200, 200, 310_000_000, 0, 31e9, 64_000, 128_000, 19_000, 11_000, 7200.0, 1 << 30, "4 windows", ())
    assert estimate_text(known, 2).splitlines()[1:7] == [
        "windows       1,200, of them 200 answered already",
        "area          310 Mpx, 31,000 km², beside 0 Mpx without content",
        "visual tokens about 64,000, at most 128,000",
        "text tokens   about 19,000 read, 11,000 written",
        "memory        about 1,024 MiB for each worker",
        "time          about 2 h with one worker, about 1 h with 2",
    ]
