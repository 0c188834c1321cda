"""The registry: names, preference, and no silent fallback."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace

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


@pytest.fixture
def fresh() -> Iterator[None]:
    """Choices that a test makes with stand-ins are forgotten after it."""
    registry.resolve.cache_clear()
    registry.choose.cache_clear()
    yield
    registry.resolve.cache_clear()
    registry.choose.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_auto_falls_back_with_a_reason_and_a_named_one_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_module", lambda op, name: _twin(name, able=("eager",)))
    with caplog.at_level(logging.INFO):
        assert registry.resolve("pack_tiles")(None) == "eager"
        assert registry.resolve("pack_tiles")(None) == "eager"
    assert caplog.text.count("pack_tiles: native cannot run here (not built), using eager") == 1
    with pytest.raises(BackendError, match="implementation 'native' of pack_tiles cannot run here: not built; use 'eager'"):
        registry.resolve("pack_tiles", "native")


def test_every_implementation_says_whom_it_serves() -> None:
    assert {name for names in registry.OPS.values() for name in names} == set(registry.SERVES)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("able", "on_cpu", "on_cuda", "on_mps"),
    [
        (("triton", "native"), "native", "triton", "eager"),  # a CUDA machine: what lies on its CPU stays with native
        (("native",), "native", "eager", "eager"),
        (("triton",), "eager", "triton", "eager"),
        ((), "eager", "eager", "eager"),
    ],
)
def test_auto_follows_the_tensor_not_the_machine(
    monkeypatch: pytest.MonkeyPatch, able: tuple[str, ...], on_cpu: str, on_cuda: str, on_mps: str
) -> None:
    monkeypatch.setattr(registry, "_module", lambda op, name: _twin(name, able=(*able, "eager")))
    op = registry.resolve("rms_norm")  # one function for a model that moves
    for device, expected in (("cpu", on_cpu), ("cuda", on_cuda), ("mps", on_mps), ("cpu", on_cpu)):
        assert op(SimpleNamespace(device=SimpleNamespace(type=device)), None, 1e-5) == expected
        assert registry.choose("rms_norm", device)(None) == expected


@pytest.mark.usefixtures("fresh")
def test_auto_logs_only_reasons_of_the_device_at_hand(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_module", lambda op, name: _twin(name, able=("native", "eager")))
    with caplog.at_level(logging.INFO):
        registry.choose("rope", "cpu")
        assert caplog.text == ""
        registry.choose("rope", "cuda")
        registry.choose("rope", "cuda")
    assert caplog.text.count("rope: triton cannot run here (not built), using eager") == 1


def test_auto_on_real_tensors_is_what_it_chose() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, weight = torch.ones(2, 4), torch.ones(4)
    expected = registry.choose("rms_norm", "cpu")(x, weight, 1e-5)
    assert torch.equal(registry.resolve("rms_norm")(x, weight, 1e-5), expected)
    # no implementation serves it, and eager takes every device
    assert registry.resolve("rms_norm")(x.to("meta"), weight.to("meta"), eps=1e-5).device.type == "meta"
    for op in registry.OPS:
        if "triton" in registry.OPS[op]:
            assert registry.choose(op, "cpu").__module__ != f"rsvlm_infer.kernels.triton.{op}"


def _twin(name: str, able: tuple[str, ...]) -> SimpleNamespace:
    """Stands for a module of the implementation `name`: its ops return that name."""

    def op(*arguments: object) -> str:
        return name

    return SimpleNamespace(why_not=lambda: None if name in able else "not built", pack_tiles=op, rms_norm=op, rope=op)
