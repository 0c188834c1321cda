"""The commands in this process, on the fake backend."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import rsvlm_infer
from rsvlm_infer.pipeline import RSVLM
from tests.cli.running import objects, run
from tests.tasks.telling_model import TellingBackend, telling_config


def test_one_caption_is_only_its_text(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    assert run(capsys, "caption", files["red"]) == (0, "A red scene.\n", "")


def test_several_captions_are_one_named_line_each(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], backend: TellingBackend
) -> None:
    backend.reply = "A\n{colour}  scene"
    code, out, err = run(capsys, "caption", files["red"], files["green"])
    assert (code, err) == (0, "")
    assert out == f"{files['red']}\tA red scene\n{files['green']}\tA green scene\n"


def test_a_bad_image_is_one_line_and_code_three(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, out, err = run(capsys, "caption", files["bad"], files["green"])
    assert (code, out) == (3, f"{files['green']}\tA green scene.\n")
    assert err.count("\n") == 1
    assert err.startswith("rsvlm: ")
    assert files["bad"] in err
    assert "Traceback" not in err


def test_only_bad_images_is_code_one(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    for command in (
        ("caption",),
        ("classify", "--labels", "a,b"),
        ("embed", "--output", str(Path(files["bad"]).with_name("rows.npy"))),
    ):
        code, out, err = run(capsys, command[0], files["bad"], *command[1:])
        assert (code, out, err.count("\n")) == (1, "", 1), command
    code, out, err = run(capsys, "caption", "--stream", files["bad"])
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_json_is_one_object_per_image_also_for_failures(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, out, _ = run(capsys, "caption", "--format", "json", "--plan", files["red"], files["bad"])
    assert code == 3
    good, bad = objects(out)
    assert (good["source"], good["text"], good["finish_reason"]) == (files["red"], "A red scene.", "stop_id")
    assert good["tokens"]["visual"] == 4
    assert set(good["timings"]) == {
        f"{stage}_ms" for stage in ("read", "plan", "preprocess", "encode", "augment", "prefill", "decode", "ttft", "tpot")
    }
    assert good["plan"]["num_patches"] == 4
    assert good["gsd_native_m"] is None
    assert set(bad) == {"source", "error"}


def test_streaming_writes_the_same_text(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    assert run(capsys, "caption", "--stream", files["blue"]) == (0, "A blue scene.\n", "")
    assert run(capsys, "ask", "--stream", files["blue"], "What?") == (0, "A blue scene.\n", "")
    code, _, err = run(capsys, "caption", "--stream", files["blue"], files["red"])
    assert (code, "--stream needs one image" in err) == (2, True)


def test_ask_takes_the_question_last(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], backend: TellingBackend
) -> None:
    code, out, _ = run(capsys, "ask", files["red"], files["green"], "What colour?")
    assert (code, out) == (0, f"{files['red']}\tA red scene.\n{files['green']}\tA green scene.\n")
    assert backend.prompts[0].strip() == "What colour?"
    backend.reply = "n"
    assert run(capsys, "ask", files["red"], "Water?", "--choice", "yes", "--choice", "no")[1] == "no\n"


def test_classify_ranks_labels(capsys: pytest.CaptureFixture[str], files: dict[str, str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "classify", files["red"], "--labels", "a, b,c", "--template", "{label}", "--top", "3")
    assert code == 0
    assert out.startswith("b\t")
    assert sum(float(line.split("\t")[1]) for line in out.splitlines()) == pytest.approx(1, abs=2e-4)
    labels = tmp_path / "labels.txt"
    labels.write_text("a\n\nb\nc\n")
    code, out, _ = run(
        capsys, "classify", files["red"], files["green"], files["bad"], "--labels-file", str(labels), "--template", "{label}"
    )
    assert code == 3
    assert [line.split("\t")[:2] for line in out.splitlines()] == [[files["red"], "b"], [files["green"], "c"]]
    code, out, _ = run(capsys, "classify", files["red"], "-l", "a,b,c", "-f", "json", "--method", "language")
    assert objects(out)[0]["method"] == "language"


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "{red}"),
        ("classify", "{red}", "--labels", "a,b", "--labels-file", "x"),
        ("classify", "{red}", "--labels-file", "absent.txt"),
        ("caption",),
        ("caption", "{red}", "--max-new-tokens", "0"),
        ("caption", "{red}", "--top-p", "0"),
        ("caption", "{red}", "--temperature", "-1"),
        ("caption", "{red}", "--bands", "red,green"),
        ("caption", "{red}", "--tiling", "huge"),
        ("caption", "{red}", "--stop", ""),
        ("caption", "{red}", "--format", "xml"),
        ("embed",),
        ("embed", "{red}", "--output", "rows.txt"),
        ("embed", "{red}", "--output", "absent/rows.npy"),
        ("embed", "{red}", "--text", "sea", "--output", "rows.npy"),
        ("embed", "{red}", "--text", " "),
        ("classify", "{red}", "--labels", "a,b", "--plan"),
        ("paint",),
        ("caption", "{red}", "--colour"),
    ],
)
def test_wrong_usage_is_code_two(capsys: pytest.CaptureFixture[str], files: dict[str, str], arguments: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *(argument.format(**files) for argument in arguments))
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "--labels", "forest"), "labels must hold at least two texts, got ['forest']; add another"),
        (("classify", "--labels", ""), "labels must hold at least two texts, got ['']; add another"),
        (("classify", "--labels", "a,,b"), "labels must not be blank, got ['a', '', 'b']; remove the blank one"),
        (("classify", "--labels", "a,b,a"), "labels must differ, got ['a'] more than once; remove the repeated ones"),
        (
            ("classify", "--labels", "a,b", "--template", "a photo"),
            "template must contain {label}, got 'a photo'; write for example 'a satellite image of {label}'",
        ),
        (("caption", "--prompt", " "), "--prompt must not be blank, got ' '; write some words"),
        (
            ("caption", "--prompt", "a\udcff"),
            "--prompt must be text in UTF-8, got 'a\\udcff', which holds half a character; retype it",
        ),
        (("ask", "--stream", " "), "QUESTION must not be blank, got ' '; write some words"),
        (("ask", "--choice", "a", "Q?"), "--choice must hold at least two texts, got ['a']; add another"),
        (("caption", "--plan"), "--plan needs --format json, got --format text; add --format json, or use rsvlm plan"),
        (("ask", "--plan", "Q?"), "--plan needs --format json, got --format text; add --format json, or use rsvlm plan"),
        (
            ("caption", "--stream", "-f", "json"),
            "--stream needs one image and --format text, got 2 images and json; leave it out",
        ),
    ],
)
def test_wrong_usage_is_one_line_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    command, *rest = arguments
    assert run(capsys, command, files["red"], files["green"], *rest) == (2, "", f"rsvlm: {message}\n")


def test_what_the_checkpoint_cannot_do_is_said_once(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], backend: TellingBackend, checkpoint: str
) -> None:
    images = (files["red"], files["green"])
    for command in (("caption",), ("plan", "-c", checkpoint)):
        code, out, err = run(capsys, command[0], *images, *command[1:], "--tiling", "anyres")
        assert (code, out, err.count("\n")) == (2, "", 1), command
        assert err.startswith('rsvlm: tiling "anyres" needs a checkpoint with grid_pinpoints')
    backend.config = telling_config(alignment=None)
    code, out, err = run(capsys, "classify", *images, "--labels", "a,b", "--method", "alignment")
    assert (code, out) == (2, "")
    assert (
        err
        == "rsvlm: method \"alignment\" needs parts that this checkpoint lacks, available: ['language']; choose one of these\n"
    )
    code, out, err = run(capsys, "embed", *images)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_embed_writes_rows_in_step_with_the_arguments(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.npy"
    code, out, err = run(capsys, "embed", files["red"], files["bad"], files["green"], "--output", str(rows))
    assert (code, out, err.count("\n")) == (3, "", 1)
    array = np.load(rows)
    assert array.shape == (3, 3)
    assert np.isnan(array[1]).all()
    assert array[[0, 2]].argmax(axis=1).tolist() == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir() if "rows" in path.name) == ["rows.npy"]


def test_embed_npz_holds_all_levels_and_texts(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], tmp_path: Path
) -> None:
    out_file = tmp_path / "all.npz"
    arguments = ("embed", files["red"], files["bad"], files["blue"], "-t", "b", "-t", "c", "-o", str(out_file))
    assert run(capsys, *arguments)[0] == 3
    with np.load(out_file) as arrays:
        assert arrays["sources"].tolist() == [files["red"], files["bad"], files["blue"]]
        assert arrays["scene"].shape == (3, 3)
        assert arrays["tile_offsets"].tolist() == [0, 1, 1, 2]
        assert arrays["region"].shape == (2, 3)
        assert arrays["object"].shape == (2, 1, 3)
        assert arrays["texts"].tolist() == ["b", "c"]
        assert arrays["text_embeddings"].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_embed_without_a_file_writes_json_lines(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, out, _ = run(capsys, "embed", files["red"], "--text", "b")
    assert code == 0
    text, image = objects(out)
    assert text == {"text": "b", "embedding": [1, 0, 0]}
    assert image["source"] == files["red"]
    assert int(np.argmax(image["embedding"])) == 0
    code, out, err = run(capsys, "embed", files["bad"], files["red"])
    failed, image = objects(out)
    assert (code, failed["source"], set(failed)) == (3, files["bad"], {"source", "error"})
    assert err == f"rsvlm: {failed['error']}\n"
    assert image["source"] == files["red"]


def test_embed_of_texts_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_file = tmp_path / "texts.npy"
    assert run(capsys, "embed", "--text", "b", "-o", str(out_file))[0] == 0
    assert np.load(out_file).tolist() == [[1, 0, 0]]


def test_an_output_that_cannot_be_written_leaves_nothing(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "folder.npy"
    target.mkdir()
    code, _, err = run(capsys, "embed", files["red"], "-o", str(target))
    assert (code, "cannot be written" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"{rsvlm_infer.__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("caption", "ask", "classify", "embed", "plan", "info", "doctor", "pull", "bench"):
        assert name in out


def test_python_m_is_the_same_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rsvlm", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("rsvlm_infer", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{rsvlm_infer.__version__}\n")


def test_bench_and_pull_get_their_arguments_untouched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def fake_main(arguments: list[str]) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setattr("rsvlm_infer.bench.main", fake_main)
    monkeypatch.setattr("rsvlm_infer.pull.main", fake_main)
    assert run(capsys, "bench", "--fail-if", "p95>+10%", "-x", "--help")[0] == 3
    assert run(capsys, "pull", "--wheels", "folder")[0] == 3
    assert run(capsys, "-q", "pull")[0] == 3
    assert seen == [["--fail-if", "p95>+10%", "-x", "--help"], ["--wheels", "folder"], ["--quiet"]]


def test_forwarded_commands_keep_their_own_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "pull"):
        assert run(capsys, command, "--help")[0] == 0
        code, out, err = run(capsys, command, "--no-such-option")
        assert (code, out, "no-such-option" in err) == (2, "", True)
