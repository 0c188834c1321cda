"""One recorded case as csrc/checks reads it: inputs, what the definition gives for them, how far a twin may be off. Knows no op."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parity import allowed_error, to_float64

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


class Case:
    """One case, written part by part; csrc/checks/case_file.h reads it."""

    def __init__(self, op: str, label: str, refusal: str = "") -> None:
        self.refused = bool(refusal)
        self._parts = [f"case {op} {label}\n".encode()]
        self._expected: list[tuple[str, str, NDArray[np.float64], float]] = []
        if refusal:
            self._parts.append(f"refusal {refusal}\n".encode())

    def number(self, **numbers: float) -> Case:
        self._parts += [f"number {name} {value:.17g}\n".encode() for name, value in numbers.items()]
        return self

    def word(self, **words: str) -> Case:
        self._parts += [f"word {name} {value}\n".encode() for name, value in words.items()]
        return self

    def array(self, **arrays: Any) -> Case:
        """Tensors and arrays, made contiguous; None is left out."""
        for name, value in arrays.items():
            if value is not None:
                kind, flat = _typed(value)
                self._parts += [f"array {name} {kind} {flat.size}\n".encode(), flat.tobytes()]
        return self

    def view(self, name: str, tensor: Tensor, *strides: str) -> Case:
        """The memory from a view's first element to its last, gaps included, and its strides."""
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.array(**{name: tensor.as_strided((span,), (1,))})
        return self.number(**{f"{name}.{stride}": tensor.stride(place) for place, stride in enumerate(strides)})

    def expect(self, name: str, kind: str, values: Any, allowed: float = 0.0) -> Case:
        self._expected.append((name, kind, to_float64(values).ravel(), allowed))
        return self

    def parity(self, name: str, eager: Tensor, reference: Any) -> Case:
        """Expects `reference` by the two-times rule of tests/parity.py; where it is not finite, the same NaN or infinity."""
        expected, ours = to_float64(reference), to_float64(eager)
        finite = np.isfinite(expected)
        allowed = allowed_error(ours[finite], expected[finite], epsilon=EPSILONS[eager.dtype])
        return self.expect(name, kind_of(eager.dtype), expected, allowed)

    def can_be_wrong(self) -> bool:
        """There is a number that another number could be compared with."""
        return not self.refused and bool(np.isfinite(self._expected[0][2][-1:]).any())

    def write(self, file: BinaryIO, wrong: bool = False) -> None:
        """`wrong`: the last number expected of the first output is off by twice what is allowed."""
        file.write(b"".join(self._parts))
        for place, (name, kind, values, allowed) in enumerate(self._expected):
            if wrong and place == 0:
                values = values.copy()
                values[-1] += 2 * allowed or 1
            file.write(f"expect {name} {kind} {values.size} {allowed:.17g}\n".encode() + values.tobytes())
        file.write(b"end\n")


def kind_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _typed(value: Any) -> tuple[str, NDArray[Any]]:
    if isinstance(value, Tensor):
        value = value.detach().contiguous()
        if value.dtype is torch.bfloat16:
            return "bfloat16", value.view(torch.int16).numpy().ravel()
        value = value.numpy()
    flat = np.ascontiguousarray(value).ravel()
    return flat.dtype.name, flat
