"""One backend at one precision in one scenario, measured inside the process that calls. Knows RSVLM's public calls and the clock.

What is timed is what a user does: `RSVLM.caption` on a path, file reading included. Warm-up images are not counted, and what
is only needed to judge the answers runs after the clock and after the memory peak was taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, MissingDependencyError
from ..evaluation.datasets import Question
from ..hardware import peak_rss_bytes
from .energy import EnergyReading, read_energy
from .images import ImageSet, Sample
from .quality import caption_quality, class_quality, classify_samples, question_quality
from .schema import STAGES, TOKEN_TIMES, Row, Summary

DEFAULT_MODEL = "rsvlm_infer.pipeline:RSVLM"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """What every row of a run does; `limits` of None are the checkpoint's or the machine's own."""

    checkpoint: str
    images: ImageSet
    repeats: int = 1
    warmup: int = 2
    offline_batch: int = 4
    max_new_tokens: int = 32
    tiling: str | None = None
    max_visual_tokens: int | None = None
    threads: int | None = None
    seed: int = 0
    logits_images: int = 8
    model: str = DEFAULT_MODEL  # module:class with RSVLM's public calls

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("offline_batch", 1), ("max_new_tokens", 1), ("logits_images", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}; raise it")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}; raise it")
        if not self.images.samples:
            raise InputError("images must hold at least one image, got none; raise --images-limit or name another folder")

    @property
    def scene_options(self) -> dict[str, Any]:
        """How every call of a run reads an image, be it captioned, classified, asked about or embedded."""
        given = {"tiling": self.tiling, "max_visual_tokens": self.max_visual_tokens}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class PassTimes:
    """One pass over all images: milliseconds of each, and totals. Passes of several processes join to one row."""

    images: int
    latencies_ms: list[float]
    stages: dict[str, list[float]]
    token_times: dict[str, list[float]]
    wall_s: float
    pixels: int
    visual: int
    generated: int
    energy_j: float | None
    energy_why_not: str | None
    draft_steps: int
    draft_tokens: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Measurement:
    """A row, its passes, and what the agreement is made of: greedy tokens by image, first logits [n, V] of the first images."""

    row: Row
    passes: list[PassTimes]
    token_ids: dict[str, list[int]]
    logits: npt.NDArray[np.float32]


def measure(
    work: Workload,
    row: Row,
    progress: Progress,
    *,
    repeats: Sequence[int] | None = None,
    judged: bool = True,
) -> Measurement:
    """Loads the model, warms up, measures, then judges. `progress(done, total)` counts images and judged items.

    Args:
        row: what to measure: its backend, precision and scenario. repeats: which of the work's repeats, None = all: each has its own
        order. judged: False leaves out accuracy and first logits, which another process has found.

    Raises:
        RsvlmError: whatever keeps the model from loading or an image from being read.
    """
    samples, scenario = work.images.samples, row.scenario
    repeats = range(work.repeats) if repeats is None else repeats
    items = sum((sample.label is not None) + len(sample.questions) for sample in samples) if judged else 0
    logits_samples = samples[: work.logits_images] if judged else ()
    counter = _Counter(progress, min(work.warmup, len(samples)) + len(repeats) * len(samples) + len(logits_samples) + items)

    started = time.perf_counter()
    model = load_model(work, row.backend, row.precision)
    load_ms = (time.perf_counter() - started) * 1e3

    for _ in _answers(model, work, scenario, list(samples[: work.warmup])):
        counter.step()
    if hasattr(model.backend, "forget"):
        model.backend.forget()  # or the images of the warm-up would be known
    passes = [_timed_pass(model, work, scenario, repeat, counter) for repeat in repeats]
    peak = peak_rss_bytes()

    first = {sample.name: answer for sample, answer in passes[0].answers}
    times = [_pass_times(each, scenario) for each in passes]
    row = dataclasses.replace(
        join_passes(row, times), load_ms=load_ms, peak_rss_bytes=peak or None, disk_bytes=folder_bytes(Path(work.checkpoint))
    )
    token_ids = {name: [int(i) for i in answer.token_ids] for name, answer in first.items()}
    if not judged:
        return Measurement(row, times, token_ids, np.zeros((0, 0), dtype=np.float32))
    quality: dict[str, float] = {}
    with contextlib.suppress(MissingDependencyError):  # the runner warns once for all rows
        quality |= caption_quality({name: answer.text for name, answer in first.items()}, samples)
    logits = first_logits(model, work, scenario, logits_samples, counter.step)
    if work.images.labels:
        predicted = classify_samples(model, samples, work.images.labels, work.scene_options, counter.step)
        quality |= class_quality(predicted, samples)
    quality |= question_quality(model, samples, work.scene_options, counter.step)
    row = dataclasses.replace(row, quality=quality, answers={name: answer.text for name, answer in first.items()})
    return Measurement(row, times, token_ids, logits)


def load_model(work: Workload, backend: str, precision: str) -> Any:
    """The model of a run, through its public constructor."""
    module, _, name = work.model.partition(":")
    return getattr(importlib.import_module(module), name).from_pretrained(work.checkpoint, backend=backend, precision=precision)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def first_logits(
    model: Any, work: Workload, scenario: str, samples: tuple[Sample, ...], step: Callable[[], None]
) -> npt.NDArray[np.float32]:
    """Logits [n, V] after the prompt of each sample, in the scenario's own batches; [0, 0] for no samples."""
    if not samples:
        return np.zeros((0, 0), dtype=np.float32)
    recorder = _Recorder(model.backend)
    observed = type(model)(recorder, model.tokenizer)  # the same weights, seen through the recorder
    for _ in _answers(observed, dataclasses.replace(work, max_new_tokens=1), scenario, list(samples)):
        step()
    return np.concatenate(recorder.logits).astype(np.float32)


