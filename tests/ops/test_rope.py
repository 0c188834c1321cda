"""RoPE against complex rotation in float64, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.rope import rope as native
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.rope import rope
from tests.native import needs_native, threads
from tests.parity import assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80])
def test_equals_complex_rotation(head_dim: int) -> None:
    x = torch.randn((2, 5, 3, head_dim), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 100, 3, 0, 511]])
    half = head_dim // 2
    as_complex = x[..., :half].double().numpy() + 1j * x[..., half:].double().numpy()
    angles = positions.numpy()[..., None, None] * 10000.0 ** (-np.arange(half) * 2 / head_dim)
    rotated = as_complex * np.exp(1j * angles)
    expected = np.concatenate((rotated.real, rotated.imag), axis=-1)
    np.testing.assert_allclose(rope(x, positions, 10000.0).numpy(), expected, atol=2e-4)  # fp32 angles up to 511 rad


def test_position_zero_changes_nothing_and_length_is_kept() -> None:
    x = torch.randn((1, 4, 2, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(rope(x, torch.zeros((1, 4), dtype=torch.long), 1e4), x)
    turned = rope(x, torch.tensor([[3, 9, 27, 81]]), 1e4)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_products_depend_on_distance_only() -> None:
    q, k = (torch.randn((1, 1, 1, 32), generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))

    def product(at: int, to: int) -> float:
        return float((rope(q, torch.tensor([[at]]), 1e4) * rope(k, torch.tensor([[to]]), 1e4)).sum())

    assert product(12, 5) == pytest.approx(product(107, 100), abs=1e-4)


@needs_native
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("head_dim", [2, 26, 64, 72, 80, 128])
def test_native_is_at_most_twice_as_wrong(dtype: torch.dtype, head_dim: int) -> None:
    x = torch.randn((2, 65, 3, head_dim), generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(130).view(2, 65) * 7
    actual = native(x, positions, 1e4)
    assert actual.dtype is dtype
    # the float64 result has eager's float32 angles too: they are part of the definition
    assert_parity(actual, rope(x, positions, 1e4), rope(x.double(), positions, 1e4), epsilon=EPSILONS[dtype])


@needs_native
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_gives_the_same_bits_always(dtype: torch.dtype) -> None:
    x = torch.randn((700, 9, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = torch.arange(700)
    together = native(x, positions, 1e5)
    for run in range(20):
        with threads(1 + run % 3):
            assert_same_bits(native(x, positions, 1e5), together)
    assert_same_bits(native(x[5:6], positions[5:6], 1e5), together[5:6])
    assert_same_bits(native(x.transpose(0, 1).contiguous().transpose(0, 1), positions, 1e5), together)
    assert native(x[:0], positions[:0], 1e5).shape == (0, 9, 64)


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    for x, positions in ((torch.zeros(4, 2, 7), torch.arange(4)), (torch.zeros(4, 2, 8), torch.arange(3))):
        with pytest.raises(InputError, match=r"x must be \[..., N, H, D\] with even D and positions \[..., N\]"):
            native(x, positions, 1e4)
    assert resolve("rope", "native") is native
