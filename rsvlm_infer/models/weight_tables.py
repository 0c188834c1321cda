"""Foreign weight names to ours: one table of rules per layout part, and the generic loop over them. Knows no file and no config.

A rule's pattern is a regular expression on the whole source name. Optional groups cover layouts that differ only in a prefix,
for example Hugging Face's `vision_tower.vision_model.` (up to 4.51), `model.vision_tower.vision_model.` (from 4.52) and
`vision_tower.` (5.x).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

How = Literal["copy", "reshape", "transpose", "split3"]


@dataclass(frozen=True)
class Rule:
    """Names that match `pattern` become `targets` (templates with \\1, \\2, ...); no targets = known and not needed.

    `how`: copy · reshape to the target's shape (same element count) · transpose a matrix · split3 = cut the first axis in three
    equal parts, one per target (fused q, k, v).
    """

    pattern: str
    targets: tuple[str, ...] = ()
    how: How = "copy"


class Assignment(NamedTuple):
    """One source tensor and what becomes of it."""

    source: str
    targets: tuple[str, ...]
    how: How


def assign(names: Iterable[str], rules: Sequence[Rule]) -> tuple[list[Assignment], list[str]]:
    """Applies the first matching rule to each name.

    Returns:
        The assignments in the order of `names`, and the names that no rule knows.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    assignments: list[Assignment] = []
    unknown: list[str] = []
    for name in names:
        for pattern, rule in compiled:
            match = pattern.fullmatch(name)
            if match is not None:
                targets = tuple(match.expand(target) for target in rule.targets)
                assignments.append(Assignment(name, targets, rule.how))
                break
        else:
            unknown.append(name)
    return assignments, unknown


# Our own names. Blocks after the last tap and a final norm may be in a converted encoder; the loader skips the former by number.
RSVLM: tuple[Rule, ...] = (
    Rule(r"vision_encoder\.(?:final_norm|post_norm)\..*"),
    Rule(r"(.*)", (r"\1",)),
)
