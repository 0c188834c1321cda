"""One row measured with a model whose answers and times are known."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rsvlm_infer.bench import measure as measure_module
from rsvlm_infer.bench.energy import EnergyReading
from rsvlm_infer.bench.images import ImageSet
from rsvlm_infer.bench.measure import Workload, folder_bytes, join_passes, measure, workload_from_dict, workload_to_dict
from rsvlm_infer.bench.quality import class_quality, retrieval_quality
from rsvlm_infer.bench.schema import Row, Scenario
from rsvlm_infer.engine.drafts import DraftCounts
from rsvlm_infer.errors import BackendError, InputError
from rsvlm_infer.evaluation.datasets import Question
from tests.bench.fake_rsvlm import FakeBackend, FakeRSVLM


def _silent(done: int, total: int) -> None:
    pass


def test_single_stream_row(work: Workload) -> None:
    seen: list[tuple[int, int]] = []
    measured = measure(work, Row("eager", "float32", "SingleStream"), lambda done, total: seen.append((done, total)))
    row = measured.row
    assert row.key == ("eager", "float32", "SingleStream")
    assert (row.images, row.repeats, len(row.samples_ms)) == (4, 2, 8)
    assert row.latency_ms is not None
    assert row.latency_ms.count == 8
    assert {name: summary.p50 for name, summary in row.stages.items()} == {
        "read_ms": 1.0, "plan_ms": 2.0, "preprocess_ms": 3.0, "encode_ms": 4.0, "augment_ms": 0.0, "prefill_ms": 6.0, "decode_ms": 25.0,
    }  # fmt: skip
    assert row.token_times["ttft_ms"].p50 == 16.0
    assert row.token_times["tpot_ms"].mean == 5.0
    assert (row.visual_tokens, row.generated_tokens) == (10.0, 6.0)
    assert row.images_per_s == pytest.approx(8 / (row.latency_ms.mean * 8 / 1e3))
    assert row.mpix_per_s == pytest.approx(2 * row.images_per_s)  # 1000 x 2000 pixels
    assert row.tokens_per_s == pytest.approx(6 * row.images_per_s)
    assert row.disk_bytes == 1024
    assert row.peak_rss_bytes is not None
    assert row.peak_rss_bytes > 2**20
    assert row.load_ms is not None
    assert row.load_ms >= 0
    assert row.quality["class_accuracy"] == 0.75
    assert row.quality["class_accuracy_mean"] == pytest.approx(2 / 3)
    assert row.quality["bleu_4"] == pytest.approx(1.0)
    assert row.answers["river-even.jpg"] == "a green field near the river"
    assert measured.token_ids["river-even.jpg"] == [0, 1, 2, 3, 4, 5]
    assert measured.logits.shape == (2, 7)
    np.testing.assert_array_equal(measured.logits[0], np.roll(np.arange(7), len(work.images.samples[0].name)))
    # 1 warm-up + 2 x 4 measured + 2 with logits + 4 classified
    assert seen == [(i, 15) for i in range(1, 16)]


def test_passes_of_several_processes_join_to_one_row(work: Workload) -> None:
    row = Row("eager", "float32", "SingleStream")
    whole = measure(work, row, _silent)
    parts = [measure(work, row, _silent, repeats=[repeat], judged=repeat == 0) for repeat in (0, 1)]
    assert parts[1].row.quality == {}
    assert parts[1].logits.shape == (0, 0)
    joined = join_passes(parts[0].row, [each for part in parts for each in part.passes])
    assert (joined.images, joined.repeats, len(joined.samples_ms)) == (4, 2, 8)
    assert joined.stages == whole.row.stages
    assert joined.quality == whole.row.quality
    assert joined.generated_tokens == whole.row.generated_tokens


def test_guesses_are_those_of_the_measured_pass(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = DraftCounts()

    def counting(self: FakeRSVLM, image: Path, **options: object) -> object:
        drafts.record(rows=1, drafted=3, accepted=2)
        return self._answers([image], 6, None)[0]

    monkeypatch.setattr(FakeRSVLM, "caption", counting)
    monkeypatch.setattr(FakeRSVLM, "engine", SimpleNamespace(drafts=drafts), raising=False)
    measured = measure(work, Row("eager", "float32", "SingleStream"), _silent)
    assert drafts.all_steps == 1 + 8 + 2  # warm-up and logits are not counted
    assert [each.drafted for each in measured.passes] == [12, 12]
    assert (measured.row.tokens_per_step, measured.row.draft_acceptance) == (3.0, pytest.approx(2 / 3))


def test_energy_is_per_image_or_says_why_not(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(0, 10**9, 20_000_000))
    monkeypatch.setattr(measure_module, "read_energy", lambda: EnergyReading({"package": next(counter)}, {"package": 10**9}))
    row = Row("eager", "float32", "Offline")
    assert measure(work, row, _silent).row.energy_j == pytest.approx(5.0)  # 20 J a pass of four images
    monkeypatch.setattr(measure_module, "read_energy", lambda: "not readable: no")
    measured = measure(work, row, _silent).row
    assert (measured.energy_j, measured.energy_why_not) == (None, "not readable: no")


def test_what_the_warm_up_left_is_forgotten(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(FakeBackend, "forget", lambda self: forgotten.append(len(FakeRSVLM.tilings)), raising=False)
    monkeypatch.setattr(FakeRSVLM, "tilings", [])
    measure(work, Row("eager", "float32", "SingleStream"), _silent)
    assert forgotten == [work.warmup]


def test_offline_row_has_throughput_but_no_latency(work: Workload) -> None:
    measured = measure(work, Row("eager", "float32", "Offline"), _silent)
    assert measured.row.latency_ms is None
    assert measured.row.samples_ms == ()
    assert measured.row.images_per_s is not None
    assert measured.row.images_per_s > 0
    assert measured.logits.shape == (2, 7)
    assert set(measured.token_ids) == {sample.name for sample in work.images.samples}


def test_one_generated_token_has_no_time_per_further_token(work: Workload) -> None:
    row = measure(dataclasses.replace(work, max_new_tokens=1, warmup=0), Row("eager", "float32", "SingleStream"), _silent).row
    assert "tpot_ms" not in row.token_times
    assert row.token_times["ttft_ms"].count == 8


def test_no_logits_and_no_eval_extra(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    measured = measure(
        dataclasses.replace(work, logits_images=0, tiling="dris"), Row("eager", "float32", "SingleStream"), _silent
    )
    assert measured.logits.shape == (0, 0)
    assert "cider" not in measured.row.quality
    assert measured.row.quality["class_accuracy"] == 0.75


def test_questions_are_scored_by_kind(work: Workload) -> None:
    first, *others = work.images.samples
    questions = (
        Question(first.path, "presence", "Is there a road?", "yes"),
        Question(first.path, "rural_urban", "Is it rural or urban?", "urban"),
        Question(first.path, "count", "How many?", "3"),
        Question(first.path, "count", "How many rivers?", "4"),
    )
    images = ImageSet("RSVQA", "here", (dataclasses.replace(first, questions=questions, label=None, captions=()),))
    quality = measure(dataclasses.replace(work, images=images), Row("eager", "float32", "SingleStream"), _silent).row.quality
    assert quality == {
        "answer_accuracy": 0.5,
        "answer_accuracy_count": 0.5,
        "answer_accuracy_presence": 1.0,
        "answer_accuracy_rural_urban": 0.0,
    }
    assert others


def test_nothing_is_said_about_what_has_no_labels(work: Workload) -> None:
    bare = tuple(dataclasses.replace(sample, label=None, captions=()) for sample in work.images.samples)
    images = ImageSet("bare", "here", bare)
    assert measure(dataclasses.replace(work, images=images), Row("eager", "float32", "Offline"), _silent).row.quality == {}
    assert class_quality({}, bare) == {}
    assert retrieval_quality(None, bare, {}, lambda: None) == {}


@pytest.mark.parametrize("tiling", ["fixed", None])
@pytest.mark.parametrize(("scenario", "caption_call"), [("SingleStream", "caption"), ("Offline", "caption_many")])
def test_tiling_holds_for_every_call(
    work: Workload, monkeypatch: pytest.MonkeyPatch, tiling: str | None, scenario: Scenario, caption_call: str
) -> None:
    monkeypatch.setattr(FakeRSVLM, "tilings", [])
    first, *others = work.images.samples
    asked = dataclasses.replace(first, questions=(Question(first.path, "count", "How many?", "3"),))
    images = dataclasses.replace(work.images, samples=(asked, *others))
    measure(dataclasses.replace(work, images=images, tiling=tiling), Row("eager", "float32", scenario), _silent)
    assert set(FakeRSVLM.tilings) == {(caption_call, tiling), ("classify", tiling), ("ask", tiling)}


def test_refusals_of_the_model_pass_through(work: Workload) -> None:
    with pytest.raises(BackendError, match="not for this fake"):
        measure(work, Row("eager", "float16", "SingleStream"), _silent)


@pytest.mark.parametrize(
    ("name", "value"),
    [("repeats", 0), ("warmup", -1), ("offline_batch", 0), ("max_new_tokens", 0), ("threads", 0), ("logits_images", -1)],
)
def test_workload_checks_its_numbers(work: Workload, name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least"):
        dataclasses.replace(work, **{name: value})


def test_workload_needs_images(work: Workload) -> None:
    with pytest.raises(InputError, match="at least one image"):
        dataclasses.replace(work, images=ImageSet("none", "nowhere", ()))


def test_workload_survives_json(work: Workload) -> None:
    question = Question(Path("a.tif"), "count", "How many?", "3")
    sample = dataclasses.replace(work.images.samples[0], questions=(question,))
    work = dataclasses.replace(work, images=ImageSet("x", "y", (sample,), {"a": "b"}))
    assert workload_from_dict(json.loads(json.dumps(workload_to_dict(work)))) == work


def test_folder_bytes_counts_files_below(checkpoint: Path) -> None:
    assert folder_bytes(checkpoint) == 1024
