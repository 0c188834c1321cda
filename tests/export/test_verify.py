"""The certificate: numbers that are right, gates that shut, and nothing written for a package that fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import objects, run
from tests.export.packages import SPEAKING, Pair, make_pair
from tests.native import needs_native

from rsvlm_export.compare import ADVERSARIAL, Comparison, GraphError, cases  # isort: skip
from rsvlm_export.verify import Gate, Reference, Verdict, gates, verify_package, write_certificate
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.package import Package

Get = Callable[..., Pair]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, two images each."""
    root = tmp_path_factory.mktemp("classes")
    for label in ("river", "forest"):
        (root / label).mkdir()
        for seed in range(2):
            pixels = np.random.default_rng(seed + len(label)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{seed}.png")
    return root


def _verdict(precision: str, **changes: object) -> Verdict:
    graphs = {"vision": GraphError(3, 1e-3, 2e-5, 0.9999, "x"), "decoder": GraphError(3, 1.0, 9e-5, 0.9991, "y")}
    metrics = {"cider": (0.862, 0.858), "class_accuracy": (0.9, 0.91), "mean_recall": (0.3, 0.3)}
    sample = {"set": "s", "images": 4, "split": "test", "seed": 0, "digest": "d"}
    return dataclasses.replace(Verdict(precision, graphs, {}, metrics, sample), **changes)  # type: ignore[arg-type]


def test_errors_by_hand() -> None:
    found = Comparison()
    found.add("g", "first", np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    found.add("g", "second", np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    found.add("g", "empty", np.zeros(0), np.zeros(0))
    error = found.graphs["g"]
    assert (error.cases, error.max_abs, error.relative, error.worst_case) == (3, 2.0, 0.5, "first")
    assert error.cosine == pytest.approx(9 / np.sqrt(5 * 17))
    for bad in (np.array([np.nan, 1.0]), np.zeros(3)):
        found.add("bad", "shape or nan", bad, np.ones(2))
        assert found.graphs["bad"].relative == float("inf")
        assert found.graphs["bad"].to_dict()["max_abs"] == "infinite"


def test_gates_of_each_precision() -> None:
    assert [gate.passed for gate in gates(_verdict("fp32"))] == [True, True]
    worse = {"vision": GraphError(1, 1.0, 1.1e-4, 1.0)}
    assert [gate.passed for gate in gates(_verdict("fp32", graphs=worse))] == [False]
    for same, passed in ((4, True), (3, False)):
        greedy = {"images": 4, "same": same}
        assert [gate.passed for gate in gates(_verdict("fp32", greedy=greedy))] == [True, True, passed]
        assert len(gates(_verdict("bf16", greedy=greedy))) == 2
    assert [gate.passed for gate in gates(_verdict("fp16"))] == [True, True]
    assert [gate.passed for gate in gates(_verdict("bf16", graphs={"vision": GraphError(1, 0, 0, 0.9989)}))] == [False]
    assert [gate.passed for gate in gates(_verdict("int4"))] == [True, True, True]
    lost = {"cider": (0.862, 0.8569), "class_accuracy": (0.9, 0.895)}
    assert [gate.passed for gate in gates(_verdict("int8", metrics=lost))] == [False, True]


def test_cases_are_long_thin_short_and_single(pair: Get, images: Path) -> None:
    config = pair("full").config
    found = dict(cases(config, [images / "river" / "0.png"]))
    assert len(found) == 1 + len(ADVERSARIAL) + 1
    tiles = {name: len(scene.grids) for name, scene in found.items()}
    assert tiles["single tile"] == 1
    assert tiles[ADVERSARIAL[0][0]] > 4
    assert max(tiles.values()) > tiles[ADVERSARIAL[2][0]] == 1


def test_a_right_package_gets_its_certificate(
    pair: Get, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pair("speaking")
    package = Path(shutil.copytree(made.package, tmp_path / "package"))
    code, out, err = run(
        capsys, "verify", str(package), "--against", str(made.checkpoint), "--data", str(images), "--limit", "3"
    )
    assert code == 0, err
    assert "passed: relative error of decoder" in out
    values = json.loads((package / "certificate.json").read_text())
    assert (values["passed"], values["forced"], values["failures"]) == (True, False, [])
    assert set(values["graphs"]) == set(Package.open(package).manifest["graphs"])
    assert values["sample"]["images"] == 3
    assert values["greedy"] == {"images": 3, "same": 3, "same_tokens": 1.0, "token_prefix": 1.0}
    assert values["metrics"]["class_accuracy"]["loss_points"] == 0
    assert (package / "certificate.json").stat().st_size < 20_000
    assert str(tmp_path) not in (package / "certificate.json").read_text()
    assert "certificate passed" in run(capsys, "info", str(package))[1]
    assert objects(run(capsys, "info", str(package), "-f", "json")[1])[0]["certificate"] == values
    with (package / "manifest.json").open("a") as file:
        file.write("\n")
    assert "certificate of another package" in run(capsys, "info", str(package))[1]


def test_what_the_checkpoint_says_is_kept_for_the_next_run(
    pair: Get, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, kept = pair("speaking"), tmp_path / "kept" / "reference.json"
    package = Path(shutil.copytree(made.package, tmp_path / "package"))
    arguments = ("verify", str(package), "--against", str(made.checkpoint), "--data", str(images), "--reference", str(kept))
    first = run(capsys, *arguments, "--limit", "3")
    assert first[0] == 0, first[2]
    assert "captions of the checkpoint" in first[2]
    values = json.loads(kept.read_text())
    second = run(capsys, *arguments, "--limit", "3")
    assert second[:2] == first[:2]
    assert "captions of the checkpoint" not in second[2]
    name = next(iter(values["tokens"]))
    changed = values["tokens"] | {name: [*values["tokens"][name], 1]}
    kept.write_text(json.dumps(values | {"tokens": changed}))  # what lies there is what counts
    code, out, _ = run(capsys, *arguments, "--limit", "3")
    assert (code, "FAILED: number of greedy captions that differ is 1" in out) == (1, True)
    code, _, err = run(capsys, *arguments, "--limit", "2")
    assert (code != 0, "it differs in sample; name another file" in err) == (True, True), err
    kept.write_text("{")
    code, _, err = run(capsys, *arguments, "--limit", "3")
    assert (code != 0, "must be a file that verify wrote" in err) == (True, True), err


@needs_native
def test_native_packages_go_the_same_way(pair: Get, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several packages of one checkpoint; the stages of a native one go by the names of the graphs."""
    from rsvlm_export.native import export_native

    made = pair("speaking")
    folders = [export_native(made.checkpoint, tmp_path / precision, precision) for precision in ("fp32", "int8")]
    against = ("--against", str(made.checkpoint), "--data", str(images), "--limit", "3")
    code, out, err = run(capsys, "verify", *map(str, folders), *against, "-f", "json")
    values = objects(out)
    assert [(each["kind"], each["precision"]) for each in values] == [("native", "fp32"), ("native", "int8")], err
    exact = values[0]
    assert set(exact["graphs"]) == {"vision", "align", "bridge", "text_embed", "word_embed", "decoder"}
    assert all(error["relative"] < 1e-5 for error in exact["graphs"].values())
    assert exact["graphs"] == json.loads((folders[0] / "certificate.json").read_text())["graphs"]
    assert (exact["passed"], exact["greedy"]["same"]) == (True, 3)
    assert values[1]["graphs"]["vision"]["relative"] > 1e-4  # bfloat16 products
    assert "certificate passed" in run(capsys, "info", str(folders[0]))[1]
    assert code == (0 if all(each["passed"] for each in values) else 1)
    other = export_native(pair("full").checkpoint, tmp_path / "other", "fp32")
    code, _, err = run(capsys, "verify", str(folders[0]), str(other), *against)
    assert code != 0
    assert "--against must be the checkpoint" in err


@needs_native
def test_a_native_package_that_says_other_words_is_refused(
    pair: Get, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsvlm_export import native

    honest = native.lay_out

    def off(config: object, state: dict, precision: str, *rest: object) -> object:
        wrong = {**state, "language_model.norm.weight": -state["language_model.norm.weight"]}
        return honest(config, wrong, precision, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "lay_out", off)
    made = pair("speaking")
    folder = native.export_native(made.checkpoint, tmp_path / "package", "fp32")
    verdict = verify_package(folder, Reference(made.checkpoint, images, limit=2))
    assert {gate.name for gate in verdict.gates if not gate.passed} == {
        "relative error of text_embed",
        "relative error of decoder",
        "number of greedy captions that differ",
    }
    assert write_certificate(verdict, folder) is None


def test_a_wrong_package_gets_none_and_loses_an_older_one(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One norm of the package is off by 1 %."""
    from rsvlm_export import export as exporting

    honest = exporting.model_weights

    def off(model: object) -> object:
        weights = honest(model)  # type: ignore[arg-type]
        weights.others["language_model.layers.1.post_norm.weight"] *= 1.01
        return weights

    monkeypatch.setattr(exporting, "model_weights", off)
    made = make_pair(tmp_path, SPEAKING)
    certificate = made.package / "certificate.json"
    certificate.write_text("{}")
    arguments = ("verify", str(made.package), "--against", str(made.checkpoint), "--data", str(images), "--limit", "1")
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert "FAILED: relative error of decoder" in out
    assert "relative error of decoder" in err.splitlines()[-1]
    assert "--force" in err.splitlines()[-1]
    assert not certificate.exists()
    code, out, _ = run(capsys, *arguments, "--force", "-f", "json")
    assert code == 1
    values = json.loads(certificate.read_text())
    assert objects(out) == [values]
    assert (values["passed"], values["forced"]) == (False, True)
    # text_embed runs through the decoder where texts are read by the language model
    wrong = [failure for failure in values["failures"] if failure.startswith("relative error")]
    assert {failure.split()[3] for failure in wrong} == {"decoder", "text_embed"}
    other = [failure for failure in values["failures"] if failure not in wrong]  # one per cent may change what it says, too
    assert other in ([], ["number of greedy captions that differ is 1, the limit is 0"])
    assert values["graphs"]["vision"]["relative"] < 1e-5
    assert "FAILED, written by force" in run(capsys, "info", str(made.package))[1]


def test_refusals(pair: Get, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, other = pair("speaking"), pair("full")
    with pytest.raises(InputError, match="--against must be the checkpoint"):
        verify_package(made.package, Reference(other.checkpoint, images))
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copy(images / "river" / "0.png", plain)
    package = Path(shutil.copytree(made.package, tmp_path / "package"))
    values = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps({**values, "precision": "int4"}))
    with pytest.raises(InputError, match="--data must be labelled for int4"):
        verify_package(package, Reference(made.checkpoint, plain))
    for arguments, words in (
        ([str(made.package)], "--data must name images"),
        ([str(made.checkpoint), "--data", str(images)], "is no exported package"),
        ([str(made.package), "--data", str(images), "--against", str(made.package)], "exported package already"),
    ):
        code, _, err = run(capsys, "verify", *arguments)
        assert (code != 0, words in err) == (True, True), err


def test_a_failing_verdict_is_written_only_by_force(pair: Get, tmp_path: Path) -> None:
    package = Path(shutil.copytree(pair("llava").package, tmp_path / "package"))
    failing = _verdict("fp32", gates=(Gate("relative error of vision", float("inf"), 1e-4, False),))
    assert write_certificate(failing, package) is None
    file = write_certificate(failing, package, force=True)
    assert file is not None
    assert json.loads(file.read_text())["gates"][0]["value"] == "infinite"
