"""The experts' feed-forward over routed tokens: definition and oracle. Knows no router and no level."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor


def grouped_experts(
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    weights: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """y[n] = Σ_slots weights[n, slot] · expert_e(x[n]), e = the slot's expert.

    Expert: GLU-SiLU `down(silu(gate(x)) · up(x))`; without `w_gate` GELU-MLP `down(gelu(up(x)))`; without `w_up` too, affine `down(x)`.

    Args:
        x: [N, D]. expert_offsets [E + 1], permutation [N·k], weights [N, k]: from `route`.
        w_gate, w_up: [E, F, D]. w_down: [E, D, F] (affine: [E, D, D]). b_up: [E, F]. b_down: [E, D].

    Returns:
        [N, D] in x's dtype. Slots are summed in fp32 in slot order, so the result does not depend on other tokens.
    """
    k = weights.shape[1]
    slots = x.new_zeros((permutation.numel(), x.shape[1]))  # [N·k, D]
    bounds = expert_offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            chosen = permutation[start:stop].long()
            rows = x[chosen // k]  # [n_e, D]
            out = expert_forward(rows, expert, w_gate, w_up, w_down, b_up, b_down)
            slots[chosen] = out.to(slots.dtype)  # autocast may compute in a narrower type than x has
    combined = (slots.view(-1, k, x.shape[1]).float() * weights[..., None]).sum(dim=1)
    return combined.to(x.dtype)


def expert_forward(
    rows: Tensor,
    expert: int,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> Tensor:
    """One expert on its rows: [n, D] -> [n, D]. The weights are those of all experts, as in `grouped_experts`."""
    hidden = rows if w_up is None else F.linear(rows, w_up[expert], None if b_up is None else b_up[expert])  # [n, F]
    if w_gate is not None:
        hidden = F.silu(rows @ w_gate[expert].T) * hidden
    elif w_up is not None:
        hidden = F.gelu(hidden)
    return F.linear(hidden, w_down[expert], None if b_down is None else b_down[expert])
