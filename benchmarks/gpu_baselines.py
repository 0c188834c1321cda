"""What the Triton kernels are measured against: torch's own ways to do the same. Knows no timing and no shape list.

Baselines get what they need on the host (lengths, sorted tokens, masks) for free, before the clock starts; ours does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsvlm_infer.ops.decode_attention import decode_attention
from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.rms_norm import rms_norm
from rsvlm_infer.ops.rope import rope
from rsvlm_infer.ops.weight_matmul import PackedWeight, dequantise, weight_matmul

Run = Callable[[], Any]
FLEX_LARGEST = 65536  # patches; a mask of more blocks takes longer to make than this whole suite


class Unavailable(Exception):
    """This torch, device or shape cannot run a baseline; the text says why."""


def attention_baselines(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int]
) -> dict[str, Callable[[], Run]]:
    """Name -> maker of a run. q, k, v: [S, H, D]."""
    return {
        "sdpa loop": lambda: _sdpa_loop(q, k, v, lengths),
        "sdpa padded": lambda: _sdpa_padded(q, k, v, lengths),
        "sdpa bucketed": lambda: _sdpa_bucketed(q, k, v, lengths),
        "flex_attention": lambda: _flex(q, k, v, lengths),
        "torch varlen_attn": lambda: _torch_varlen(q, k, v, cu_seqlens, lengths),
    }


def _sdpa_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    def run() -> Tensor:
        out = torch.empty_like(q)
        for target, *tiles in zip(*(part.split_with_sizes(lengths) for part in (out, q, k, v)), strict=True):
            q_tile, k_tile, v_tile = (part.transpose(0, 1)[None] for part in tiles)
            tile = F.scaled_dot_product_attention(q_tile, k_tile, v_tile)
            target.copy_(tile[0].transpose(0, 1))
        return out

    return run


def _sdpa_padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    longest, counts = max(lengths), torch.tensor(lengths, device=q.device)
    if len(lengths) * longest * q.shape[1] * q.shape[2] * 4 > 1 << 33:
        raise Unavailable("padding would take more than 32 GB")
    valid = torch.arange(longest, device=q.device)[None] < counts[:, None]  # [T, N]
    places = valid.flatten().nonzero().flatten()
    mask = valid[:, None, None, :]

    def run() -> Tensor:
        padded = []
        for part in (q, k, v):
            grid = part.new_zeros((len(lengths) * longest, *part.shape[1:]))
            grid[places] = part
            padded.append(grid.view(len(lengths), longest, *part.shape[1:]).transpose(1, 2))
        q_padded, k_padded, v_padded = padded
        out = F.scaled_dot_product_attention(q_padded, k_padded, v_padded, attn_mask=mask)
        return out.transpose(1, 2).reshape(-1, *q.shape[1:])[places]

    return run


def _sdpa_bucketed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    starts = [0, *itertools.accumulate(lengths)]
    buckets = []
    for length in sorted(set(lengths)):
        rows = [torch.arange(starts[tile], starts[tile + 1]) for tile, own in enumerate(lengths) if own == length]
        buckets.append((len(rows), length, torch.cat(rows).to(q.device)))

    def run() -> Tensor:
        out = torch.empty_like(q)
        for tiles, length, rows in buckets:
            q_part, k_part, v_part = (part[rows].view(tiles, length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q_part, k_part, v_part)
            out[rows] = attended.transpose(1, 2).reshape(-1, *q.shape[1:])
        return out

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows = q.shape[0]
    if rows > FLEX_LARGEST:
        raise Unavailable(f"no block mask for {rows} patches")
    tile = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), torch.tensor(lengths, device=q.device))

    def same_tile(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return tile[query] == tile[key]

    mask = create_block_mask(same_tile, None, None, rows, rows, device=str(q.device), _compile=True)
    compiled = torch.compile(flex_attention)
    q_heads, k_heads, v_heads = (part.transpose(0, 1)[None] for part in (q, k, v))
    return lambda: compiled(q_heads, k_heads, v_heads, block_mask=mask)[0].transpose(0, 1)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int]) -> Run:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error
    longest = max(lengths)
    return lambda: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def experts_baselines(
    x: Tensor, routed: tuple[Tensor, Tensor, Tensor], w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> dict[str, Callable[[], Run]]:
    """Name -> maker of a run. x: [N, D]; weights of GLU experts [E, F, D] and [E, D, F]."""
    return {
        "eager loop": lambda: lambda: grouped_experts(x, *routed, w_gate, w_up, w_down),
        "torch._grouped_mm": lambda: _grouped_mm(x, routed, w_gate, w_up, w_down),
        "dense ffn of equal flop": lambda: _dense(x, routed[2].shape[1], w_gate, w_up, w_down),
    }


def _grouped_mm(x: Tensor, routed: tuple[Tensor, Tensor, Tensor], w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Run:
    if not hasattr(torch, "_grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no _grouped_mm")
    if x.dtype != torch.bfloat16:
        raise Unavailable("torch._grouped_mm takes bfloat16 only")
    expert_offsets, permutation, weights = routed
    slots = weights.shape[1]
    gate, up, down = (part.transpose(1, 2) for part in (w_gate, w_up, w_down))

    def run() -> Tensor:
        stops = expert_offsets[1:]
        rows = x[permutation // slots]
        hidden = F.silu(torch._grouped_mm(rows, gate, offs=stops)) * torch._grouped_mm(rows, up, offs=stops)
        parts = torch.empty_like(rows)
        parts[permutation] = torch._grouped_mm(hidden, down, offs=stops)
        return (parts.view(-1, slots, x.shape[1]).float() * weights[..., None]).sum(dim=1).to(x.dtype)

    return run


def _dense(x: Tensor, slots: int, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Run:
    rows = x.repeat(slots, 1)  # as many multiplications, one expert, nothing to route or to sum
    return lambda: F.linear(F.silu(F.linear(rows, w_gate[0])) * F.linear(rows, w_up[0]), w_down[0])


def _eager_and_compiled(function: Callable[..., Any], *arguments: Any) -> dict[str, Callable[[], Run]]:
    def compiled() -> Run:
        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*arguments)

    return {"torch eager": lambda: lambda: function(*arguments), "torch.compile": compiled}


def norm_baselines(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> dict[str, Callable[[], Run]]:
    """x + residual, then rms_norm."""

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return rms_norm(summed, weight, eps), summed

    return _eager_and_compiled(add_norm, x, residual, weight)


def append_baselines(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, theta: float
) -> dict[str, Callable[[], Run]]:
    """Rotation of q and k, then the write to the cache."""
    rows = torch.arange(q.shape[0], device=q.device)[:, None]

    def append(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
        k_cache[rows, positions] = rope(k, positions, theta)
        v_cache[rows, positions] = v
        return rope(q, positions, theta)

    return _eager_and_compiled(append, q, k, v, k_cache, v_cache, positions)


def decode_baselines(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> dict[str, Callable[[], Run]]:
    """One new token per row against the cache."""
    return _eager_and_compiled(decode_attention, q, k_cache, v_cache, positions)


def linear_baselines(x: Tensor, packed: PackedWeight) -> dict[str, Callable[[], Run]]:
    """The definition, the same decoded inside of a compiled function, and the weight in x's dtype."""
    weight, codes, scales = dequantise(packed).to(x.dtype), packed.codes, packed.scales

    def decoded(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.linear(x, dequantise(PackedWeight(packed.kind, codes, scales)).to(x.dtype))

    return {
        "torch eager": lambda: lambda: weight_matmul(x, packed),
        "torch.compile": _eager_and_compiled(decoded, x, codes, scales)["torch.compile"],
        "linear in the full dtype": lambda: lambda: F.linear(x, weight),
    }
