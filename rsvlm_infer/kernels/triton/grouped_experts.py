"""grouped_experts on CUDA: gate, up and activation in one launch, down in a second, the weighted sum of slots in a third.

With one expert per token there is no third launch; rows that are sorted by level already (`level_experts.py`) need no permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from .configs import Config, experts_config
from .launch import check_on_device, check_shape, chip_family, next_power_of_2, triton_why_not, unit_stride

COMBINE_BLOCK = 1024


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return triton_why_not()


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
    """See `rsvlm_infer.ops.grouped_experts.grouped_experts`.

    Raises:
        InputError: shapes or dtypes that do not fit, or tensors on another device.
    """
    check_shape("grouped_experts", "x", x, (None, None))
    check_shape("grouped_experts", "weights", weights, (x.shape[0], None))
    check_shape("grouped_experts", "permutation", permutation, (weights.numel(),))
    check_on_device("grouped_experts", x=x, expert_offsets=expert_offsets, permutation=permutation, weights=weights)
    factors = weights.float().contiguous()
    return launch_experts("grouped_experts", x, expert_offsets, permutation, factors, w_gate, w_up, w_down, b_up, b_down)


def launch_experts(
    op: str,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    weights: Tensor | None,
    w_gate: Tensor | None,
    w_up: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> Tensor:
    """The launches that both ops share; `op` is for messages. permutation and weights None: rows are sorted, one expert each.

    Raises:
        InputError: shapes or dtypes that do not fit, or tensors on another device.
    """
    (tokens, width), experts = x.shape, w_down.shape[0]
    check_shape(op, "expert_offsets", expert_offsets, (experts + 1,))
    check_shape(op, "w_down", w_down, (experts, width, None if w_up is not None else width))
    hidden = w_down.shape[2]
    check_shape(op, "w_up", w_up, (experts, hidden, width))
    check_shape(op, "w_gate", w_gate, (experts, hidden, width))
    check_shape(op, "b_up", b_up, (experts, hidden))
    check_shape(op, "b_down", b_down, (experts, width))
    check_on_device(op, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_up=b_up, b_down=b_down)
    if w_up is None and w_gate is not None:
        raise InputError(f"w_up of {op} must be given with w_gate, got None; an affine expert has w_down only")
    if any(part is not None and part.dtype != x.dtype for part in (w_gate, w_up, w_down)):
        raise InputError(f"w_gate, w_up and w_down of {op} must have x's dtype {x.dtype}; convert them first")
    slots = 1 if weights is None else weights.shape[1]
    places = tokens * slots
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if places == 0:
        return out.zero_()
    from .jit.grouped_experts import combine_kernel

    x = unit_stride(x)
    up, down = experts_config(chip_family(x.device), x.dtype)
    # every expert rounds its rows up to whole blocks; how many rows each has is known on the device only
    row_blocks = (places + min(experts, places) * (up.block_m - 1)) // up.block_m
    rows = x
    if w_up is not None:
        rows = torch.empty((places, hidden), dtype=x.dtype, device=x.device)
        _launch_up(x, rows, w_gate, w_up, b_up, expert_offsets, permutation, slots, row_blocks, up)
    if slots == 1:
        _launch_down(rows, out, w_down, b_down, expert_offsets, permutation, weights, slots, row_blocks, down, w_up is None)
        return out
    assert weights is not None
    # a row per slot, in the order of tokens: the scatter is the inverse permutation, so the sum needs no atomics
    parts = torch.empty((places, width), dtype=x.dtype, device=x.device)
    _launch_down(rows, parts, w_down, b_down, expert_offsets, permutation, None, slots, row_blocks, down, w_up is None)
    block = min(COMBINE_BLOCK, next_power_of_2(width))
    combine_kernel[(tokens, -(-width // block))](parts, weights, out, width, K=slots, BLOCK=block, num_warps=4)
    return out


def _launch_up(
    x: Tensor,
    rows: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    slots: int,
    row_blocks: int,
    config: Config,
) -> None:
    from .jit.grouped_experts import up_kernel

    experts, hidden, width = w_up.shape
    w_up = w_up.contiguous()
    up_kernel[(row_blocks * -(-hidden // config.block_n),)](
        x,
        rows,
        w_up if w_gate is None else w_gate.contiguous(),
        w_up,
        w_up if b_up is None else b_up.contiguous(),
        expert_offsets,
        expert_offsets if permutation is None else permutation,
        experts,
        slots,
        width,
        hidden,
        row_blocks,
        x.stride(0),
        EXPERTS=next_power_of_2(experts),
        PERMUTED=permutation is not None,
        GATED=w_gate is not None,
        HAS_BIAS=b_up is not None,
        EVEN=width % config.block_k == 0,
        EXACT=x.dtype == torch.float32,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _launch_down(
    rows: Tensor,
    out: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    weights: Tensor | None,
    slots: int,
    row_blocks: int,
    config: Config,
    affine: bool,
) -> None:
    from .jit.grouped_experts import down_kernel

    experts, width, hidden = w_down.shape
    w_down = w_down.contiguous()
    down_kernel[(row_blocks * -(-width // config.block_n),)](
        rows,
        out,
        w_down,
        w_down if b_down is None else b_down.contiguous(),
        expert_offsets,
        expert_offsets if permutation is None else permutation,
        w_down if weights is None else weights,
        experts,
        slots,
        width,
        hidden,
        row_blocks,
        rows.stride(0),
        EXPERTS=next_power_of_2(experts),
        PERMUTED=permutation is not None,
        GATHER=affine and permutation is not None,
        WEIGHTED=weights is not None,
        HAS_BIAS=b_down is not None,
        EVEN=hidden % config.block_k == 0,
        EXACT=rows.dtype == torch.float32,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
