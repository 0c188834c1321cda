"""Linear layers with packed weights: the values that the codes stand for, few rows and many, and what they replace."""

from __future__ import annotations

from typing import Literal

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.errors import InputError  # noqa: E402
from rsvlm_infer.layers.packed_linear import FEW_ROWS, PackedLinear, pack_linears  # noqa: E402
from rsvlm_infer.ops.weight_matmul import dequantise  # noqa: E402


def _linear(columns: int = 64, rows: int = 20, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(columns, rows, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (FEW_ROWS, 64), (FEW_ROWS + 1, 64), (2, 40, 64)])
def test_few_rows_and_many_multiply_the_same_values(shape: tuple[int, ...], kind: Literal["int8", "int4"], bias: bool) -> None:
    linear = _linear(bias=bias)
    packed = PackedLinear(linear, kind)
    x = torch.randn(shape)
    wanted = x.double() @ dequantise(packed.packed).double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(packed(x).double(), wanted, atol=1e-5, rtol=1e-5)
    half = packed.bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, atol=0.05, rtol=0.02)


def test_few_rows_go_through_the_op_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, calls = PackedLinear(_linear(), "int8"), []
    op = packed.weight_matmul
    monkeypatch.setattr(packed, "weight_matmul", lambda x, weight: (calls.append(x.shape[0]), op(x, weight))[1])
    packed(torch.ones(FEW_ROWS, 64))
    packed(torch.ones(FEW_ROWS + 1, 64))
    assert calls == [FEW_ROWS]


def test_every_linear_below_is_replaced_and_widths_must_fit() -> None:
    model = torch.nn.Sequential(_linear(), torch.nn.Sequential(torch.nn.LayerNorm(20), torch.nn.Embedding(2, 20)))
    pack_linears(model, "int4")
    assert isinstance(model[0], PackedLinear)
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "1.0.weight", "1.0.bias", "1.1.weight"]
    with pytest.raises(InputError, match="In a multiple of 32 for int8, got 33; use bf16"):
        pack_linears(torch.nn.Sequential(_linear(33)), "int8")
