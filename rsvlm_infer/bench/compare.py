"""Two bench results side by side, and rules that say when the newer one is too bad. Knows no model and no clock.

Grammar of a rule: METRIC OP LIMIT, OP one of > >= < <=, LIMIT one of
    +10% or -10%   relative change to the older result:   p95>+10%   images_per_s<-5%
    +12 or -0.02   absolute change to the older result:   ttft_ms_p50>+12   class_accuracy<-0.02
    2e9            the newer value itself:                peak_rss_bytes>2e9
A rule that is true is violated.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from .schema import SCHEMA, Report, Row

_RULE = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?)\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(%?)\s*")
_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}

# What must be equal for two results to say something about the code: the machine and the work.
MACHINE_KEYS = ("cpu", "cores", "gpus")
WORK_KEYS = (
    "image_set", "images", "labels", "captions", "questions", "images_digest",
    "max_new_tokens", "repeats", "threads", "offline_batch", "tiling",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One parsed `--fail-if`."""

    text: str
    metric: str
    op: str
    kind: Literal["percent", "change", "value"]
    limit: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Raises InputError when the text is no rule."""
        match = _RULE.fullmatch(text)
        if match is None:
            raise InputError(
                f'a --fail-if rule must read METRIC OP LIMIT, as in "p95>+10%" or "peak_rss_bytes>2e9", got {text!r}; correct it'
            )
        metric, op, sign, number, percent = match.groups()
        if percent and not sign:
            raise InputError(
                f"a percentage in --fail-if is a change and needs a sign, got {text!r}; write +{number}% or -{number}%"
            )
        limit = float(sign + number)
        return cls(text.strip(), metric, op, "percent" if percent else "change" if sign else "value", limit)

    def violation(self, new: Row, old: Row) -> str | None:
        """One line when the rule is true for this pair of rows; None when it holds, or when the older row has no such metric.

        A metric that got lost, or is not a number any more, breaks the rule: a gate must not open because nothing was measured.
        """
        after, before = new.metrics().get(self.metric), old.metrics().get(self.metric)
        if before is None:
            return None
        if after is None or math.isnan(after):
            return f"{new.title}: {self.metric} was {before:.6g}, is not measured any more; violates {self.text}"
        measured = {"percent": percent_change(after, before), "change": after - before, "value": after}[self.kind]
        if not _OPERATORS[self.op](measured, self.limit):
            return None
        change = f"{percent_change(after, before):+.1f}%"
        return f"{new.title}: {self.metric} was {before:.6g}, is {after:.6g} ({change}); violates {self.text}"


@dataclass(frozen=True)
class Comparison:
    """What came of it: pairs of rows (newer, older), broken rules, and why the results may not fit each other."""

    pairs: tuple[tuple[Row, Row], ...]
    violations: tuple[str, ...]
    differences: tuple[str, ...]


def percent_change(after: float, before: float) -> float:
    """Signed change in percent; infinite from zero to something else."""
    if before == 0:
        return 0.0 if after == 0 else math.copysign(math.inf, after)
    return (after - before) / abs(before) * 100


def setting_differences(new: Report, old: Report) -> list[str]:
    """Why the two results should not be compared, whatever their rows: other schema, machine or workload."""
    found = []
    if new.schema != old.schema or new.schema != SCHEMA:
        found.append(f"schema is {new.schema}, was {old.schema}")
    sections: tuple[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]], ...] = (
        ("machine", new.environment.get("machine", {}), old.environment.get("machine", {}), MACHINE_KEYS),
        ("workload", new.workload, old.workload, WORK_KEYS),
    )
    for section, after, before, keys in sections:
        found += [
            f"{section} {key} is {after.get(key)!r}, was {before.get(key)!r}"
            for key in keys
            if after.get(key) != before.get(key)
        ]
    return found


def differences(new: Report, old: Report) -> list[str]:
    """Why the two results should not be compared; empty when they fit."""
    found = setting_differences(new, old)
    new_rows, old_rows = ({row.key for row in report.rows if row.ok} for report in (new, old))
    found += [f"row {' '.join(key)} is only in the newer result" for key in sorted(new_rows - old_rows)]
    found += [f"row {' '.join(key)} is only in the older result" for key in sorted(old_rows - new_rows)]
    return found


def refuse(found: list[str], *, force: bool) -> None:
    """Raises InputError when there are differences and `force` is off."""
    if found and not force:
        raise InputError(f"the results do not compare: {'; '.join(found)}; measure both alike, or pass --force")


def compare(new: Report, old: Report, rules: list[Rule], *, force: bool = False) -> Comparison:
    """Pairs the rows that ran in both and applies the rules to each pair.

    Raises:
        InputError: the results do not fit each other and `force` is off, no row is in both, or a rule's metric is in no row.
    """
    found = differences(new, old)
    refuse(found, force=force)
    older = {row.key: row for row in old.rows if row.ok}
    pairs = tuple((row, older[row.key]) for row in new.rows if row.ok and row.key in older)
    if not pairs:
        raise InputError("the results have no backend, precision and scenario in common; measure both alike")
    known = {name for _, before in pairs for name in before.metrics()}
    for rule in rules:
        if rule.metric not in known:
            raise InputError(
                f"metric of {rule.text!r} must be in the older result, got {rule.metric!r}; known are {sorted(known)}"
            )
    lines = [rule.violation(after, before) for rule in rules for after, before in pairs]
    return Comparison(pairs, tuple(line for line in lines if line is not None), tuple(found))
