"""Linear layers whose weight is kept in int8 or int4; activations stay as they are. Knows no model and no decode loop."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.registry import resolve
from ..ops.weight_matmul import dequantise, pack_weight

# Up to here each row reads the codes again; beyond, the weight is unpacked once for all of them. One decode step of the engine's
# largest default batch has 16. Reasoned, not measured.
FEW_ROWS = 16


class PackedLinear(nn.Module):
    """y = x · Wᵀ + b with W packed by `pack_weight`, on the device where the weight was. It stays there: pack after moving a model."""

    def __init__(self, linear: nn.Linear, kind: Literal["int8", "int4"], implementation: str = "eager") -> None:
        super().__init__()
        self.weight_matmul = resolve("weight_matmul", implementation)
        self.packed = pack_weight(linear.weight, kind)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., In] -> [..., Out] in x's dtype. Few rows: codes times x in float32; many: the weight rounded to x's dtype first."""
        if x.numel() // x.shape[-1] > FEW_ROWS:
            return F.linear(x, dequantise(self.packed).to(x.dtype), self.bias)
        out: Tensor = self.weight_matmul(x, self.packed)
        return out if self.bias is None else out + self.bias


def pack_linears(module: nn.Module, kind: Literal["int8", "int4"], implementation: str = "eager") -> None:
    """Replaces every nn.Linear below `module`; the old weights are gone.

    Raises:
        InputError: a weight whose In is no multiple of 32, or that is not finite.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child, kind, implementation))
