"""RMSNorm against float64 numpy, the native twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.native.rms_norm import rms_norm as native
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.rms_norm import rms_norm
from tests.native import needs_native, threads
from tests.parity import AWKWARD_LENGTHS, assert_parity, assert_same_bits

EPSILONS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


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


@needs_native
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("width", [*AWKWARD_LENGTHS, 576])
def test_native_is_at_most_twice_as_wrong(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn((3, 41, width), generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = native(x, weight, 1e-5)
    assert actual.dtype is dtype
    x64 = x.double()
    expected = weight.double() * x64 / (x64.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert_parity(actual, rms_norm(x, weight, 1e-5), expected, epsilon=EPSILONS[dtype])


@needs_native
@pytest.mark.parametrize("dtype", EPSILONS)
def test_native_gives_the_same_bits_always(dtype: torch.dtype) -> None:
    x = torch.randn((500, 577), generator=torch.Generator().manual_seed(2)).to(dtype)
    weight = torch.ones(577, dtype=dtype)
    x[3, 5], x[4, 6], x[5] = torch.nan, torch.inf, 0
    together = native(x, weight, 1e-6)
    assert torch.equal(together.isnan(), rms_norm(x, weight, 1e-6).isnan())
    for run in range(20):
        with threads(1 + run % 3):
            assert_same_bits(native(x, weight, 1e-6), together)
    assert_same_bits(native(x[77:78], weight, 1e-6), together[77:78])
    assert_same_bits(native(x.T.contiguous().T, weight, 1e-6), together)
    assert native(x[:0], weight, 1e-6).shape == (0, 577)


@needs_native
def test_native_says_what_it_cannot_take() -> None:
    with pytest.raises(InputError, match=r"weight must be \[D\] = \[4\], got \[3\]"):
        native(torch.zeros(2, 4), torch.zeros(3), 1e-6)
    with pytest.raises(InputError, match="weight must be float32 or bfloat16 like its neighbours"):
        native(torch.zeros(2, 4), torch.zeros(4).bfloat16(), 1e-6)
    assert resolve("rms_norm", "native") is native
