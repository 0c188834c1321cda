"""`rsvlm eval` with a model whose answers are known, on published predictions, and once with the real checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rsvlm_infer import cli
from rsvlm_infer.errors import CheckpointError
from rsvlm_infer.pipeline import RSVLM
from tests.bench.conftest import THEMES, write_rsicd
from tests.bench.fake_rsvlm import FakeRSVLM
from tests.conftest import REPOSITORY


@pytest.fixture
def rsicd(tmp_path: Path) -> Path:
    return write_rsicd(tmp_path / "rsicd")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The fake model instead of the real one; one entry for each time it is loaded."""
    loaded: list[Any] = []

    def load(path: Path, backend: str, precision: str) -> FakeRSVLM:
        loaded.append(path)
        return FakeRSVLM.from_pretrained(path, backend, precision)

    monkeypatch.setattr(RSVLM, "from_pretrained", load)
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return loaded


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_classes_as_text(capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path) -> None:
    code, out, err = run(capsys, "classify", rsicd, "-c", checkpoint)
    assert code == 0
    assert err == "rsvlm: predictions go to eval-results/classify-rsicd-test.jsonl\n"
    lines = out.splitlines()
    assert lines[:2] == ["set\trsicd\ttest", "items\t4"]
    assert "class_accuracy\t0.7500" in lines
    assert "class\tbeach\t0.0000\t1" in lines
    assert lines[-1] == "confused\tbeach\tairport\t1"


@pytest.mark.parametrize(
    ("task", "metric", "value"),
    [("caption", "rouge_l", 1.0), ("retrieval", "text_to_image_r1", 0.75), ("classify", "class_accuracy", 0.75)],
)
def test_scores_as_json_and_as_a_file(
    capsys: pytest.CaptureFixture[str],
    loads: list[Any],
    rsicd: Path,
    checkpoint: Path,
    tmp_path: Path,
    task: str,
    metric: str,
    value: float,
) -> None:
    scores = tmp_path / "deep" / "scores.json"
    code, out, err = run(capsys, task, rsicd, "-c", checkpoint, "-f", "json", "-o", scores, "--precision", "float32")
    assert (code, out.count("\n")) == (0, 1)
    values = json.loads(out)
    assert json.loads(scores.read_text(encoding="utf-8")) == values
    assert f"rsvlm: wrote {scores}\n" in err
    assert values["metrics"][metric] == pytest.approx(value)
    assert (values["schema"], values["items"], values["scored"], values["failed"]) == ("rsvlm-eval/1", 4, 4, 0)
    assert values["model"]["checkpoint"] == "checkpoint"
    assert (values["model"]["backend"], values["model"]["precision"]) == ("eager", "float32")
    assert values["set"]["reader"] == "rsicd"


def test_a_finished_file_needs_no_model(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path
) -> None:
    first = run(capsys, "caption", rsicd, "-c", checkpoint, "--predictions", "p.jsonl")
    again = run(capsys, "caption", rsicd, "-c", checkpoint, "--predictions", "p.jsonl")
    only = run(capsys, "caption", rsicd, "--predictions", "p.jsonl", "--score-only")
    assert first[:2] == again[:2] == only[:2]
    assert len(loads) == 1


def test_a_torn_file_is_finished_to_the_same_bytes(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path
) -> None:
    file = Path("p.jsonl")
    run(capsys, "retrieval", rsicd, "-c", checkpoint, "--predictions", file)
    whole = file.read_bytes()
    for length in (len(whole) - 7, len(whole) // 2, 60):
        file.write_bytes(whole[:length])
        assert run(capsys, "retrieval", rsicd, "-c", checkpoint, "--predictions", file)[0] == 0
        assert file.read_bytes() == whole


def test_score_only_refuses_a_part(capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path) -> None:
    file = Path("p.jsonl")
    run(capsys, "caption", rsicd, "-c", checkpoint, "--predictions", file)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))
    code, out, err = run(capsys, "caption", rsicd, "--predictions", file, "--score-only")
    assert (code, out) == (2, "")
    assert "2 lack one, the first is 'river-even.jpg'" in err


