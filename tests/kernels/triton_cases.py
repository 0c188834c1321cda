"""What the Triton tests share: dtypes, seeded tensors and packed tiles. Knows no kernel."""

from __future__ import annotations

import pytest
import torch

EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# bfloat16 products are silently wrong in the interpreter
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu))


def random_tensor(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def prefix_sums(lengths: list[int], device: torch.device | None = None) -> torch.Tensor:
    """[0, l0, l0 + l1, ...] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
