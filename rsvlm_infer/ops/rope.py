"""Rotary position embedding, rotate-half layout: definition and oracle. Knows no cache and no attention."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) by positions · theta^(-2i/D).

    Args:
        x: [..., N, H, D] with even D. positions: [..., N] int. theta: base of the frequencies.

    Returns:
        [..., N, H, D] in x's dtype; angles in fp32.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(0, half, dtype=torch.float32, device=x.device) * 2 / x.shape[-1]
    angles = positions[..., None].float() * (1.0 / theta**exponent)  # [..., N, D/2]
    cos = angles.cos()[..., None, :].to(x.dtype)  # [..., N, 1, D/2]
    sin = angles.sin()[..., None, :].to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
