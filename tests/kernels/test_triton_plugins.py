"""Plugin kernels, launched as TensorRT would: inputs, integers, outputs, on the grid of `plugin_kernels`, against the eager ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rsvlm_export.tensorrt import plugin_kernels as plugins
from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.route import route
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from tests.kernels.triton_cases import EPSILON, prefix_sums, random_tensor
from tests.parity import assert_parity

CHIP, NAME, DTYPE = "sm_89", "float16", torch.float16


def _launch(plugin: plugins.PluginKernel, launch: Any, tensors: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    grid, integers = launch
    assert len(tensors) == len(plugin.inputs)
    assert len(integers) == len(plugin.integers)
    assert len(outputs) == len(plugin.arguments) - len(tensors) - len(integers)
    # the kernel's own order of arguments is the order in which they come
    assert tuple(plugin.kernel.arg_names[: len(plugin.arguments)]) == plugin.arguments
    options = {"num_warps": plugin.config.warps, "num_stages": plugin.config.stages}
    plugin.kernel[grid](*tensors, *integers, *outputs, **plugin.constants, **options)


@pytest.mark.parametrize(
    ("lengths", "keys", "heads", "head_dim"),
    [([5, 1, 70], None, 2, 16), ([17], [3], 3, 24), ([64, 0, 2], [1, 4, 65], 1, 32)],
)
def test_schedule_and_attention(
    lengths: list[int], keys: list[int] | None, heads: int, head_dim: int, device: torch.device
) -> None:
    bounds, bounds_k = prefix_sums(lengths, device), prefix_sums(keys or lengths, device)
    rows, key_rows = int(bounds[-1]), int(bounds_k[-1])
    q = random_tensor(1, rows, heads, head_dim, dtype=DTYPE, device=device)
    k, v = (random_tensor(seed, key_rows, heads, head_dim, dtype=DTYPE, device=device) for seed in (2, 3))
    schedule_kernel = plugins.tile_schedule(CHIP, NAME, head_dim)
    block = schedule_kernel.constants["BLOCK_M"]
    work = plugins.schedule_length(rows, len(bounds), block)
    schedule = torch.full((work, 4), -1, dtype=torch.int32, device=device)
    _launch(schedule_kernel, plugins.schedule_launch(rows, len(bounds), block), [q, bounds, bounds_k], [schedule])
    assert (schedule[:, :2] >= 0).all()  # every place is written: with work, or with an empty range
    out = torch.full_like(q, torch.nan)
    scale = head_dim**-0.5
    attention = plugins.tile_attention(CHIP, NAME, heads, head_dim, scale)
    _launch(attention, plugins.attention_launch(work, heads), [q, k, v, schedule], [out])
    eager = varlen_tile_attention(q, k, v, bounds, bounds_k, scale=scale)
    reference = varlen_tile_attention(q.double(), k.double(), v.double(), bounds, bounds_k, scale=scale)
    assert_parity(out, eager, reference, epsilon=EPSILON[DTYPE])


@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "width", "hidden"), [([5, 0, 12], 6, 2, 48, 80), ([3, 70, 1], 3, 1, 32, 64)]
)
def test_experts(tokens: list[int], experts: int, slots: int, width: int, hidden: int, device: torch.device) -> None:
    rows = sum(tokens)
    x = random_tensor(7, rows, width, dtype=DTYPE, device=device)
    gate, up = ((random_tensor(seed, experts, hidden, width) * width**-0.5).to(device, DTYPE) for seed in (2, 3))
    down = (random_tensor(4, experts, width, hidden) * hidden**-0.5).to(device, DTYPE)
    logits = random_tensor(1, rows, experts, device=device)
    offsets, permutation, weights = route(logits, prefix_sums(tokens, device), slots)
    places = rows * slots
    first = plugins.experts_up(CHIP, NAME, experts, slots, width, hidden)
    between = torch.full((places, hidden), torch.nan, dtype=DTYPE, device=device)
    launch = plugins.experts_launch(places, experts, hidden, first.config)
    _launch(first, launch, [x, gate, up, offsets, permutation], [between])
    second = plugins.experts_down(CHIP, NAME, experts, slots, width, hidden)
    parts = torch.full((places, width), torch.nan, dtype=DTYPE, device=device)
    _launch(
        second, plugins.experts_launch(places, experts, width, second.config), [between, down, offsets, permutation], [parts]
    )
    third = plugins.experts_combine(NAME, slots, width)
    out = torch.full_like(x, torch.nan)
    _launch(third, plugins.combine_launch(rows, width), [parts, weights.float().contiguous()], [out])
    eager = grouped_experts(x, offsets, permutation, weights, gate, up, down)
    reference = grouped_experts(x.double(), offsets, permutation, weights, gate.double(), up.double(), down.double())
    assert_parity(out, eager, reference, epsilon=EPSILON[DTYPE])
