"""The experts' feed-forward against a loop over tokens and slots in float64, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.grouped_experts import grouped_experts as native
from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.route import route
from tests.native import limited_to, needs_native, per_instruction_set, threads
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}

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


def _experts(kind: str, experts: int, width: int, hidden: int, bias: bool = True) -> list[torch.Tensor | None]:
    """w_gate, w_up, w_down, b_up, b_down; the eager op takes biases with any kind of expert."""
    affine = kind == "affine"
    hidden = width if affine else hidden
    return [
        _random(2, experts, hidden, width) if kind == "glu_silu" else None,
        None if affine else _random(3, experts, hidden, width),
        _random(4, experts, width, hidden),
        _random(5, experts, hidden) if bias and not affine else None,
        _random(6, experts, width) if bias else None,
    ]


def _cast(weights: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    return [None if part is None else part.to(dtype) for part in weights]


def _twice_as_wrong(
    isa: str, dtype: torch.dtype, x: torch.Tensor, routed: tuple[torch.Tensor, ...], weights: list[torch.Tensor | None]
) -> None:
    x, weights = x.to(dtype), _cast(weights, dtype)
    with limited_to(isa):
        actual = native(x, *routed, *weights)
    assert actual.dtype is dtype
    expected = grouped_experts(x.double(), *routed, *_cast(weights, torch.float64))
    assert_parity(actual, grouped_experts(x, *routed, *weights), expected, epsilon=EPSILONS[dtype])


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("kind", ["glu_silu", "gelu_mlp", "affine"])
@pytest.mark.parametrize("tokens", AWKWARD_LENGTHS)
def test_native_is_at_most_twice_as_wrong(isa: str, dtype: torch.dtype, kind: str, tokens: int) -> None:
    routed = route(_random(1, 3 * tokens, 12), torch.tensor([0, tokens, 2 * tokens, 3 * tokens]), 2)
    _twice_as_wrong(isa, dtype, _random(0, 3 * tokens, 48), routed, _experts(kind, 12, 48, 80))


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    group=st.integers(1, 4),
    k=st.integers(1, 4),
    width=st.integers(1, 70),
    hidden=st.integers(1, 70),
    kind=st.sampled_from(["glu_silu", "gelu_mlp", "affine"]),
    bias=st.booleans(),
)
def test_native_takes_any_shape(
    isa: str, dtype: torch.dtype, lengths: list[int], group: int, k: int, width: int, hidden: int, kind: str, bias: bool
) -> None:
    lengths = [*lengths, 120]  # enough tokens that eager's error is not that of a few lucky ones, and parts of several tiles
    tokens, experts = sum(lengths), group * len(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    routed = route(_random(1, tokens, experts), offsets, min(k, group))
    _twice_as_wrong(isa, dtype, _random(0, tokens, width), routed, _experts(kind, experts, width, hidden, bias))


@per_instruction_set
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_gives_the_same_bits_always(isa: str, dtype: torch.dtype) -> None:
    tokens, experts, k = 200, 6, 2
    offsets = torch.tensor([0, 150, 150, tokens])
    x, logits = _random(0, tokens, 64).to(dtype), _random(1, tokens, experts)
    weights = _cast(_experts("glu_silu", experts, 64, 300), dtype)
    routed = route(logits, offsets, k)
    with limited_to(isa):
        together = native(x, *routed, *weights)
        for run in range(20):
            with threads(1 + run % 3):
                assert_same_bits(native(x, *routed, *weights), together)
        for token in (0, 77, 199):
            own = torch.tensor([0, *(int(token < stop) for stop in (150, 150, tokens))])
            alone = native(x[token : token + 1], *route(logits[token : token + 1], own, k), *weights)
            assert_same_bits(alone, together[token : token + 1])


@per_instruction_set
def test_native_activations_at_their_ends(isa: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, 0.5, -0.9, 1.3, -1.5, 3.0, -4.0, 6.0, -20.0, 90.0, -90.0, -200.0, 1e38, -1e38])
    values = torch.cat((values, torch.tensor([float("nan"), float("inf")])))[:, None]  # [N, 1]
    routed = route(torch.zeros((len(values), 1)), torch.tensor([0, len(values)]), 1)
    one = torch.ones((1, 1, 1))
    for gate in (one, None):
        if gate is None:
            values[-1] = 1e30  # torch's own gelu(infinity) is NaN in its vectorised loop; here it is infinity
        expected = grouped_experts(values, *routed, gate, one, one)
        with limited_to(isa):
            actual = native(values, *routed, gate, one, one)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@needs_native
def test_native_slots_of_no_expert_are_zero_and_views_are_read_right() -> None:
    x, weights = _random(0, 4, WIDTH), _experts("glu_silu", 2, WIDTH, HIDDEN, bias=False)
    offsets, order = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3, 0, 0, 0], dtype=torch.int32)
    factors = torch.ones((4, 1))
    expected = grouped_experts(x, offsets, order, factors, *weights)
    torch.testing.assert_close(native(x, offsets, order, factors, *weights), expected, atol=1e-6, rtol=1e-6)
    wide = torch.zeros((4, 2 * WIDTH))
    wide[:, ::2] = x
    strided = native(wide[:, ::2], offsets.long(), order.long(), factors, *weights)
    assert_same_bits(strided, native(x, offsets, order, factors, *weights))


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    x, routed = _random(0, TOKENS, WIDTH), route(_random(1, TOKENS, EXPERTS), OFFSETS, K)
    offsets, order, factors = routed
    gate, up, down, *_ = _experts("glu_silu", EXPERTS, WIDTH, HIDDEN)
    for arguments, message in (
        ((x.half(), *routed, None, None, down.half()), "x must be float32 or bfloat16"),
        ((x, *routed, gate, up.bfloat16(), down), "w_up must be float32 or bfloat16 like its neighbours"),
        ((x, *routed, gate, up[:, 1:], down), r"w_up must be \[E, F, D\]"),
        ((x, *routed, None, None, down), r"affine experts must have w_down \[E, D, D\] alone"),
        ((x, offsets[1:], order, factors, gate, up, down), r"expert_offsets must be \[E \+ 1\]"),
        ((x, offsets * 2, order, factors, gate, up, down), "expert_offsets must rise from 0 to at most tokens"),
        ((x, offsets, order + 1, factors, gate, up, down), "permutation must be in 0..33, got 34"),
    ):
        with pytest.raises(InputError, match=message):
            native(*arguments)
    assert resolve("grouped_experts", "native") is native
