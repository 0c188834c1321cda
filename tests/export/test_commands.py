"""Every verb works on a package, and a box without torch can caption."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import objects, run
from tests.conftest import REPOSITORY
from tests.export.packages import Pair, flip_byte

Get = Callable[..., Pair]

WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "rasterio", "rsvlm_export"):
    sys.modules[name] = None  # an import of it fails
from rsvlm_infer import RSVLM
from rsvlm_infer.cli import main
code = main(["caption", {image!r}, "-c", {package!r}, "-f", "json", "--max-new-tokens", "3"])
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch" and sys.modules[name] is not None))
sys.exit(code)
"""


@pytest.fixture
def image(tmp_path: Path) -> str:
    file = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    return str(file)


def test_a_box_without_torch_captions(pair: Get, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = pair("speaking")
    code = WITHOUT_TORCH.format(image=image, package=str(made.package))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    eager = run(capsys, "caption", image, "-c", str(made.checkpoint), "-f", "json", "--max-new-tokens", "3")[1]
    assert json.loads(answer)["token_ids"] == json.loads(eager)["token_ids"]


def test_verbs_say_the_same_of_package_and_checkpoint(pair: Get, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = pair("speaking")
    for arguments in (
        ["caption", image, "--max-new-tokens", "4"],
        ["ask", image, "What is it?", "--choice", "yes", "--choice", "no"],
        ["classify", image, "--labels", "river,forest,harbor", "--top", "3"],
        ["classify", image, "--labels", "river,forest", "--method", "language"],
        ["plan", image],
        ["kb", "show"],
        ["kb", "search", "--image", image],
    ):
        said = [run(capsys, *arguments, "-c", str(folder)) for folder in (made.package, made.checkpoint)]
        assert said[0][0] == said[1][0] == 0, said
        assert said[0][1] == said[1][1], arguments
    vectors = [
        objects(run(capsys, "embed", image, "-c", str(folder))[1])[0]["embedding"] for folder in (made.package, made.checkpoint)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_eval_scores_a_package(pair: Get, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pair("speaking")
    data = tmp_path / "classes"
    for label in ("river", "forest"):
        (data / label).mkdir(parents=True)
        shutil.copy(image, data / label / "one.png")
    found = []
    for folder in (made.package, made.checkpoint):
        predictions = str(tmp_path / f"{folder.name}.jsonl")
        code, _, err = run(capsys, "eval", "classify", str(data), "-c", str(folder), "--predictions", predictions)
        assert code == 0, err
        found.append([line.get("prediction") for line in objects(Path(predictions).read_text())[1:]])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_export_command_and_info(pair: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pair("speaking")
    target = tmp_path / "package"
    code, out, err = run(capsys, "export", str(made.checkpoint), "-o", str(target))
    assert (code, out) == (0, f"{target}\n"), err
    code, out, _ = run(capsys, "info", str(target))
    assert code == 0
    for line in (
        "precision   fp32",
        "certificate none; run `rsvlm verify`",
        "  decoder",
        "  experts       12 experts, top 2, glu_silu",
    ):
        assert line in out
    (values,) = objects(run(capsys, "info", str(target), "-f", "json")[1])
    assert (values["damaged"], values["manifest"]["precision"]) == ([], "fp32")
    flip_byte(target / "vision.weights")
    code, out, err = run(capsys, "info", str(target))
    assert (code, "damaged: vision.weights" in out, err.count("\n")) == (1, True, 1)
    code, _, err = run(capsys, "caption", "x.png", "-c", str(target))
    assert (code, "vision.weights must have sha256" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{checkpoint}"], "--output"),
        (["{package}", "-o", "x"], "is an exported package already"),
        (["nowhere", "-o", "x"], "does not exist"),
        (["{checkpoint}", "-o", "x", "--precision", "fp8"], "--precision must be one of"),
        (["{checkpoint}", "-o", "x", "--format", "coreml"], "--format must be one of"),
        (["{checkpoint}", "-o", "{package}"], "--overwrite"),
    ],
)
def test_export_refusals(pair: Get, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    made = pair("speaking")
    filled = [each.format(checkpoint=made.checkpoint, package=made.package) for each in arguments]
    code, out, err = run(capsys, "export", *filled)
    assert (code != 0, out) == (True, "")
    assert words in err
    assert err.count("\n") <= 2  # a line of progress, and the refusal


def test_export_without_its_libraries_names_the_extra(
    pair: Get, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "rsvlm_export", None)
    monkeypatch.setitem(sys.modules, "rsvlm_export.export", None)
    code, _, err = run(capsys, "export", str(pair("speaking").checkpoint), "-o", str(tmp_path / "x"))
    assert (code, "rsvlm-infer[torch,onnx]" in err) == (1, True)


def test_bench_measures_a_package(pair: Get, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rsvlm_infer.bench import main

    arguments = ["--checkpoint", str(pair("speaking").package), "--images", str(Path(image).parent), "--warmup", "0"]
    code = main([*arguments, "--scenario", "SingleStream", "--max-new-tokens", "2", "--output", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    values = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["backend"] for row in values["rows"]] == ["onnx"]
