"""The command in this process, on the fake backend; once as a real process for what only a process has."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rsvlm_infer
from rsvlm_infer import cli
from rsvlm_infer.cli import console as cli_console
from rsvlm_infer.cli import inspect as cli_inspect
from rsvlm_infer.config import AugmentationConfig, ExpertsConfig, TextEncoderConfig
from rsvlm_infer.errors import BackendError
from rsvlm_infer.pipeline import RSVLM
from tests.tasks.telling_model import TellingBackend, load_tokenizer, picture, telling_config


@pytest.fixture
def backend() -> TellingBackend:
    return TellingBackend()


@pytest.fixture(autouse=True)
def fake_model(backend: TellingBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda path, backend_name, precision: RSVLM(backend, tokenizer))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three good images and a bad one."""
    paths = {}
    for colour in ("red", "green", "blue"):
        paths[colour] = str(tmp_path / f"{colour}.png")
        Image.fromarray(picture(colour)).save(paths[colour])
    paths["bad"] = str(tmp_path / "bad.png")
    Path(paths["bad"]).write_bytes(b"not an image")
    return paths


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


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
    for command in (("caption",), ("classify", "--labels", "a,b"), ("embed",)):
        code, out, err = run(capsys, command[0], files["bad"], *command[1:])
        assert (code, out, err.count("\n")) == (1, "", 1), command
    code, out, err = run(capsys, "caption", "--stream", files["bad"])
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, _, err = run(capsys, "--debug", "caption", files["bad"])
    assert code == 1
    assert "ImageReadError" in err


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


def test_warnings_go_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(tmp_path / "large.png")
    Image.fromarray(picture("red", 56, 56)).save(file)
    code, out, err = run(capsys, "caption", file)
    assert (code, out) == (0, "A red scene.\n")
    assert err.startswith(f"rsvlm: warning: {file}: scene was scaled down 2.00 times")
    assert run(capsys, "-q", "caption", file)[2] == ""


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
        ("paint",),
        ("caption", "{red}", "--colour"),
    ],
)
def test_wrong_usage_is_code_two(capsys: pytest.CaptureFixture[str], files: dict[str, str], arguments: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *(argument.format(**files) for argument in arguments))
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


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


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(telling_config().to_dict()))
    (folder / "model.safetensors").write_bytes(b"abc")
    return str(folder)


def test_plan_needs_only_a_config(capsys: pytest.CaptureFixture[str], files: dict[str, str], checkpoint: str) -> None:
    code, out, _ = run(capsys, "plan", files["red"], "-c", checkpoint)
    assert code == 0
    assert out.splitlines() == [
        "28 x 28 px (height x width)\tfixed\t1 tiles\t4 patches\t4 visual tokens",
        "tile\trow_off\tcol_off\theight\twidth\tgrid\tdepth\tcomplexity",
        "0\t0\t0\t28\t28\t2x2\t0\t1.000",
    ]
    code, out, _ = run(capsys, "plan", files["red"], files["bad"], "-c", checkpoint)
    assert (code, out) == (3, f"{files['red']}\t28 x 28 px (height x width)\tfixed\t1 tiles\t4 patches\t4 visual tokens\n")
    code, out, _ = run(capsys, "plan", files["red"], files["bad"], "-c", checkpoint, "-f", "json")
    good, bad = objects(out)
    assert (good["num_tokens"], good["plan"]["tiling"]) == (4, "fixed")
    assert bad["source"] == files["bad"]


