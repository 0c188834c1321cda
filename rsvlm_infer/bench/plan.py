"""Which rows a run measures: backends x precisions of the checkpoint, packages, budgets, batches. Knows folders, runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..models.package import Package, is_package
from .measure import Workload
from .schema import BASELINE, SCENARIOS, Row, Scenario


@dataclass(frozen=True)
class ModelChoice:
    """One model at one precision: the checkpoint by a backend, or a package. `label` tells packages apart that are else alike."""

    backend: str
    precision: str
    folder: str
    label: str | None = None
    embedder: str | None = None  # digest of the checkpoint that a package was made from


@dataclass(frozen=True)
class RowPlan:
    """One row to measure; budget and batch are None where the run does not vary them."""

    model: ModelChoice
    scenario: Scenario
    budget: int | None = None
    batch: int | None = None

    def row(self, error: str | None = None) -> Row:
        """The row before it was measured, or in place of it."""
        model = self.model
        return Row(
            model.backend, model.precision, self.scenario, error, package=model.label, budget=self.budget, batch=self.batch
        )

    def workload(self, work: Workload) -> Workload:
        """What this row does of the run's work."""
        return replace(
            work, checkpoint=self.model.folder, offline_batch=self.batch or work.offline_batch, max_visual_tokens=self.budget
        )


def package_choice(folder: Path) -> ModelChoice:
    """What a package folder is, without reading its weights.

    Raises:
        InputError: no package. CheckpointError: a damaged or newer one.
    """
    if not is_package(folder):
        raise InputError(f"--package must name an exported package, got {str(folder)!r}; make one with `rsvlm export`")
    package = Package.open(folder)
    return ModelChoice(package.kind, package.precision, str(folder), embedder=package.embedder)


def choose_models(
    checkpoint: str,
    backends: Sequence[str],
    precisions: Sequence[str],
    packages: Sequence[ModelChoice],
    *,
    baseline: bool = True,
) -> list[ModelChoice]:
    """Every model of a run, each once, the baseline first whether it was asked for or not.

    baseline: False where the checkpoint is itself a package, which the baseline's backend cannot read.
    """
    pairs = [*([BASELINE] if baseline else []), *((backend, precision) for backend in backends for precision in precisions)]
    own = [ModelChoice(backend, precision, checkpoint) for backend, precision in dict.fromkeys(pairs)]
    distinct = list({package.folder: package for package in packages}.values())
    alike = Counter((package.backend, package.precision) for package in distinct)
    named = Counter(Path(package.folder).name for package in distinct)
    for package in distinct:
        path = Path(package.folder)
        label = path.name if named[path.name] == 1 else str(path)
        own.append(replace(package, label=label) if alike[package.backend, package.precision] > 1 else package)
    return own


def plan_rows(
    models: Sequence[ModelChoice], scenarios: Sequence[str], *, budgets: Sequence[int] = (), batches: Sequence[int] = ()
) -> list[RowPlan]:
    """The rows, in the order of a report: by scenario, budget and batch, and the models in turn, so that rows to compare are neighbours.

    budgets: visual tokens, none = the checkpoint's own. batches: of Offline, one or none = the workload's.

    Raises:
        InputError: an unknown scenario.
    """
    unknown = sorted(set(scenarios) - set(SCENARIOS))
    if unknown:
        raise InputError(f"scenario must be one of {list(SCENARIOS)}, got {unknown}; choose one of them")
    several = dict.fromkeys(batches) if len(set(batches)) > 1 else {}
    return [
        RowPlan(model, scenario, budget, batch)
        for scenario in SCENARIOS
        if scenario in scenarios
        for budget in (dict.fromkeys(budgets) or [None])
        for batch in ((several or [None]) if scenario == "Offline" else [None])
        for model in models
    ]
