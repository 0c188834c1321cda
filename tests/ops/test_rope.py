"""RoPE against complex rotation in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.ops.rope import rope


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