class _Recorder:
    """A backend that keeps the logits of each prefill and leaves everything else alone."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.logits: list[npt.NDArray[np.float32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prefill(self, sequences: Any, capacity: int) -> Any:
        logits, cache = self._backend.prefill(sequences, capacity)
        self.logits.append(np.array(logits, dtype=np.float32))
        return logits, cache


@dataclass
class _Counter:
    """Counts steps towards a known total."""

    progress: Progress
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


@dataclass(frozen=True)
class _Pass:
    """One repeat over all images."""

    answers: list[tuple[Sample, Any]]
    latencies_ms: list[float]
    wall_s: float
    energy_j: float | None
    energy_why_not: str | None
    drafts: tuple[int, ...]  # steps, tokens, guessed and accepted ones


def _answers(model: Any, work: Workload, scenario: str, samples: list[Sample]) -> Iterator[Any]:
    options: dict[str, Any] = {"max_new_tokens": work.max_new_tokens, **work.scene_options}
    if scenario == "Offline":
        paths = [sample.path for sample in samples]
        yield from model.caption_many(paths, batch_size=work.offline_batch, strict=True, **options)
    else:
        for sample in samples:
            yield model.caption(sample.path, **options)


def _timed_pass(model: Any, work: Workload, scenario: str, repeat: int, counter: _Counter) -> _Pass:
    """All images once, in an order of this repeat's own."""
    order = list(work.images.samples)
    random.Random(f"{work.seed} {repeat}").shuffle(order)
    answers, latencies = [], []
    drafts, energy = _draft_counts(model), read_energy()
    started = previous = time.perf_counter()
    for answer in _answers(model, work, scenario, order):
        now = time.perf_counter()
        latencies.append((now - previous) * 1e3)
        answers.append(answer)
        counter.step()
        previous = time.perf_counter()  # the progress report is not the model's time
    wall_s = time.perf_counter() - started
    if scenario == "SingleStream":
        wall_s = sum(latencies) / 1e3
    after = read_energy()
    readable = isinstance(energy, EnergyReading) and isinstance(after, EnergyReading)
    joules = after.joules_since(energy) if isinstance(energy, EnergyReading) and isinstance(after, EnergyReading) else None
    why_not = None if readable else next(each for each in (energy, after) if isinstance(each, str))
    counted = tuple(now - then for now, then in zip(_draft_counts(model), drafts, strict=True))
    return _Pass(list(zip(order, answers, strict=True)), latencies, wall_s, joules, why_not, counted)


