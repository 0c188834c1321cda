"""The proof of a package: compares it with its checkpoint, holds the numbers to gates and writes the certificate. Knows no rounding.

A certificate says what was compared on which inputs and how it came out. It is written when every gate holds, or by force; a package
that fails gets none, and loses an older one.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsvlm_infer import __version__
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.backends.onnx import OnnxBackend
from rsvlm_infer.bench.images import ImageSet, Sample, choose_images
from rsvlm_infer.bench.output import write_atomically
from rsvlm_infer.bench.quality import caption_quality, class_quality, classify_samples, retrieval_quality
from rsvlm_infer.contract import CERTIFICATE, MANIFEST
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.checkpoint import sha256_of
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.package import Package
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.text.tokenizer import Tokenizer

from .compare import GraphError, compare_graphs, json_number
from .package import model_digest

FORMAT, VERSION = "rsvlm-certificate", 1
FP32_RELATIVE = 1e-4  # of each graph's largest value: ten times what other orders of sums give through thirty layers
HALF_COSINE = 0.999
INTEGER_POINTS = 0.5
METRICS = {"cider": "CIDEr", "class_accuracy": "theme accuracy", "mean_recall": "mean recall"}  # fractions; a point is 0.01
GRAPH_IMAGES = 4  # real images whose graphs are compared; the metrics use the whole sample
NEW_TOKENS = 32


@dataclass(frozen=True)
class Gate:
    """One condition: `value` against `limit`."""

    name: str
    value: float
    limit: float
    passed: bool

    def text(self) -> str:
        return f"{self.name} is {self.value:.4g}, the limit is {self.limit:g}"


@dataclass(frozen=True)
class Verdict:
    """A certificate's content. `metrics`: name -> (checkpoint, package), as fractions."""

    precision: str
    graphs: dict[str, GraphError]
    greedy: dict[str, Any]
    metrics: dict[str, tuple[float, float]]
    sample: dict[str, Any]
    gates: tuple[Gate, ...] = field(default=())

    @property
    def failures(self) -> list[str]:
        return [gate.text() for gate in self.gates if not gate.passed]

    @property
    def passed(self) -> bool:
        return not self.failures


