"""The experts' feed-forward where every level has one expert, so that nothing has to be routed: definition and oracle."""

from __future__ import annotations

import itertools

from torch import Tensor

from .grouped_experts import expert_forward


def level_experts(
    x: Tensor,
    level_offsets: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """y[n] = expert_l(x[n]), l = the level whose rows hold n.

    What `grouped_experts` of `route(...)` gives with groups of one expert, whose only weight is 1, but for the last bits: a level's
    rows are read where they lie, and a matrix product may sum in another order where they begin at another alignment.

    Args:
        x: [N, D], rows sorted by level.
        level_offsets: [L + 1] int, exclusive prefix sums of the levels' row counts; level_offsets[L] = N.
        w_gate, w_up, w_down, b_up, b_down: as in `grouped_experts`, with E = L.

    Returns:
        [N, D] in x's dtype.
    """
    out = x.new_zeros(x.shape)
    for level, (start, stop) in enumerate(itertools.pairwise(level_offsets.tolist())):
        if stop > start:
            mixed = expert_forward(x[start:stop], level, w_gate, w_up, w_down, b_up, b_down)
            out[start:stop] = mixed.to(x.dtype)  # autocast may compute in a narrower type than x has
    return out
