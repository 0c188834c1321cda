"""What reaches the terminal; as a real process for what only a process has."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rsvlm_infer.cli import console as cli_console
from rsvlm_infer.errors import BackendError
from rsvlm_infer.pipeline import RSVLM
from tests.cli.running import objects, run
from tests.tasks.telling_model import picture


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, _, err = run(capsys, "--debug", "caption", files["bad"])
    assert code == 1
    assert "ImageReadError" in err


def test_warnings_go_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(tmp_path / "large.png")
    Image.fromarray(picture("red", 56, 56)).save(file)
    code, out, err = run(capsys, "caption", file)
    assert (code, out) == (0, "A red scene.\n")
    assert err.startswith(f"rsvlm: warning: {file}: scene was scaled down 2.00 times")
    assert run(capsys, "-q", "caption", file)[2] == ""


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="needs a file system that takes any bytes as a name")
def test_names_that_are_no_utf8_are_escaped(capsys: pytest.CaptureFixture[str], files: dict[str, str], tmp_path: Path) -> None:
    odd, bad = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.png"), os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")
    Path(odd).write_bytes(Path(files["red"]).read_bytes())
    Path(bad).write_bytes(b"not an image")
    code, out, err = run(capsys, "caption", bad, odd, files["green"])
    shown = odd.replace("\udcff", "\\udcff")
    assert (code, out) == (3, f"{shown}\tA red scene.\n{files['green']}\tA green scene.\n")
    assert err.startswith(f"rsvlm: {bad}".replace("\udcff", "\\udcff"))
    code, out, _ = run(capsys, "caption", bad, odd, files["green"], "--format", "json")
    assert code == 3
    assert "odd\\udcff.png" in out
    assert [item["source"] for item in objects(out)] == [bad, odd, files["green"]]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_output_never_fails_for_its_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding=encoding, errors="strict", write_through=True))
    console = cli_console.Console()
    values = {"source": "é\udcff\U0001f30d"}
    console.json(values)
    assert json.loads(raw.getvalue().decode("utf-8")) == values
    raw.seek(0)
    raw.truncate()
    console.data("é\udcff")
    console.problem("é\udcff")
    letter = "\\xe9" if encoding == "ascii" else "é"
    assert raw.getvalue().decode(encoding) == f"{letter}\\udcff\n"
    assert errors.getvalue().decode(encoding) == f"rsvlm: {letter}\\udcff\n"


def test_json_keeps_letters_readable(capsys: pytest.CaptureFixture[str]) -> None:
    cli_console.Console().json({"text": "forêt"})
    assert capsys.readouterr().out == '{"text": "forêt"}\n'


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


def test_a_bar_of_a_share_shows_the_words_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(cli_console, "PROGRESS_AFTER_S", 0.01)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with cli_console.Console().working("opening scenes", 1, counted=False) as bar:
        bar.show(0.25, "12 of 40 windows")  # before the bar appears
        time.sleep(0.3)
        assert "12 of 40 windows" in terminal.text
        bar.show(0.5, "20 of 40 windows")
        time.sleep(0.3)
    assert "20 of 40 windows" in terminal.text
    assert "0/1" not in terminal.text
    assert "opening scenes" not in terminal.text


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

    def heed_interrupts() -> None:  # a shell's background jobs ignore them, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"rsvlm: interrupted\n")