def test_another_set_model_or_setting_is_refused(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path
) -> None:
    base = ("-c", checkpoint, "--predictions", "p.jsonl")
    run(capsys, "caption", rsicd, *base)
    before = Path("p.jsonl").read_bytes()
    for arguments, reason in (
        (("classify", rsicd, *base), "task was 'caption', is 'classify'"),
        (("caption", rsicd, *base, "--limit", "3"), "set.items was 4, is 3"),
        (("caption", rsicd, *base, "--prompt", "Say."), "settings.prompt was None, is 'Say.'"),
        (("caption", rsicd, *base, "--tiling", "dris"), "settings.tiling was None, is 'dris'"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert reason in err
    (checkpoint / "config.json").write_text("{ }", encoding="utf-8")
    assert "model.digest was" in run(capsys, "caption", rsicd, *base)[2]
    assert "task was 'caption'" in run(capsys, "retrieval", rsicd, "--predictions", "p.jsonl", "--score-only")[2]
    assert Path("p.jsonl").read_bytes() == before
    assert len(loads) == 1


def test_another_precision_is_refused_when_work_is_left(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path
) -> None:
    file = Path("p.jsonl")
    run(capsys, "caption", rsicd, "-c", checkpoint, "--predictions", file, "--precision", "float32")
    file.write_bytes(file.read_bytes()[:-5])
    code, _, err = run(capsys, "caption", rsicd, "-c", checkpoint, "--predictions", file, "--precision", "bfloat16")
    assert code == 2
    assert "model.precision was 'float32', is 'bfloat16'" in err


def test_answers_of_another_program(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path
) -> None:
    file = Path("p.jsonl")
    lines = [json.dumps({"key": name, "prediction": theme}) for name, theme in THEMES.items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    code, out, _ = run(capsys, "classify", rsicd, "--predictions", file, "--score-only")
    assert code == 0
    assert "class_accuracy\t1.0000" in out
    assert "was not begun by this command" in run(capsys, "classify", rsicd, "-c", checkpoint, "--predictions", file)[2]
    file.write_text(lines[0] + '\n{"key": "moon.jpg", "prediction": "x"}', encoding="utf-8")
    assert "got 1 others such as ['moon.jpg']" in run(capsys, "classify", rsicd, "--predictions", file, "--score-only")[2]
    assert loads == []


def test_absent_images(capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path) -> None:
    gone = rsicd / "images" / "road-odd.jpg"
    gone.unlink()
    code, out, err = run(capsys, "classify", rsicd, "-c", checkpoint)
    assert (code, out) == (2, "")
    assert f"1 of 4 images of rsicd are absent, the first is {gone}; pass their folder with --images" in err
    code, out, _ = run(capsys, "classify", rsicd, "-c", checkpoint, "--skip-missing")
    assert code == 0
    assert "missing_images\t1" in out.splitlines()
    assert "class_accuracy\t1.0000" in out
    skipped = run(
        capsys, "classify", rsicd, "--skip-missing", "--score-only", "--predictions", "eval-results/classify-rsicd-test.jsonl"
    )
    assert skipped[:2] == (0, out)
    assert len(loads) == 1


def test_failed_images_are_named_and_tried_again(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = FakeRSVLM.classify

    def classify(self: FakeRSVLM, image: Path, labels: list[str]) -> Any:
        if "odd" in image.name or broken == "all":
            raise CheckpointError(f"no luck with {image.name}")
        return good(self, image, labels)

    broken = "all"
    monkeypatch.setattr(FakeRSVLM, "classify", classify)
    code, out, err = run(capsys, "classify", rsicd, "-c", checkpoint)
    assert (code, out) == (1, "")
    assert "all 4 items failed, the first with: no luck with forest-even.jpg" in err
    broken = "some"
    code, out, err = run(capsys, "classify", rsicd, "-c", checkpoint, "-f", "json")
    assert code == 3
    assert "rsvlm: road-odd.jpg: no luck with road-odd.jpg\n" in err
    values = json.loads(out)
    assert (values["scored"], values["failed"], values["metrics"]["class_accuracy"]) == (2, 2, 1.0)
    assert values["errors"]["road-odd.jpg"] == "no luck with road-odd.jpg"
    monkeypatch.setattr(FakeRSVLM, "classify", good)
    assert run(capsys, "classify", rsicd, "-c", checkpoint)[0] == 0


def test_questions_by_kind(capsys: pytest.CaptureFixture[str], loads: list[Any], checkpoint: Path, tmp_path: Path) -> None:
    lines = [
        {"question_id": i, "image": "a.png", "text": "?", "category": kind, "ground_truth": truth}
        for i, (kind, truth) in enumerate((("presence", "yes"), ("presence", "no"), ("count", "3")))
    ]
    (tmp_path / "a.png").touch()
    file = tmp_path / "bench.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    code, out, _ = run(capsys, "vqa", file, "-c", checkpoint, "-f", "json")
    values = json.loads(out)
    assert code == 0
    assert values["metrics"] == {"answer_accuracy": pytest.approx(2 / 3), "answer_accuracy_mean": 0.75}
    assert values["settings"] == {"max_new_tokens": 16, "closed_answers": {"presence": ["yes", "no"]}}
    code, out, _ = run(capsys, "vqa", file, "-c", checkpoint, "--kind", "count", "--predictions", "c.jsonl")
    assert "answer_accuracy\t1.0000" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "{set}", "--reader", "coco"), "--reader must be one of"),
        (("caption", "{set}", "--split", "val"), "split must be one of ['test']"),
        (("vqa", "{set}"), "task 'vqa' cannot be scored"),
        (("caption", "{set}/absent"), "does not exist"),
        (("caption", "{set}", "--score-only"), "--score-only needs predictions"),
        (("caption", "{set}", "--score-only", "--predictions", "absent.jsonl"), "does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_code_two(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, *(argument.replace("{set}", str(rsicd)) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert loads == []


def test_an_absent_checkpoint_says_so(
    capsys: pytest.CaptureFixture[str], rsicd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "caption", rsicd, "-c", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert "nowhere does not exist" in err
    assert not Path("eval-results").exists()


SLOW = """
import sys, time
from rsvlm_infer import cli
from rsvlm_infer.pipeline import RSVLM
from tests.bench.fake_rsvlm import FakeRSVLM

class Slow(FakeRSVLM):
    def classify(self, image, labels):
        if "river" in image.name:
            time.sleep(60)
        return super().classify(image, labels)

RSVLM.from_pretrained = lambda path, backend, precision: Slow.from_pretrained(path, backend, precision)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_process_loses_nothing(
    capsys: pytest.CaptureFixture[str], loads: list[Any], rsicd: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    arguments = ["eval", "classify", str(rsicd), "-c", str(checkpoint), "--predictions", str(file)]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while (not file.exists() or file.read_bytes().count(b"\n") < 3) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    kept = file.read_bytes()
    assert kept.count(b"\n") == 3  # the header and both forests
    code, out, _ = run(capsys, *arguments[1:])
    assert code == 0
    assert "class_accuracy\t0.7500" in out
    assert file.read_bytes().startswith(kept)


@pytest.mark.data
def test_published_captions_have_their_published_scores(
    capsys: pytest.CaptureFixture[str], loads: list[Any], data_root: Path
) -> None:
    """Published with the Java tokenizer: BLEU 69.94 / 53.21 / 42.59 / 35.15, ROUGE-L 52.52, CIDEr 99.41."""
    file = data_root / "golden_predictions" / "RSICD_Captions.jsonl"
    code, out, err = run(capsys, "caption", file, "--score-only", "-f", "json")
    values = json.loads(out)
    assert (code, err, values["items"], values["set"]["reader"]) == (0, "", 1093, "answered")
    percent = [100 * values["metrics"][name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")]
    assert percent == pytest.approx([69.94, 53.21, 42.59, 35.15, 52.52], abs=0.06)
    assert 100 * values["metrics"]["cider"] == pytest.approx(99.41, abs=0.5)
    assert "--score-only" in run(capsys, "caption", file)[2]
    assert loads == []


@pytest.mark.data
def test_published_classes_have_their_published_accuracy(
    capsys: pytest.CaptureFixture[str], loads: list[Any], data_root: Path
) -> None:
    code, out, _ = run(capsys, "classify", data_root / "golden_predictions" / "UCM.jsonl", "--score-only", "-f", "json")
    values = json.loads(out)
    assert (code, values["items"], len(values["classes"])) == (0, 2100, 21)
    assert 100 * values["metrics"]["class_accuracy"] == pytest.approx(92.57, abs=0.005)
    counts = values["confusion"]["counts"]
    assert sum(map(sum, counts.values())) == 2100
    assert sum(row[column] for column, row in enumerate(counts.values())) == 1944  # 92.57 % of 2100


@pytest.mark.data
@pytest.mark.wheels
@pytest.mark.parametrize(("task", "folder"), [("caption", "rsicd"), ("retrieval", "rsicd"), ("classify", "rsscn7/test")])
def test_the_real_checkpoint_on_two_images(
    capsys: pytest.CaptureFixture[str], data_root: Path, default_checkpoint: Path, tmp_path: Path, task: str, folder: str
) -> None:
    arguments = (task, data_root / folder, "-c", default_checkpoint, "--limit", "2", "--predictions", tmp_path / "p.jsonl")
    code, out, _ = run(capsys, *arguments, "--max-new-tokens", "8", "-f", "json")
    values = json.loads(out)
    assert (code, values["scored"], values["failed"]) == (0, 2, 0)
    assert all(0 <= value <= 10 for value in values["metrics"].values())
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3
    assert lines[0]["model"]["digest"] == values["model"]["digest"]
    assert all(line["prediction"] for line in lines[1:])
