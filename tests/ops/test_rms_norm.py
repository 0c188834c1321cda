"""RMSNorm against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (7, 64), (2, 3, 65)])
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(1))
    x64 = x.double().numpy()
    expected = weight.double().numpy() * x64 / np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5).numpy(), expected, atol=1e-6, rtol=1e-6)


def test_half_precision_keeps_its_statistics_in_fp32() -> None:
    x = torch.full((1, 256), 300.0, dtype=torch.float16)  # the square overflows fp16
    out = rms_norm(x, torch.ones(256, dtype=torch.float16), 1e-5)
    assert out.dtype == torch.float16
    assert (out == 1).all()


def test_zero_row_stays_zero() -> None:
    assert (rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6) == 0).all()
