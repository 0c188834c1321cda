"""Semantic experts: the formula written out token by token, groups that belong to levels, closed gates."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import ExpertsConfig  # noqa: E402
from rsvlm_infer.layers.experts import Experts  # noqa: E402

WIDTH, HIDDEN, TOKENS = 6, 10, 7


def made(kind: str = "glu_silu", experts: int = 6, top_k: int = 2, gate: float = 0.5) -> tuple[Experts, list[torch.Tensor]]:
    torch.manual_seed(0)
    config = ExpertsConfig(num_experts=experts, top_k=top_k, intermediate_size=HIDDEN, kind=kind)  # type: ignore[arg-type]
    module = Experts(config, WIDTH).eval().requires_grad_(False)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.4)
    for level in module.levels:
        level.gate.fill_(gate)
    return module, [torch.randn(TOKENS, WIDTH) for _ in range(3)]


def feed_forward(module: Experts, kind: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    def matrix(weight: torch.Tensor | None) -> torch.Tensor:
        assert weight is not None
        return weight[expert].double()

    if kind == "glu_silu":
        gate = matrix(module.w_gate) @ x
        return matrix(module.w_down) @ (gate * torch.sigmoid(gate) * (matrix(module.w_up) @ x))
    if kind == "affine":
        return matrix(module.w_down) @ x + matrix(module.b_down)
    hidden = matrix(module.w_up) @ x + matrix(module.b_up)
    return matrix(module.w_down) @ (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) + matrix(module.b_down)


def expected(module: Experts, kind: str, base: torch.Tensor, features: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Y token by token in float64."""
    group = module.config.num_experts // 3
    out = base.double().clone()
    for level in range(3):
        block = module.levels[level]
        for token in range(len(base)):
            x = features[level][token].double()
            x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * block.norm.weight.double() + block.norm.bias.double()
            logits = block.router.weight.double() @ x
            chosen = sorted(range(group), key=lambda expert: (-float(logits[expert]), expert))[:top_k]
            weights = logits[chosen].softmax(0)
            for weight, expert in zip(weights, chosen, strict=True):
                out[token] += math.tanh(float(block.gate)) * weight * feed_forward(module, kind, level * group + expert, x)
    return out.float()


@pytest.mark.parametrize("kind", ["glu_silu", "gelu_mlp", "affine"])
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (6, 1), (6, 2), (12, 3)])
def test_formula_token_by_token(kind: str, experts: int, top_k: int) -> None:
    module, features = made(kind, experts, top_k)
    wanted = expected(module, kind, features[2], features, top_k)
    torch.testing.assert_close(module(features[2], features), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["glu_silu", "gelu_mlp", "affine"])
def test_groups_of_one_are_not_routed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as with routing, and neither the router's op nor its weights are touched."""
    module, features = made(kind, 3, 1)
    stacked = torch.cat([level.norm(x) for level, x in zip(module.levels, features, strict=True)])
    routed = module.route(torch.zeros(3 * TOKENS, 3), torch.arange(4) * TOKENS, 1)
    mixed = module.grouped_experts(stacked, *routed, module.w_gate, module.w_up, module.w_down, module.b_up, module.b_down)
    wanted = features[2]
    for level, part in zip(module.levels, mixed.view(3, TOKENS, WIDTH), strict=True):
        wanted = wanted + torch.tanh(level.gate) * part

    def never(*arguments: object) -> None:
        raise AssertionError("nothing may be routed in groups of one")

    monkeypatch.setattr(module, "route", never)
    monkeypatch.setattr(module, "grouped_experts", never)
    for level in module.levels:
        level.router.weight.fill_(torch.nan)
    torch.testing.assert_close(module(features[2], features), wanted, atol=1e-6, rtol=1e-6)


def test_closed_gates_change_nothing() -> None:
    module, features = made(gate=0.0)
    assert torch.equal(module(features[2], features), features[2])
    fresh = Experts(ExpertsConfig(num_experts=6, top_k=2, intermediate_size=HIDDEN), WIDTH)
    assert [level.gate.item() for level in fresh.levels] == [0, 0, 0]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_uses_only_its_own_group(level: int) -> None:
    """Spoiling the experts of one group changes the output only while that level's gate is open."""
    module, features = made()
    for index, block in enumerate(module.levels):
        block.gate.fill_(0.5 if index == level else 0.0)
    before = module(features[2], features)
    for other in range(6):
        copy = module.w_down[other].clone()
        module.w_down[other] += 3.0
        changed = not torch.equal(module(features[2], features), before)
        assert changed == (other // 2 == level)
        module.w_down[other] = copy


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    module, features = made()
    whole = module(features[2], features)
    for token in range(TOKENS):
        row = slice(token, token + 1)
        torch.testing.assert_close(module(features[2][row], [part[row] for part in features]), whole[row], atol=1e-6, rtol=1e-6)


def test_kinds_own_only_their_weights() -> None:
    shared = {"w_down"} | {
        f"levels.{level}.{name}" for level in range(3) for name in ("norm.weight", "norm.bias", "router.weight", "gate")
    }
    assert set(made("glu_silu")[0].state_dict()) == shared | {"w_gate", "w_up"}
    assert set(made("gelu_mlp")[0].state_dict()) == shared | {"w_up", "b_up", "b_down"}
    assert set(made("affine")[0].state_dict()) == shared | {"b_down"}


def test_no_token() -> None:
    module, _ = made()
    empty = torch.zeros(0, WIDTH)
    assert module(empty, [empty] * 3).shape == (0, WIDTH)
