"""The registry: names, preference, and no silent fallback."""

from __future__ import annotations

import importlib
import logging

import pytest

from rsvlm_infer.errors import BackendError
from rsvlm_infer.ops import registry


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_every_op_has_an_eager_definition_of_its_name(op: str) -> None:
    assert registry.why_not(op, "eager") is None
    assert registry.resolve(op, "eager") is getattr(importlib.import_module(f"rsvlm_infer.ops.{op}"), op)


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(BackendError, match=r"op must be one of .*'route'.* got 'rout'"):
        registry.resolve("rout")
    with pytest.raises(BackendError, match=r"implementation of rope must be one of \['eager'.*\], got 'metal'"):
        registry.resolve("rope", "metal")


def test_auto_falls_back_with_a_reason_and_a_named_one_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_module", lambda op, name: _Absent if name == "native" else _Eager)
    registry.resolve.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert registry.resolve("pack_tiles") is _Eager.pack_tiles
        assert "pack_tiles: native cannot run here (not built), using eager" in caplog.text
        with pytest.raises(BackendError, match="implementation 'native' of pack_tiles cannot run here: not built; use 'eager'"):
            registry.resolve("pack_tiles", "native")
    finally:
        registry.resolve.cache_clear()


class _Absent:
    @staticmethod
    def why_not() -> str:
        return "not built"


class _Eager:
    @staticmethod
    def pack_tiles() -> None:
        """Stands for the eager definition."""
