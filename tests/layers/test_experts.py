"""Semantic experts: level groups, gates, the base that they add to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rsvlm_infer.config import ExpertsConfig
from rsvlm_infer.layers.experts import Experts

WIDTH = 6


def _module(config: ExpertsConfig, gates: tuple[float, float, float]) -> Experts:
    torch.manual_seed(0)
    module = Experts(config, WIDTH)
    for level, gate in zip(module.levels, gates, strict=True):
        torch.nn.init.constant_(level.gate, gate)
    return module


def _features() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    return torch.randn(7, WIDTH), [torch.randn(7, WIDTH) for _ in range(3)]


@pytest.mark.parametrize("kind", ["glu_silu", "gelu_mlp", "affine"])
def test_closed_gates_give_the_base(kind: str) -> None:
    base, features = _features()
    module = _module(ExpertsConfig(6, 2, 5, kind), (0.0, 0.0, 0.0))  # type: ignore[arg-type]
    assert torch.equal(module(base, features), base)


def test_one_expert_a_level_is_a_plain_mlp_of_that_level() -> None:
    base, features = _features()
    module = _module(ExpertsConfig(3, 1, 5), (0.3, 0.6, 0.9))
    expected = base
    assert module.w_gate is not None
    assert module.w_up is not None
    for number, level in enumerate(module.levels):
        x = level.norm(features[number])
        hidden = F.silu(x @ module.w_gate[number].T) * (x @ module.w_up[number].T)
        expected = expected + torch.tanh(level.gate) * (hidden @ module.w_down[number].T)
    torch.testing.assert_close(module(base, features), expected, atol=1e-5, rtol=1e-5)


def test_a_level_never_reaches_experts_of_another_group() -> None:
    base, features = _features()
    module = _module(ExpertsConfig(6, 1, 5), (0.0, 1.0, 0.0))
    plain = module(base, features)
    assert module.w_down is not None
    with torch.no_grad():
        module.w_down[:2] = 7.0
        module.w_down[4:] *= 100
    assert torch.equal(module(base, features), plain)
    with torch.no_grad():
        module.w_down[2:4] *= 2
    assert not torch.allclose(module(base, features), plain)
