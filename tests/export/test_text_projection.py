"""The text projection follows the rounding: its fit by hand, and a package whose embedded texts turn less for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.running import run
from tests.export.packages import SPEAKING, random_knowledge, random_model, save_checkpoint, torch, write_tokenizer
from tests.native import needs_native

from rsvlm_export import calibration_texts as calibrating  # isort: skip
from rsvlm_export import refit as refitting
from rsvlm_export.calibration_texts import _split, calibration_sentences, spread
from rsvlm_export.export import export_checkpoint
from rsvlm_export.native import export_native
from rsvlm_export.refit import refit_projection
from rsvlm_export.text_projection import DAMPING, TextProjection, turn
from rsvlm_infer import RSVLM
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.native_package import NativePackage

CONFIG = dataclasses.replace(
    SPEAKING,
    language=dataclasses.replace(SPEAKING.language, hidden_size=64, num_layers=3),  # type: ignore[type-var]
)


def _states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def _projection(bias: bool = True) -> TextProjection:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 16, generator=generator)
    return TextProjection(weight, torch.randn(8, generator=generator) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_by_hand(bias: bool) -> None:
    """Least squares, whose damping is rows of their own that ask for the old parameters."""
    before, exact = _projection(bias), _states(40)
    own = exact + 0.3 * _states(40, 1)
    after = before.refitted(exact, own)
    w = before.weight.double().numpy()
    rows, targets = own.double().numpy(), exact.double().numpy() @ w.T
    if bias:
        assert before.bias is not None
        column = np.abs(rows).mean()
        targets = targets + before.bias.double().numpy()
        w = np.concatenate([w, before.bias.double().numpy()[:, None] / column], axis=1)
        rows = np.concatenate([rows, np.full((40, 1), column)], axis=1)
    lengths = np.linalg.norm(targets, axis=1, keepdims=True)
    rows, targets = rows / lengths, targets / lengths
    pull = np.sqrt(DAMPING * np.square(rows).sum(axis=0).mean()) * np.eye(rows.shape[1])
    solved = np.linalg.lstsq(np.concatenate([rows, pull]), np.concatenate([targets, pull @ w.T]), rcond=None)[0].T
    np.testing.assert_allclose(after.weight.numpy(), solved[:, :16], rtol=1e-5, atol=1e-6)
    if bias:
        assert after.bias is not None
        np.testing.assert_allclose(after.bias.numpy(), solved[:, 16] * column, rtol=1e-5, atol=1e-6)
    else:
        assert after.bias is None


def test_what_goes_wrong_alike_is_taken_back() -> None:
    """A linear change of all states, and a shift, is undone for texts that were not fitted; without any change nothing moves."""
    before = _projection()
    change, shift = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(5)), 0.2 * _states(1, 6)
    exact, held_out = _states(400), _states(50, 9)
    after = before.refitted(exact, exact @ change + shift)
    own = held_out @ change + shift
    assert turn(before.embed(held_out), after.embed(own)) < 0.05 * turn(before.embed(held_out), before.embed(own))
    same = before.refitted(exact, exact)
    for name, value in before.state().items():
        assert torch.allclose(same.state()[name], value, atol=1e-6)


def test_a_text_counts_by_its_angle() -> None:
    """A projection without a bias reads ten times longer states as the same embedding."""
    before, exact = _projection(bias=False), _states(40)
    own = exact + 0.3 * _states(40, 1)
    longer = torch.ones(40, 1)
    longer[7] = 10
    assert torch.allclose(
        before.refitted(exact, own).weight, before.refitted(exact * longer, own * longer).weight, rtol=1e-4, atol=1e-5
    )


def test_sentences_are_distinct_and_some_are_held_out() -> None:
    fitted, held_out = _split([" a river", "a river", "", *(f"house {index}" for index in range(20))])
    assert len(fitted) + len(held_out) == 4 + 4 + 1 + 20
    assert not set(fitted) & set(held_out)
    assert len(held_out) == 29 // 4
    capital = [sentence for sentence in (*fitted, *held_out) if sentence[0].isupper()]
    assert 0.3 < len(capital) / 29 < 0.7
    assert set(capital) & set(held_out)
    assert set(capital) < {sentence[0].upper() + sentence[1:] for sentence in (*fitted, *held_out)}
    assert _split([])[0]
    assert _split([])[1]
    assert spread([str(index) for index in range(10)], 4) == ["0", "2", "5", "7"]
    assert spread(["one"], 4) == ["one"]
    assert spread([], 4) == []


def _rsicd(folder: Path, count: int) -> list[Path]:
    """A folder like RSICD's, without pixels; the paths of its train images. Every fifth image is of the test split."""
    rng = np.random.default_rng(4)
    words = ["river", "roof", "grey", "round", "field", "of", "near", "two", "white", "boats", "trees", "a"]
    images = []
    for index in range(count):
        sentence = " ".join(rng.choice(words, 3 + index % 5))
        split = "test" if index % 5 == 4 else "train"
        images.append({"filename": f"{index}.jpg", "split": split, "theme": "river", "captions": [f"{split} {sentence}"]})
    (folder / "images").mkdir(parents=True)
    (folder / "captions.json").write_text(json.dumps(images))
    return [folder / "images" / image["filename"] for image in images if image["split"] == "train"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    knowledge = tmp_path / "entries"
    random_knowledge().save(knowledge)
    words = write_tokenizer(tmp_path / "words")
    return save_checkpoint(
        tmp_path / "checkpoint", CONFIG, random_model(CONFIG).state_dict(), knowledge=knowledge, tokenizer=words
    )


@needs_native
def test_rsicd_gives_sentences_of_its_train_split(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, images = load_checkpoint(checkpoint), _rsicd(tmp_path / "rsicd", 100)
    fitted, held_out = calibration_sentences(loaded, images[:2], lambda done: None)
    assert len(fitted) + len(held_out) > 40
    assert {sentence.split()[0] for sentence in held_out} <= {"train", "Train", "green", "A"}  # words and labels, too
    monkeypatch.setattr(calibrating, "SENTENCES", 8)
    assert len([*fitted, *held_out]) > sum(map(len, calibration_sentences(loaded, images[:2], lambda done: None))) == 16


@needs_native
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_embedded_texts_of_the_package_turn_less(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the packages themselves, on sentences that fitted nothing, against the eager model."""
    loaded, images = load_checkpoint(checkpoint), _rsicd(tmp_path / "rsicd", 500)
    fitted, held_out = calibration_sentences(loaded, images, lambda done: None)
    parameters, notes = refit_projection(loaded, precision, None, fitted, held_out)
    assert notes["fitted"]
    assert notes["turn"]["after"] < 0.99 * notes["turn"]["before"]  # random weights err with little in common
    exact = RSVLM.from_pretrained(checkpoint, backend="eager").embed_text(held_out)
    turns = {}
    for name, own in (("before", None), ("after", parameters)):
        package = export_native(loaded, tmp_path / name, precision, fitted=own)
        embedded = RSVLM.from_pretrained(package).embed_text(held_out)
        turns[name] = turn(torch.from_numpy(exact), torch.from_numpy(embedded))
    assert turns["after"] < 0.99 * turns["before"]
    assert turns == pytest.approx(notes["turn"], rel=0.05)  # the runtime reads the projection's inputs in bfloat16
    monkeypatch.setattr(refitting, "turn", lambda exact, own: 0.5)  # a fit that helps nothing
    assert refit_projection(loaded, precision, None, fitted, held_out)[0] == {}


@needs_native
def test_int8_is_fitted_when_it_is_given_images(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = _rsicd(tmp_path / "rsicd", 500)
    for image in images:
        image.touch()  # sentences are enough, nothing is opened
    plain = NativePackage.open(export_checkpoint(checkpoint, tmp_path / "plain", format="native", precision="int8"))
    fitted = NativePackage.open(
        export_checkpoint(checkpoint, tmp_path / "fitted", format="native", precision="int8", calibrate=tmp_path / "rsicd")
    )
    assert "calibration" not in plain.manifest
    assert fitted.manifest["calibration"]["text_projection"]["fitted"]
    differ = {name for name in plain.weights if not np.array_equal(plain.weights[name][3], fitted.weights[name][3])}
    assert differ == {"alignment.text_proj", "alignment.text_proj.bias"}
    assert "text projection" not in run(capsys, "info", str(plain.path))[1]
    values = fitted.manifest["calibration"]["text_projection"]
    line = f"fitted to {values['texts']} texts: held-out ones turn by {values['turn']['after']:g} (1 - cosine)"
    assert line in run(capsys, "info", str(fitted.path))[1]
    manifest = json.loads((fitted.path / "manifest.json").read_text())
    manifest["calibration"]["text_projection"]["fitted"] = False
    (fitted.path / "manifest.json").write_text(json.dumps(manifest))
    assert "text projection of the checkpoint: fitting it did not help" in run(capsys, "info", str(fitted.path))[1]
