"""Predictions item by item with a model whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.bench.predict import Candidates, PredictSettings, answer_question, predict
from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.evaluation.sets import EvaluationSet, Item, Task
from rsvlm_infer.tasks.result import Answer, Classification
from tests.bench.fake_rsvlm import FakeRSVLM


class Choosy(FakeRSVLM):
    """Keeps the options of its calls, and cannot read images whose name holds "bad"."""

    calls: list[dict[str, Any]]

    def _check(self, image: Path, **options: Any) -> None:
        self.calls = [*getattr(self, "calls", []), options]
        if "bad" in image.name:
            raise ImageReadError(f"{image.name} is bad")

    def ask(self, image: Path, question: str, **options: Any) -> Answer:
        self._check(image, question=question, **options)
        return Answer(source=str(image), text="3")

    def classify(self, image: Path, labels: Sequence[str], **options: Any) -> Classification:
        self._check(image, **options)
        return super().classify(image, labels)

    def caption_many(self, images: Any, **options: Any) -> Any:
        for image in images:
            try:
                self._check(image, **options)
                yield Answer(source=str(image), text=f"about {image.name}")
            except ImageReadError as error:
                yield Answer(source=str(image), error=error)


def model() -> Choosy:
    return Choosy.from_pretrained("x")  # type: ignore[return-value]


def make(task: Task, **labels: str) -> EvaluationSet:
    names = ("river.jpg", "bad.jpg", "forest.jpg")
    items = tuple(Item(name, Path(name), (name[:-4],), "How many?", "count") for name in names)
    return EvaluationSet(task, "s", "r", None, items, labels)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (make("caption"), ["about river.jpg", None, "about forest.jpg"]),
        (make("classify", river="river", woods="forest"), ["river", None, "woods"]),
        (make("vqa"), ["3", None, "3"]),
    ],
    ids=["caption", "classify", "vqa"],
)
def test_a_bad_image_is_an_error_among_predictions(data: EvaluationSet, expected: list[str | None]) -> None:
    found = list(predict(model(), data, data.items, PredictSettings()))
    assert [item.key for item, _ in found] == ["river.jpg", "bad.jpg", "forest.jpg"]
    assert [value if isinstance(value, str) else None for _, value in found] == expected
    assert isinstance(found[1][1], ImageReadError)


def test_similarities_are_float32_as_shortest_decimals() -> None:
    data = make("retrieval")
    rows = [value for _, value in predict(model(), data, data.items[:1], PredictSettings())]
    assert rows == [[1.0, 0.5, 0.0]]  # the texts "River", "Bad" (no known word), "Forest"
    candidates = Candidates(model(), ["River", "Forest", "River"])
    assert candidates.columns == [0, 1, 0]
    np.testing.assert_array_equal(candidates.similarity(Path("river.jpg")), np.array([1, 0], dtype=np.float32))


def test_options_reach_the_model() -> None:
    fake = model()
    settings = PredictSettings(max_new_tokens=5, batch_size=2, prompt="Say.", method="language", scene={"tiling": "fixed"})
    for task in ("caption", "classify", "vqa"):
        data = make(task, river="river")  # type: ignore[arg-type]
        list(predict(fake, data, data.items[:1], settings))
    assert fake.calls == [
        {"batch_size": 2, "strict": False, "max_new_tokens": 5, "tiling": "fixed", "prompt": "Say."},
        {"tiling": "fixed", "method": "language"},
        {"question": "How many?", "choices": None, "max_new_tokens": 5, "tiling": "fixed"},
    ]


def test_closed_kinds_are_asked_as_choices() -> None:
    assert answer_question(FakeRSVLM.from_pretrained("x"), Path("a"), "Rural?", "rural_urban") == "rural"
    assert answer_question(FakeRSVLM.from_pretrained("x"), Path("a"), "How many?", "count") == "3"
