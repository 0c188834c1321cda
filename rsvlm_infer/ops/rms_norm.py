"""RMSNorm: definition and oracle. Knows no layer."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, statistics in fp32.

    Args:
        x: [..., D]. weight: [D]. eps: added to the mean square.

    Returns:
        [..., D] in x's dtype; the product with `weight` is taken after rounding to x's dtype, as Llama does.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
