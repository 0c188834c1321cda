"""How tests hold native kernels to one instruction set and to a number of threads. Knows no op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rsvlm_infer.hardware import native_why_not

needs_native = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))


def _available() -> list[str]:
    """The instruction sets of this machine, the plainest first; qemu or an old CPU has fewer."""
    if native_why_not() is not None:
        return ["auto"]
    from rsvlm_infer import _C

    found = []
    for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
        try:
            _C.limit_isa(isa=isa)
        except ValueError:
            continue
        found.append(isa)
    _C.limit_isa(isa="auto")
    return found


INSTRUCTION_SETS = _available()
per_instruction_set = pytest.mark.parametrize("isa", [pytest.param(isa, marks=needs_native) for isa in INSTRUCTION_SETS])


@contextmanager
def limited_to(isa: str) -> Iterator[None]:
    """Kernels run with `isa` inside the block."""
    from rsvlm_infer import _C

    _C.limit_isa(isa=isa)
    try:
        yield
    finally:
        _C.limit_isa(isa="auto")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch and the kernels, which share one OpenMP runtime, use `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
