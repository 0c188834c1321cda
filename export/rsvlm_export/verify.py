"""The proof of a package: compares it with its checkpoint, holds the numbers to gates and writes the certificate. Knows no rounding.

A certificate says what was compared on which inputs and how it came out. It is written when every gate holds, or by force; a package
that fails gets none, and loses an older one.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsvlm_infer import __version__, hardware
from rsvlm_infer.backends import load_backend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.bench.images import choose_images
from rsvlm_infer.bench.output import write_atomically
from rsvlm_infer.contract import CERTIFICATE, MANIFEST
from rsvlm_infer.errors import InputError
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.checkpoint import sha256_of
from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.package import Package
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.text.tokenizer import Tokenizer

from .compare import GraphError, compare_graphs, json_number
from .measured import Measured, measure, read_measured, write_measured
from .package import model_digest

FORMAT, VERSION = "rsvlm-certificate", 1
FP32_RELATIVE = 1e-4  # of each graph's largest value: ten times what other orders of sums give through thirty layers
HALF_COSINE = 0.999
INTEGER_POINTS = 0.5
METRICS = {"cider": "CIDEr", "class_accuracy": "theme accuracy", "mean_recall": "mean recall"}  # fractions; a point is 0.01
GRAPH_IMAGES = 4  # real images whose graphs are compared; the metrics use the whole sample


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


class Reference:
    """The eager float32 model and a sample. What it says is measured once, for all packages of its checkpoint."""

    def __init__(
        self,
        checkpoint: str | Path,
        data: Path,
        *,
        split: str = "test",
        limit: int = 200,
        seed: int = 0,
        kept: Path | None = None,
    ) -> None:
        """
        Args:
            data: RSICD's folder, a folder of class folders, or plain images; what it is labelled with is measured.
            limit, seed: a seeded sample of so many images.
            kept: a file for what the checkpoint says. It is written after measuring, and read instead of measuring when it is there.

        Raises:
            CheckpointError: a bad checkpoint. InputError: data without images.
        """
        self.images = choose_images(data, split=split, questions_per_image=0, seed=seed, fetch_rsvqa=Path).limited(limit, seed)
        self.sample = {
            "set": self.images.name,
            "images": len(self.images.samples),
            "split": split,
            "seed": seed,
            "digest": self.images.digest,
        }
        self._path = checkpoint
        self._loaded = load_checkpoint(checkpoint)
        folder = self._loaded.knowledge_folder
        self.eager = EagerBackend(self._loaded.model, knowledge=None if folder is None else KnowledgeBase.load(folder))
        self._kept = kept
        self.measured: Measured | None = None

    def require(self, package: Package) -> None:
        """Raises InputError when a package was made from another checkpoint, or the sample cannot judge its precision."""
        if model_digest(self._loaded.files) != package.manifest.get("model", {}).get("sha256"):
            raise InputError(
                f"--against must be the checkpoint that {package.path} was made from, {self._path} is another; export it again"
            )
        if package.precision in ("int8", "int4") and not any(item.captions or item.label for item in self.images.samples):
            raise InputError(
                f"--data must be labelled for {package.precision}, whose gates are metrics, {self.images.name} is not; pass RSICD's "
                "folder or class folders"
            )

    def measure(self, step: Callable[[str], None]) -> Measured:
        """Metrics and tokens of the checkpoint; the first call takes minutes, later ones nothing.

        Raises:
            InputError: the kept file is of another checkpoint or sample.
        """
        if self.measured is None:
            identity = {"model_sha256": model_digest(self._loaded.files), "sample": self.sample}
            self.measured = None if self._kept is None else read_measured(self._kept, identity)
            if self.measured is not None:
                step(f"what the checkpoint says is read from {self._kept}")
                return self.measured
            rsvlm = RSVLM(self.eager, Tokenizer.from_folder(self._loaded.folder))
            self.measured = measure(rsvlm, self.images, step, "checkpoint")
            if self._kept is not None:
                write_measured(self._kept, identity, self.measured)
        return self.measured


def open_package(folder: str | Path) -> Package:
    """A package that can be verified.

    Raises:
        CheckpointError: a damaged one. InputError: one that does not run on any machine that we have met.
    """
    opened = Package.open(folder)
    if opened.kind == "tensorrt":
        raise InputError(
            f"package {opened.path} must be one that runs here, engines have not met a GPU yet; verify an onnx package"
        )
    return opened


def verify_package(package: str | Path, reference: Reference, *, step: Callable[[str], None] = lambda line: None) -> Verdict:
    """Compares a package of any kind with the checkpoint that it was made from.

    Args:
        step: takes one line of progress.

    Raises:
        CheckpointError: a damaged package. InputError: another checkpoint, or data without what the gates need.
    """
    opened = open_package(package)
    reference.require(opened)
    backend = load_backend(opened.path)
    step("comparing graphs")
    paths = [sample.path for sample in reference.images.samples]
    comparison = compare_graphs(opened, reference.eager, backend, paths[:GRAPH_IMAGES], step)  # type: ignore[arg-type]
    expected = reference.measure(step)
    own = measure(RSVLM(backend, Tokenizer.from_folder(opened.path)), reference.images, step, "package")
    metrics = {name: (expected.metrics[name], own.metrics[name]) for name in METRICS if name in expected.metrics}
    greedy = _agreement(expected.tokens, own.tokens)
    verdict = Verdict(opened.precision, comparison.graphs, greedy, metrics, reference.sample)
    return dataclasses.replace(verdict, gates=tuple(gates(verdict)))


def gates(verdict: Verdict) -> list[Gate]:
    """The conditions of a precision."""
    if verdict.precision == "fp32":
        found = [
            Gate(f"relative error of {name}", error.relative, FP32_RELATIVE, error.relative <= FP32_RELATIVE)
            for name, error in verdict.graphs.items()
        ]
        if verdict.greedy:
            differ = verdict.greedy["images"] - verdict.greedy["same"]
            found.append(Gate("number of greedy captions that differ", differ, 0, differ == 0))
        return found
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
    opened, machine = Package.open(package), hardware.probe()
    return {
        "format": FORMAT,
        "version": VERSION,
        "passed": verdict.passed,
        "forced": forced,
        "failures": verdict.failures,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "kind": opened.kind,
        "precision": verdict.precision,
        "finer_layers": {
            layer["name"]: layer["kept"] for layer in opened.manifest.get("layers", ()) if layer["kept"] != layer["asked"]
        },
        **({"calibration": opened.manifest["calibration"]} if "calibration" in opened.manifest else {}),
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
        "machine": f"{platform.system()} {platform.machine()}, {machine.cpu}",
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
        "same": equal,
        "same_tokens": round(equal / len(reference), 4),
        "token_prefix": round(sum(shares) / len(shares), 4),
    }


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