def _draft_counts(model: Any) -> tuple[int, int, int, int]:
    """Steps, tokens, guessed and accepted tokens so far, of a model whose engine counts them."""
    drafts = getattr(getattr(model, "engine", None), "drafts", None)
    return (0, 0, 0, 0) if drafts is None else (drafts.all_steps, drafts.all_tokens, drafts.drafted, drafts.accepted)


def _pass_times(each: _Pass, scenario: str) -> PassTimes:
    answers = [answer for _, answer in each.answers]
    several = [answer for answer in answers if answer.tokens.generated > 1]  # one token has no time per further token
    chosen = {"ttft_ms": answers, "tpot_ms": several}
    steps, tokens, drafted, accepted = each.drafts
    return PassTimes(
        images=len(answers),
        latencies_ms=each.latencies_ms if scenario == "SingleStream" else [],
        stages={name: [getattr(answer.timings, name) for answer in answers] for name in STAGES},
        token_times={name: [getattr(answer.timings, name) for answer in chosen[name]] for name in TOKEN_TIMES},
        wall_s=each.wall_s,
        pixels=sum(answer.plan.scene_height * answer.plan.scene_width for answer in answers),
        visual=sum(answer.tokens.visual for answer in answers),
        generated=sum(answer.tokens.generated for answer in answers),
        energy_j=each.energy_j,
        energy_why_not=each.energy_why_not,
        draft_steps=steps,
        draft_tokens=tokens,
        drafted=drafted,
        accepted=accepted,
    )


def join_passes(row: Row, passes: Sequence[PassTimes]) -> Row:
    """The row's numbers from all its passes."""
    images, wall_s = sum(each.images for each in passes), sum(each.wall_s for each in passes)
    latencies = [value for each in passes for value in each.latencies_ms]
    generated, drafted, steps = (
        sum(getattr(each, name) for each in passes) for name in ("generated", "drafted", "draft_steps")
    )
    joined = {
        part: {name: [value for each in passes for value in getattr(each, part)[name]] for name in getattr(passes[0], part)}
        for part in ("stages", "token_times")
    }
    joules = [each.energy_j for each in passes if each.energy_j is not None]
    return dataclasses.replace(
        row,
        images=passes[0].images,
        repeats=len(passes),
        latency_ms=Summary.of(latencies) if latencies else None,
        samples_ms=tuple(round(value, 3) for value in latencies),
        stages={name: Summary.of(values) for name, values in joined["stages"].items()},
        token_times={name: Summary.of(values) for name, values in joined["token_times"].items() if values},
        images_per_s=images / wall_s,
        mpix_per_s=sum(each.pixels for each in passes) / 1e6 / wall_s,
        tokens_per_s=generated / wall_s,
        visual_tokens=sum(each.visual for each in passes) / images,
        generated_tokens=generated / images,
        energy_j=sum(joules) / images if len(joules) == len(passes) else None,
        energy_why_not=next((each.energy_why_not for each in passes if each.energy_why_not), None),
        tokens_per_step=sum(each.draft_tokens for each in passes) / steps if drafted else None,
        draft_acceptance=sum(each.accepted for each in passes) / drafted if drafted else None,
    )


def workload_to_dict(work: Workload) -> dict[str, Any]:
    """JSON values of a workload, for the process that measures."""
    values = dataclasses.asdict(work)
    for sample in values["images"]["samples"]:
        sample["path"] = str(sample["path"])
        for question in sample["questions"]:
            question["path"] = str(question["path"])
    return values


def workload_from_dict(values: dict[str, Any]) -> Workload:
    """The workload behind `workload_to_dict`."""
    images = values["images"]
    samples = tuple(
        Sample(
            name=each["name"],
            path=Path(each["path"]),
            label=each["label"],
            captions=tuple(each["captions"]),
            questions=tuple(Question(**{**question, "path": Path(question["path"])}) for question in each["questions"]),
        )
        for each in images["samples"]
    )
    return Workload(**{**values, "images": ImageSet(images["name"], images["source"], samples, images["labels"])})
