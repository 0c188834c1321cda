"""Accuracy over a whole set with a model whose answers are known."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rsvlm_infer.bench.accuracy import measure_accuracy
from rsvlm_infer.bench.images import ImageSet
from rsvlm_infer.bench.measure import Workload
from rsvlm_infer.evaluation.datasets import Question
from tests.bench.fake_rsvlm import FakeRSVLM
from tests.bench.made_up import make_report

ENVIRONMENT = make_report().environment


def test_every_metric_of_a_captioned_and_labelled_set(work: Workload, tmp_path: Path) -> None:
    result = measure_accuracy(work, "auto", "float32", ENVIRONMENT, Console(file=io.StringIO()))
    metrics = result.metrics
    assert metrics["class_accuracy"] == 0.75
    assert metrics["rouge_l"] == pytest.approx(1.0)
    assert metrics["text_to_image_r10"] == 1.0  # four images only
    # the shared sentence and both forest sentences hit; "river" meets an odd image first, "road" meets none
    assert metrics["text_to_image_r1"] == pytest.approx(6 / 8)
    assert metrics["image_to_text_r1"] == 1.0
    assert metrics["mean_recall"] == pytest.approx((6 / 8 + 5) / 6)
    assert (result.backend, result.precision) == ("eager", "float32")

    paths = result.write(tmp_path / "out")
    assert [path.name for path in paths] == ["accuracy.json", "accuracy.md", "predictions.jsonl"]
    values = json.loads(paths[0].read_text(encoding="utf-8"))
    assert values["schema"] == "rsvlm-accuracy/1"
    assert values["metrics"] == metrics
    assert "| class accuracy | 75.0 % |" in paths[1].read_text(encoding="utf-8")
    lines = [json.loads(line) for line in paths[2].read_text(encoding="utf-8").splitlines()]
    assert lines[3] == {
        "image": "road-odd.jpg",
        "caption": "a green field near the river",
        "references": ["a green field near the river .", "the road is green ."],
        "label": "beach",
        "predicted_label": "airport",
    }


def test_a_set_of_questions_only(work: Workload) -> None:
    sample = dataclasses.replace(work.images.samples[0], label=None, captions=())
    sample = dataclasses.replace(sample, questions=(Question(sample.path, "count", "How many?", "3"),))
    only = dataclasses.replace(work, images=ImageSet("RSVQA", "here", (sample,)), tiling="fixed")
    result = measure_accuracy(only, "auto", "auto", ENVIRONMENT, Console(file=io.StringIO()))
    assert result.metrics == {"answer_accuracy": 1.0, "answer_accuracy_count": 1.0}
    assert result.predictions[0].caption is None
    assert result.table().title == "Accuracy on RSVQA, 1 images (eager auto)"


@pytest.mark.parametrize("tiling", ["anyres", None])
def test_tiling_holds_for_every_call(work: Workload, monkeypatch: pytest.MonkeyPatch, tiling: str | None) -> None:
    monkeypatch.setattr(FakeRSVLM, "tilings", [])
    first, *others = work.images.samples
    asked = dataclasses.replace(first, questions=(Question(first.path, "count", "How many?", "3"),))
    images = dataclasses.replace(work.images, samples=(asked, *others))
    measure_accuracy(
        dataclasses.replace(work, images=images, tiling=tiling), "auto", "auto", ENVIRONMENT, Console(file=io.StringIO())
    )
    calls = {name: [each for called, each in FakeRSVLM.tilings if called == name] for name, _ in FakeRSVLM.tilings}
    assert calls == {
        "caption_many": [tiling],
        "classify": [tiling] * 4,
        "ask": [tiling],
        "embed_levels": [tiling] * 4,
    }
