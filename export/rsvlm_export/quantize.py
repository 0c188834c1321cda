"""Which layer is kept how: rounds every Linear as asked, measures what that does to its outputs, and goes finer where it hurts.

Knows the order of precisions and their limits, no graph and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .calibrate import Seen
from .linears import Linear, ModelWeights
from .onnx.parts import BlockCodes, Precision, RowCodes
from .package import Plan
from .rounding import block_values, relative_error, round_blocks, round_rows, rounded_inputs, row_product

STORED = "float16"  # what is not rounded to integers: tables, experts, small layers
ROUNDED_GROUPS = ("vision", "language")  # everything between them is small and read once per image
# Largest relative error of a layer's outputs on held-out inputs, rounding of inputs included. Plain int4 has 0.10 on Gaussian weights and
# inputs, int8 0.01. A layer beyond its limit has outliers that its codes cannot hold.
LIMITS = {"int4": 0.10, "int8": 0.03, "int8_dynamic": 0.05}
FINER = {"int4": "int8", "int8": STORED, "int8_dynamic": STORED}


@dataclass(frozen=True)
class Choice:
    """One layer's outcome, as the manifest lists it. `errors`: relative output error of each precision that was tried."""

    name: str
    asked: str
    kept: str
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        rounded = {kind: float(f"{error:.3g}") for kind, error in self.errors.items()}
        return {"name": self.name, "asked": self.asked, "kept": self.kept, "errors": rounded}


def wants_hessian(precision: str) -> Callable[[Linear], bool]:
    """Which layers are compensated: those that become int4."""
    return lambda linear: _asked(linear, precision) == "int4"


def quantize(
    weights: ModelWeights,
    seen: Mapping[str, Seen],
    precision: str,
    limits: Mapping[str, float] = LIMITS,
    step: Callable[[Choice], None] = lambda choice: None,
) -> Plan:
    """A plan for `int8` or `int4`.

    int4 rounds the language model's products to 4 bits with compensation and the vision encoder's to int8; int8 rounds both to int8: the
    language model's weights in blocks, the vision encoder's by rows, with its inputs rounded when it runs.
    """
    rounded: dict[str, BlockCodes | RowCodes] = {}
    choices = []
    for linear in weights.linears.values():
        if linear.group not in ROUNDED_GROUPS or linear.name not in seen:
            continue  # what calibration never reached cannot be measured, so it is not rounded
        choice, codes = _choose(linear, seen[linear.name], _asked(linear, precision), limits)
        if codes is not None:
            rounded[linear.name] = codes
        choices.append(choice)
        step(choice)
    return Plan(precision, Precision(STORED, rounded), tuple(choice.to_dict() for choice in choices))


def _asked(linear: Linear, precision: str) -> str:
    if linear.group not in ROUNDED_GROUPS:
        return STORED
    return "int8_dynamic" if linear.group == "vision" else precision


def _choose(linear: Linear, seen: Seen, asked: str, limits: Mapping[str, float]) -> tuple[Choice, BlockCodes | RowCodes | None]:
    """The coarsest precision within its limit, from the asked one on."""
    errors: dict[str, float] = {}
    kind = asked
    while kind in limits:
        codes = _round(linear, seen, kind)
        errors[kind] = _error(linear, seen, codes)
        if errors[kind] <= limits[kind]:
            return Choice(linear.name, asked, kind, errors), codes
        kind = FINER[kind]
    return Choice(linear.name, asked, kind, errors), None


def _round(linear: Linear, seen: Seen, kind: str) -> BlockCodes | RowCodes:
    if kind == "int8_dynamic":
        return round_rows(linear.weight)
    return round_blocks(linear.weight, 4, seen.hessian) if kind == "int4" else round_blocks(linear.weight, 8)


def _error(linear: Linear, seen: Seen, codes: BlockCodes | RowCodes) -> float:
    """The worst of the held-out calls, biases aside; inputs are rounded call by call, as they are when the graph runs."""
    value = None if isinstance(codes, RowCodes) else block_values(codes, linear.weight.shape[1])
    worst = 0.0
    for rows in seen.measured:
        reference: npt.NDArray[np.float32] = rows @ linear.weight.T
        product = row_product(rows, codes) if isinstance(codes, RowCodes) else rounded_inputs(rows) @ _values(value).T
        worst = max(worst, relative_error(product, reference))
    return worst


def _values(value: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    assert value is not None  # only block codes have values without their inputs
    return value