def test_plan_of_a_georeferenced_scene_shows_its_distances(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: str
) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    file = str(tmp_path / "scene.tif")
    profile = {"driver": "GTiff", "height": 56, "width": 56, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(file, "w", **profile, transform=rasterio.transform.from_origin(5e5, 4e6, 10, 10)) as target:
        target.write(picture("red", 56, 56).transpose(2, 0, 1))
    code, out, err = run(capsys, "plan", file, "-c", checkpoint)
    assert code == 0
    assert out.splitlines()[1] == "gsd native 10 m\teffective 20 m"
    assert "effective ground sampling distance 20 m is coarser than the native 10 m" in err


def test_plan_without_a_pulled_checkpoint_uses_the_packaged_config(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = Path(checkpoint).parent / "packaged"
    packaged.mkdir()
    Path(checkpoint).rename(packaged / "rsvlm-135m")
    monkeypatch.setattr(cli_inspect, "PACKAGED_CHECKPOINTS", packaged)
    assert run(capsys, "plan", files["red"])[0] == 0
    monkeypatch.setattr(cli_inspect, "PACKAGED_CHECKPOINTS", packaged / "nowhere")
    code, _, err = run(capsys, "plan", files["red"])
    assert (code, err.count("\n")) == (1, 1)


def test_info_lists_modules_files_and_hashes(capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    code, out, _ = run(capsys, "info", checkpoint)
    assert code == 0
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert f"  {abc}         3 B  model.safetensors" in out
    assert "  experts       off" in out
    assert "  vision        clip, 2 layers, width 8, 14-px patches, taps [1, 1, 2]" in out
    code, out, _ = run(capsys, "info", checkpoint, "--format", "json")
    (values,) = objects(out)
    assert values["modules"]["augmentation"] is None
    assert values["files"][1] == {"file": "model.safetensors", "bytes": 3, "sha256": abc}
    assert values["config"]["vision"]["hidden_size"] == 8


def test_every_module_has_its_line() -> None:
    config = telling_config(
        text_encoder=TextEncoderConfig(300, 8, 16, 1, 2, 5, "quick_gelu", 1e-5, 2),
        augmentation=AugmentationConfig(num_heads=2),
        experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=4),
    )
    assert cli_inspect.modules(config) == {
        "vision": "clip, 2 layers, width 8, 14-px patches, taps [1, 1, 2]",
        "projector": "width 8, pixel shuffle 1",
        "language": "llama, 1 layers, width 8, context 512",
        "text_encoder": "1 layers, width 8",
        "alignment": "object, region, scene, width 3, text from language",
        "augmentation": "5 cues per level",
        "experts": "6 experts, top 2, glu_silu",
    }
    bare = cli_inspect.modules(telling_config(language=None, projector=None, alignment=None))
    assert [name for name, text in bare.items() if text is None] == [
        "projector",
        "language",
        "text_encoder",
        "alignment",
        "augmentation",
        "experts",
    ]


def test_info_of_nothing_says_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info")
    assert (code, out) == (1, "")
    assert "rsvlm pull" in err


def test_doctor_names_machine_backends_and_next_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "  eager          can run: float32" in out
    assert "no default checkpoint: rsvlm pull" in out
    monkeypatch.setattr(cli_inspect.backends, "why_not", lambda name: "torch is not installed; run pip install torch")
    code, out, _ = run(capsys, "doctor", "-f", "json")
    (values,) = objects(out)
    assert values["backends"]["eager"]["can_run"] is False
    assert values["next_steps"][0] == "backend eager: torch is not installed; run pip install torch"
    assert values["checkpoint"] == {"path": str(tmp_path / "home" / "rsvlm-135m"), "present": False}
    assert values["hardware"]["libraries"]["numpy"]
    bare = dataclasses.replace(
        cli_inspect.hardware.probe(), native_why_not="no compiler", memory_bytes=3 << 30, libraries={"rasterio": None}
    )
    monkeypatch.setattr(cli_inspect.hardware, "probe", lambda: bare)
    out = run(capsys, "doctor")[1]
    assert "slower preprocessing: no compiler" in out
    assert 'pip install "rsvlm-infer[geo]"' in out
    assert "3.0 GiB memory" in out
    assert "  rasterio       not installed" in out


def test_errors_outside_an_image_are_one_line(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BackendError("backend must be eager; choose it")

    monkeypatch.setattr(RSVLM, "from_pretrained", refuse)
    assert run(capsys, "caption", files["red"]) == (1, "", "rsvlm: backend must be eager; choose it\n")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("1 / 0\nmore")

    monkeypatch.setattr(RSVLM, "from_pretrained", fail)
    code, _, err = run(capsys, "caption", files["red"])
    assert (code, err) == (
        1,
        "rsvlm: internal error: ZeroDivisionError: 1 / 0 more; run again with --debug and report it\n",
    )


def test_interrupt_and_broken_pipe(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RSVLM, "from_pretrained", interrupt)
    assert run(capsys, "caption", files["red"]) == (130, "", "rsvlm: interrupted\n")

    def leave(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(RSVLM, "from_pretrained", leave)
    assert run(capsys, "caption", files["red"]) == (141, "", "")


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


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return True


def test_a_bar_appears_after_a_while_on_a_terminal_and_makes_way_for_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(cli_console, "PROGRESS_AFTER_S", 0.01)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console = cli_console.Console()
    for item in console.each([1, 2], "captions", 2):
        time.sleep(0.2)
        console.data(f"line {item}")
    assert "captions" in terminal.text
    assert "1/2" in terminal.text
    assert capsys.readouterr().out == "line 1\nline 2\n"


def test_short_work_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli_console.Console().working("loading"):
        pass
    assert terminal.text == ""


def test_the_process_ends_quietly_when_its_reader_leaves(checkpoint: str, files: dict[str, str]) -> None:
    command = [sys.executable, "-m", "rsvlm_infer", "plan", "-c", checkpoint, "-f", "json", *[files["red"]] * 300]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_process_says_so(checkpoint: str, files: dict[str, str]) -> None:
    command = [sys.executable, "-m", "rsvlm_infer", "plan", "-c", checkpoint, *[files["red"]] * 5000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"rsvlm: interrupted\n")
