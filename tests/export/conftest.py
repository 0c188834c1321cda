"""Each tiny checkpoint is exported once per run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.export.packages import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """By name of `CONFIGS`, or "speaking", and precision; skips without torch, onnx or onnxruntime."""
    from tests.export.packages import CONFIGS, SPEAKING, make_pair

    made: dict[tuple[str, str], Pair] = {}

    def get(name: str, precision: str = "fp32") -> Pair:
        if (name, precision) not in made:
            made[name, precision] = make_pair(
                tmp_path_factory.mktemp(f"{name}-{precision}"), (CONFIGS | {"speaking": SPEAKING})[name], precision
            )
        return made[name, precision]

    return get
