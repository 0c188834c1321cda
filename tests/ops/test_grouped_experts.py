"""The experts' feed-forward against a loop over tokens and slots in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.route import route

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 17, 12, 20, 6, 2
OFFSETS = torch.tensor([0, 5, 5, 17])  # the second level has no token, so its experts are empty


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy())


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def _loop(x, routed, expert) -> np.ndarray:  # type: ignore[no-untyped-def]
    expert_offsets, permutation, weights = routed
    out = np.zeros((TOKENS, WIDTH))
    for number in range(EXPERTS):
        for place in permutation[expert_offsets[number] : expert_offsets[number + 1]].tolist():
            token, slot = divmod(place, K)
            out[token] += float(weights[token, slot]) * expert(number, x[token].double().numpy())
    return out


@pytest.mark.parametrize("kind", ["glu_silu", "gelu_mlp", "affine"])
def test_equals_a_loop_over_slots(kind: str) -> None:
    x, routed = _random(0, TOKENS, WIDTH), route(_random(1, TOKENS, EXPERTS), OFFSETS, K)
    gate, up, down = _random(2, EXPERTS, HIDDEN, WIDTH), _random(3, EXPERTS, HIDDEN, WIDTH), _random(4, EXPERTS, WIDTH, HIDDEN)
    b_up, b_down, square = _random(5, EXPERTS, HIDDEN), _random(6, EXPERTS, WIDTH), _random(7, EXPERTS, WIDTH, WIDTH)
    double = {name: value.double().numpy() for name, value in (("g", gate), ("u", up), ("d", down), ("s", square))}
    bias_up, bias_down = b_up.double().numpy(), b_down.double().numpy()
    if kind == "glu_silu":
        actual = grouped_experts(x, *routed, gate, up, down)
        expected = _loop(
            x,
            routed,
            lambda e, row: double["d"][e] @ ((lambda g: g / (1 + np.exp(-g)))(double["g"][e] @ row) * (double["u"][e] @ row)),
        )
    elif kind == "gelu_mlp":
        actual = grouped_experts(x, *routed, None, up, down, b_up, b_down)
        expected = _loop(x, routed, lambda e, row: double["d"][e] @ _gelu(double["u"][e] @ row + bias_up[e]) + bias_down[e])
    else:
        actual = grouped_experts(x, *routed, None, None, square, None, b_down)
        expected = _loop(x, routed, lambda e, row: double["s"][e] @ row + bias_down[e])
    np.testing.assert_allclose(actual.numpy(), expected, atol=5e-6)


def test_a_token_is_the_same_alone_and_among_others() -> None:
    x, logits = _random(0, TOKENS, WIDTH), _random(1, TOKENS, EXPERTS)
    weights = (_random(2, EXPERTS, HIDDEN, WIDTH), _random(3, EXPERTS, HIDDEN, WIDTH), _random(4, EXPERTS, WIDTH, HIDDEN))
    together = grouped_experts(x, *route(logits, OFFSETS, K), *weights)
    alone = grouped_experts(x[6:7], *route(logits[6:7], torch.tensor([0, 0, 0, 1]), K), *weights)
    torch.testing.assert_close(together[6:7], alone, atol=1e-6, rtol=1e-6)


def test_no_token() -> None:
    routed = route(torch.zeros((0, EXPERTS)), torch.zeros(4, dtype=torch.int64), K)
    out = grouped_experts(torch.zeros((0, WIDTH)), *routed, None, None, _random(7, EXPERTS, WIDTH, WIDTH))
    assert out.shape == (0, WIDTH)