def verify_package(
    package: str | Path,
    checkpoint: str | Path,
    data: Path,
    *,
    split: str = "test",
    limit: int = 200,
    seed: int = 0,
    step: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Compares a package with the checkpoint that it was made from.

    Args:
        data: RSICD's folder, a folder of class folders, or plain images; what it is labelled with is measured.
        limit, seed: a seeded sample of so many images. step: takes one line of progress.

    Raises:
        CheckpointError: a damaged package or checkpoint. InputError: another checkpoint, or data without what the gates need.
    """
    opened = Package.open(package)
    if opened.kind == "tensorrt":
        raise InputError(
            f"package {opened.path} must be one that runs here, engines have not met a GPU yet; verify an onnx package"
        )
    images = choose_images(data, split=split, questions_per_image=0, seed=seed, fetch_rsvqa=Path).limited(limit, seed)
    _require_labels(opened.precision, images)
    loaded = load_checkpoint(checkpoint)
    if model_digest(loaded.files) != opened.manifest["model"]["sha256"]:
        raise InputError(
            f"--against must be the checkpoint that {opened.path} was made from, {checkpoint} is another; export it again"
        )
    backend = OnnxBackend.load(opened.path)
    eager = EagerBackend(loaded.model, knowledge=backend.knowledge)
    step("comparing graphs")
    paths = [sample.path for sample in images.samples]
    comparison = compare_graphs(opened, eager, backend, paths[:GRAPH_IMAGES], step)
    tokenizer = Tokenizer.from_folder(opened.path)
    reference = _measure(RSVLM(eager, tokenizer), images, step, "checkpoint")
    own = _measure(RSVLM(backend, tokenizer), images, step, "package")
    metrics = {name: (reference.metrics[name], own.metrics[name]) for name in METRICS if name in reference.metrics}
    sample = {"set": images.name, "images": len(images.samples), "split": split, "seed": seed, "digest": images.digest}
    verdict = Verdict(opened.precision, comparison.graphs, _agreement(reference.tokens, own.tokens), metrics, sample)
    return Verdict(**{**vars(verdict), "gates": tuple(gates(verdict))})


def gates(verdict: Verdict) -> list[Gate]:
    """The conditions of a precision."""
    if verdict.precision == "fp32":
        return [
            Gate(f"relative error of {name}", error.relative, FP32_RELATIVE, error.relative <= FP32_RELATIVE)
            for name, error in verdict.graphs.items()
        ]
    if verdict.precision in ("fp16", "bf16"):
        return [
            Gate(f"cosine of {name}", error.cosine, HALF_COSINE, error.cosine >= HALF_COSINE)
            for name, error in verdict.graphs.items()
        ]
    found = []
    for name, (reference, own) in verdict.metrics.items():
        points = (reference - own) * 100
        found.append(Gate(f"loss of {METRICS[name]} in points", points, INTEGER_POINTS, points <= INTEGER_POINTS + 1e-9))
    return found


def certificate(verdict: Verdict, package: Path, *, forced: bool) -> dict[str, Any]:
    """The values of the file."""
    opened = Package.open(package)
    return {
        "format": FORMAT,
        "version": VERSION,
        "passed": verdict.passed,
        "forced": forced,
        "failures": verdict.failures,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "precision": verdict.precision,
        "manifest_sha256": sha256_of(opened.path / MANIFEST),
        "model_sha256": opened.manifest["model"]["sha256"],
        "sample": verdict.sample,
        "graphs": {name: error.to_dict() for name, error in verdict.graphs.items()},
        "greedy": verdict.greedy,
        "metrics": {
            name: {
                "checkpoint": round(reference, 6),
                "package": round(own, 6),
                "loss_points": round((reference - own) * 100, 4),
            }
            for name, (reference, own) in verdict.metrics.items()
        },
        "gates": [
            {"name": gate.name, "value": json_number(gate.value), "limit": gate.limit, "passed": gate.passed}
            for gate in verdict.gates
        ],
        "software": {**opened.manifest.get("software", {}), "rsvlm_infer": __version__},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def write_certificate(verdict: Verdict, package: str | Path, *, force: bool = False) -> Path | None:
    """Writes certificate.json when the gates hold, or by force; else removes an older one and returns None."""
    folder = Path(package)
    file = folder / CERTIFICATE
    if not verdict.passed and not force:
        file.unlink(missing_ok=True)
        return None
    values = certificate(verdict, folder, forced=not verdict.passed)
    write_atomically(file, json.dumps(values, indent=2) + "\n")
    return file


@dataclass(frozen=True)
class _Measured:
    metrics: dict[str, float]
    tokens: dict[str, list[int]]


def _measure(model: RSVLM, images: ImageSet, step: Callable[[str], None], who: str) -> _Measured:
    """Captions, classes and recalls as the bench measures them, as far as model and labels allow."""
    metrics: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    samples = list(images.samples)
    if model.config.language is not None:
        step(f"captions of the {who}")
        answers = model.caption_many([sample.path for sample in samples], max_new_tokens=NEW_TOKENS, strict=True)
        texts = {}
        for sample, answer in zip(samples, answers, strict=True):
            texts[sample.name], tokens[sample.name] = answer.text, [int(token) for token in answer.token_ids]
        if any(sample.captions for sample in samples):
            metrics |= caption_quality(texts, samples)
    if _labelled(samples) and (model.config.alignment is not None or model.config.language is not None):
        step(f"classes of the {who}")
        predicted = classify_samples(model, samples, images.labels, {}, lambda: None)
        metrics |= class_quality(predicted, samples)
    if model.config.alignment is not None:
        step(f"recalls of the {who}")
        metrics |= retrieval_quality(model, samples, {}, lambda: None)
    return _Measured(metrics, tokens)


def _agreement(reference: dict[str, list[int]], own: dict[str, list[int]]) -> dict[str, Any]:
    """How often whole captions are the same, and how far they go together."""
    if not reference:
        return {}
    shares = []
    for name, expected in reference.items():
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, own[name], strict=False)) if a != b), min(len(expected), len(own[name]))
        )
        shares.append(same / max(len(expected), 1))
    equal = sum(own[name] == expected for name, expected in reference.items())
    return {
        "images": len(reference),
        "same_tokens": round(equal / len(reference), 4),
        "token_prefix": round(sum(shares) / len(shares), 4),
    }


def _labelled(samples: Sequence[Sample]) -> bool:
    return any(sample.label is not None for sample in samples)


def _require_labels(precision: str, images: ImageSet) -> None:
    """Integers are judged by what the model says, so there must be a truth to compare with."""
    if precision in ("int8", "int4") and not any(sample.captions or sample.label for sample in images.samples):
        raise InputError(
            f"--data must be labelled for {precision}, whose gates are metrics, {images.name} is not; pass RSICD's folder or class folders"
        )


def report_lines(verdict: Verdict) -> list[str]:
    """What people read: graphs, agreement, metrics, verdict."""
    sample = verdict.sample
    lines = [
        f"precision   {verdict.precision}",
        f"sample      {sample['images']} images of {sample['set']}, seed {sample['seed']}",
        "",
    ]
    lines.append(f"  {'graph':<12} {'max abs':>10} {'relative':>10} {'1 - cosine':>11}  worst case")
    for name, error in verdict.graphs.items():
        row = f"  {name:<12} {error.max_abs:>10.3g} {error.relative:>10.3g} {1 - error.cosine:>11.3g}  {error.worst_case}"
        lines.append(row)
    if verdict.greedy:
        greedy = verdict.greedy
        lines += [
            "",
            f"greedy captions: {greedy['same_tokens']:.1%} the same, {greedy['token_prefix']:.1%} of the tokens before they part",
        ]
    for name, (reference, own) in verdict.metrics.items():
        lines.append(
            f"{METRICS[name]}: checkpoint {reference:.4f}, package {own:.4f}, loss {(reference - own) * 100:.2f} points"
        )
    lines += ["", *(f"{'passed' if gate.passed else 'FAILED'}: {gate.text()}" for gate in verdict.gates)]
    return lines
