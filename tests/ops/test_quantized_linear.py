"""Quantised Linear layers against values by hand and against the float weight."""

from __future__ import annotations

import pytest
import torch

from rsvlm_infer.errors import InputError
from rsvlm_infer.ops.quantized_linear import dequantize_weight, quantize_weight, quantized_linear


def test_codes_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.0, 0.4, 0.6], [0.0, 0.0, 127.0, -14.0]])
    codes, scales = quantize_weight(weight, 4, 4)
    assert codes.tolist() == [[15 | 5 << 4, 8 | 9 << 4], [8 | 8 << 4, 15 | 7 << 4]]
    assert scales[0].item() == 1.0
    codes, scales = quantize_weight(weight, 8, 2)
    assert codes[1].tolist() == [0, 0, 127, -14]
    assert scales[1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [2, 16, 48])
def test_the_weight_comes_back_within_half_a_step(bits: int, group: int) -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_weight(weight, bits, group)
    error = (dequantize_weight(codes, scales) - weight).abs().view(5, -1, group)
    assert (error <= scales[..., None] * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_linear_layer_of_the_decoded_weight(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 64), (7, 64), (7,)))
    codes, scales = quantize_weight(weight, bits, 32)
    expected = x.double() @ dequantize_weight(codes, scales).double().T + bias.double()
    torch.testing.assert_close(quantized_linear(x, codes, scales, bias).double(), expected, atol=1e-5, rtol=1e-5)
    assert quantized_linear(x.half(), codes, scales.half()).dtype == torch.float16


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(4, 12)
    with pytest.raises(InputError, match="bits must be 4 or 8"):
        quantize_weight(weight, 2, 4)
    with pytest.raises(InputError, match="group must be even"):
        quantize_weight(weight, 4, 5)
    codes, scales = quantize_weight(weight, 4, 4)
    with pytest.raises(InputError, match=r"x must be \[..., 12\]"):
        quantized_linear(torch.zeros(1, 10), codes, scales)
    with pytest.raises(InputError, match="codes must be int8"):
        quantized_linear(torch.zeros(1, 12), codes.float(), scales)
    with pytest.raises(InputError, match="scales must be"):
        quantized_linear(torch.zeros(1, 12), codes, scales[:2])
    with pytest.raises(InputError, match=r"bias must be \[4\]"):
        quantized_linear(torch.zeros(1, 12), codes, scales, torch.zeros(3))
