"""The shape of a bench result: dataclasses, their JSON and their flat metrics. Knows no model, no clock, no layout of a report.

The schema's version goes up when a field changes its meaning or goes away; a new optional field does not need it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError

Scenario = Literal["SingleStream", "Offline"]

SCHEMA = "rsvlm-bench/1"
STAGES = ("read_ms", "plan_ms", "preprocess_ms", "encode_ms", "augment_ms", "prefill_ms", "decode_ms")
TOKEN_TIMES = ("ttft_ms", "tpot_ms")
SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "Offline")
BASELINE = ("eager", "float32")


@dataclass(frozen=True)
class Summary:
    """A sample in numbers. Percentiles interpolate linearly; `std` is the sample's (n - 1), 0 for a single value."""

    count: int
    mean: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summary of at least one value."""
        sample = np.asarray(values, dtype=np.float64)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(sample, (50, 90, 95, 99)))
        std = float(sample.std(ddof=1)) if sample.size > 1 else 0.0
        return cls(sample.size, float(sample.mean()), std, p50, p90, p95, p99)


@dataclass(frozen=True)
class Agreement:
    """How far greedy tokens and the first logits are from those of eager float32 on the same images.

    same_tokens: share of images with identical tokens · token_prefix: mean share of the reference's tokens before the first
    difference · logits_max_abs: greatest absolute difference · logits_cosine: lowest cosine of an image.
    """

    images: int
    same_tokens: float
    token_prefix: float
    logits_max_abs: float | None
    logits_cosine: float | None


@dataclass(frozen=True)
class Row:
    """One backend at one precision in one scenario, measured in a process of its own.

    `latency_ms` has one value per image and repeat; it is None in Offline, where only the whole has a time.
    In Offline, `prefill_ms`, `decode_ms` and `ttft_ms` of an image are those of its batch.
    peak_rss_bytes: of the process until the last measured image · load_ms: `RSVLM.from_pretrained`, imports included.
    With several repeats each one is a process of its own: the peak is the largest, the load the median.
    package: name of the package that ran, where backend and precision do not tell it from another one · budget: visual tokens that
    the plan may take, batch: images of an Offline batch, both None unless the run varies them · energy_j: joules per image.
    tokens_per_step, draft_acceptance: of backends that check guessed tokens; see `engine.drafts.DraftCounts`.
    """

    backend: str
    precision: str
    scenario: str
    error: str | None = None
    images: int = 0
    repeats: int = 0
    latency_ms: Summary | None = None
    samples_ms: tuple[float, ...] = ()
    stages: dict[str, Summary] = field(default_factory=dict)
    token_times: dict[str, Summary] = field(default_factory=dict)
    images_per_s: float | None = None
    mpix_per_s: float | None = None
    tokens_per_s: float | None = None
    visual_tokens: float | None = None
    generated_tokens: float | None = None
    peak_rss_bytes: int | None = None
    load_ms: float | None = None
    disk_bytes: int | None = None
    quality: dict[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None
    answers: dict[str, str] = field(default_factory=dict)
    package: str | None = None
    budget: int | None = None
    batch: int | None = None
    energy_j: float | None = None
    energy_why_not: str | None = None
    tokens_per_step: float | None = None
    draft_acceptance: float | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def name(self) -> str:
        """What ran, without the scenario."""
        return " ".join((self.backend, self.precision, *self.key[3:]))

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a row from the others of its run: backend, precision, scenario, and the axes that the run varies."""
        budget = () if self.budget is None else (f"budget {self.budget}",)
        batch = () if self.batch is None else (f"batch {self.batch}",)
        return (self.backend, self.precision, self.scenario, *([self.package] if self.package else []), *budget, *batch)

    @property
    def title(self) -> str:
        return " ".join(self.key)

    def is_baseline_of(self, other: Row) -> bool:
        """Whether this is eager float32 on the checkpoint at the same work as `other`."""
        same = (self.scenario, self.budget, self.batch) == (other.scenario, other.budget, other.batch)
        return same and (self.backend, self.precision) == BASELINE and self.package is None

    def metrics(self) -> dict[str, float]:
        """Every number of the row by a flat name: `p95`, `ttft_ms_p50`, `encode_ms_mean`, `images_per_s`, `cider`, ..."""
        values: dict[str, float | None] = {}
        for name, summary in (("latency_ms", self.latency_ms), *self.stages.items(), *self.token_times.items()):
            if summary is not None:
                for statistic in ("mean", "std", "p50", "p90", "p95", "p99"):
                    values[f"{name}_{statistic}"] = getattr(summary, statistic)
                    if name == "latency_ms":
                        values[statistic] = getattr(summary, statistic)
        for name in ("images_per_s", "mpix_per_s", "tokens_per_s", "visual_tokens", "generated_tokens", "peak_rss_bytes"):
            values[name] = getattr(self, name)
        for name in ("load_ms", "disk_bytes", "energy_j", "tokens_per_step", "draft_acceptance"):
            values[name] = getattr(self, name)
        values |= self.quality
        if self.agreement is not None:
            values |= {name: value for name, value in dataclasses.asdict(self.agreement).items() if name != "images"}
        return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Report:
    """One run of the bench. `environment` says where, `workload` says on what; two reports compare when both fit."""

    environment: dict[str, Any]
    workload: dict[str, Any]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    schema: str = SCHEMA

    def baseline(self, row: Row) -> Row | None:
        """Eager float32 at the same work as this row, if it ran."""
        return next((each for each in self.rows if each.is_baseline_of(row) and each.ok), None)

    def ratios(self, row: Row) -> dict[str, float]:
        """This row against eager float32 of the same run; above 1 is better: faster or smaller."""
        baseline = self.baseline(row)
        if baseline is None or not row.ok:
            return {}
        new, old = row.metrics(), baseline.metrics()
        lower_is_better = ("p50", "p95", "ttft_ms_p50", "tpot_ms_p50", "peak_rss_bytes", "load_ms")
        ratios = {name: old[name] / new[name] for name in lower_is_better if new.get(name) and name in old}
        higher_is_better = ("images_per_s", "mpix_per_s")
        return ratios | {name: new[name] / old[name] for name in higher_is_better if name in new and old.get(name)}

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the ratios written out."""
        values = {"schema": self.schema, **dataclasses.asdict(self)}
        for entry, row in zip(values["rows"], self.rows, strict=True):
            entry["to_baseline"] = self.ratios(row)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report behind JSON values; keys that this version does not know are left out.

        Raises:
            InputError: a key that this version needs is missing.
        """
        try:
            rows = tuple(row_from_dict(entry) for entry in values["rows"])
            return cls(values["environment"], values["workload"], rows, tuple(values["warnings"]), values["schema"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a bench result must follow {SCHEMA}, got {error!r}; measure again with this version") from None


def read_report(path: Path) -> Report:
    """The report in a JSON file.

    Raises:
        InputError: no such file, no JSON, or no bench result.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"bench result {path} cannot be read ({error.strerror}); pass a bench.json") from None
    except ValueError as error:
        raise InputError(f"bench result {path} is not JSON ({error}); pass a bench.json") from None
    if not isinstance(values, dict) or not str(values.get("schema")).startswith("rsvlm-bench/"):
        raise InputError(
            f'bench result {path} must have a "schema" that begins with rsvlm-bench/, it has none; pass a bench.json'
        )
    return Report.from_dict(values)


def row_from_dict(entry: dict[str, Any]) -> Row:
    """The row behind JSON values."""
    known = {item.name for item in dataclasses.fields(Row)}
    values = {name: value for name, value in entry.items() if name in known}
    values["latency_ms"] = None if values["latency_ms"] is None else _known(Summary, values["latency_ms"])
    values["samples_ms"] = tuple(values["samples_ms"])
    for name in ("stages", "token_times"):
        values[name] = {key: _known(Summary, summary) for key, summary in values[name].items()}
    values["agreement"] = None if values["agreement"] is None else _known(Agreement, values["agreement"])
    return Row(**values)


def _known(cls: type[Any], entry: dict[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in entry.items() if name in names})
