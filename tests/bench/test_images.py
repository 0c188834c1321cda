"""Which images a run takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rsvlm_infer.bench.images import ImageSet, choose_images, rsvqa_images, shared_folder
from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.datasets import Question


def _choose(folder: Path | None, fetched: Path | None = None) -> ImageSet:
    def fetch() -> Path:
        if fetched is None:
            pytest.fail("must not fetch anything")
        return fetched

    return choose_images(folder, split="test", questions_per_image=2, seed=0, fetch_rsvqa=fetch)


@pytest.fixture
def rsvqa(tmp_path: Path) -> Path:
    """RSVQA's layout with two low- and one high-resolution image of three questions each."""
    folder = tmp_path / "rsvqa"
    for part, name, images_folder, ids in (("LR", "LR", "Images_LR", (5, 6)), ("HR", "USGS", "Images/Data", (7,))):
        (folder / f"RSVQA-{part}" / images_folder).mkdir(parents=True)
        questions, answers = [], []
        for image in ids:
            (folder / f"RSVQA-{part}" / images_folder / f"{image}.tif").write_bytes(b"x")
            for number in range(3):
                key = image * 10 + number
                questions.append(
                    {"id": key, "img_id": image, "type": "count", "question": f"q{key}", "answers_ids": [key], "active": True}
                )
                answers.append({"id": key, "answer": f"a{key}", "active": True})
        for kind, items in (("questions", questions), ("answers", answers)):
            file = folder / f"RSVQA-{part}" / f"{name}_split_test_{kind}.json"
            file.write_text(json.dumps({kind: items}), encoding="utf-8")
    return folder


def test_a_named_rsicd_folder_gives_themes_and_sentences(rsicd: Path) -> None:
    images = _choose(rsicd)
    assert images.name == "RSICD test"
    assert (images.samples[0].name, images.samples[0].label) == ("forest-even.jpg", "forest")
    assert images.labels["denseresidential"] == "dense residential area"
    assert len(images.labels) == 30
    (rsicd / "images" / "forest-odd.jpg").unlink()
    assert len(_choose(rsicd).samples) == 3  # what is not on this disk is not measured
    for path in (rsicd / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="found none"):
        _choose(rsicd)


def test_other_themes_name_themselves(rsicd: Path) -> None:
    file = rsicd / "captions.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"beach"', '"volcano"'), encoding="utf-8")
    assert _choose(rsicd).labels == {"forest": "forest", "river": "river", "volcano": "volcano"}


def test_a_folder_of_classes_and_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("AnnualCrop/a.jpg", "Sea_Lake/b.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True)
        (tmp_path / "classes" / name).touch()
    images = _choose(tmp_path / "classes")
    assert images.labels == {"AnnualCrop": "annual crop", "Sea_Lake": "sea lake"}
    assert [sample.name for sample in images.samples] == ["AnnualCrop/a.jpg", "Sea_Lake/b.png"]
    flat = _choose(tmp_path / "classes" / "AnnualCrop")
    assert [(sample.name, sample.label) for sample in flat.samples] == [("a.jpg", None)]
    assert flat.labels == {}
    with pytest.raises(InputError, match="must name a folder"):
        _choose(tmp_path / "absent")


def test_default_is_rsicd_in_the_shared_folder(rsicd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSVLM_DATA", str(rsicd.parent))
    assert _choose(None).name == "RSICD test"
    monkeypatch.setenv("RSVLM_DATA", str(rsicd / "absent"))
    with pytest.raises(InputError, match="RSVLM_DATA must name a folder"):
        shared_folder()


def test_shared_folder_is_the_sibling_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RSVLM_DATA", raising=False)
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    assert shared_folder() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert shared_folder() == tmp_path / "shared" / "data"


def test_without_shared_data_rsvqa_is_fetched(rsvqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("RSVLM_DATA", str(tmp_path / "empty"))
    images = _choose(None, rsvqa)
    assert images.name == "RSVQA LR+HR"
    assert [sample.name for sample in images.samples] == ["RSVQA-LR/5.tif", "RSVQA-LR/6.tif", "RSVQA-HR/7.tif"]
    assert all(len(sample.questions) == 2 for sample in images.samples)


def test_questions_are_chosen_by_seed(rsvqa: Path) -> None:
    chosen = [[sample.questions for sample in rsvqa_images(rsvqa, 2, seed).samples] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert len(rsvqa_images(rsvqa, 9, 0).samples[0].questions) == 3


def test_order_is_seeded_and_the_digest_knows_it(images: ImageSet) -> None:
    one, two, other = images.limited(None, 3), images.limited(None, 3), images.limited(None, 4)
    assert [sample.name for sample in one.samples] == [sample.name for sample in two.samples]
    assert one.digest == two.digest != other.digest
    assert len(images.limited(2, 3).samples) == 2
    assert sorted(sample.name for sample in one.samples) == sorted(sample.name for sample in images.samples)
    before = images.digest
    images.samples[0].path.write_bytes(b"another length")
    assert images.digest != before


def test_digest_knows_what_is_asked_and_what_is_right(images: ImageSet, tmp_path: Path) -> None:
    first, *others = images.samples
    question = Question(first.path, "count", "How many?", "3")
    asked = dataclasses.replace(images, samples=(dataclasses.replace(first, questions=(question,)), *others))
    changed = [
        asked,
        dataclasses.replace(images, labels={**images.labels, "forest": "woods"}),
        dataclasses.replace(images, labels=dict(list(images.labels.items())[:-1])),
    ]
    for changes in (
        {"label": None},
        {"label": "river"},
        {"captions": first.captions[:1]},
        {
            "captions": ("a b .", "c ."),
        },
    ):
        changed.append(dataclasses.replace(images, samples=(dataclasses.replace(first, **changes), *others)))
    for other in (
        dataclasses.replace(question, kind="area"),
        dataclasses.replace(question, question="How many rivers?"),
        dataclasses.replace(question, answer="4"),
    ):
        changed.append(dataclasses.replace(images, samples=(dataclasses.replace(first, questions=(other,)), *others)))
    twice = dataclasses.replace(first, questions=(question, question))
    changed.append(dataclasses.replace(images, samples=(twice, *others)))
    digests = [images.digest, *(each.digest for each in changed)]
    assert len(set(digests)) == len(digests) == 12

    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.write_bytes(first.path.read_bytes())
    moved = dataclasses.replace(first, path=elsewhere, questions=(dataclasses.replace(question, path=elsewhere),))
    assert dataclasses.replace(images, samples=(moved, *others), source="there").digest == asked.digest
