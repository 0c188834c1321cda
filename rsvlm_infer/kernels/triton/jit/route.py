"""Kernels of route: choose experts and count them; then place every choice behind those of earlier tokens."""

import triton
import triton.language as tl


@triton.jit
def select_kernel(
    logits_ptr,
    level_offsets_ptr,
    choice_ptr,  # int32 [N, k]
    weights_ptr,  # float32 [N, k]
    counts_ptr,  # int32 [programs, EXPERTS]
    num_tokens,
    chunks,  # blocks of tokens per program
    logits_row_stride,
    K: tl.constexpr,
    K_SLOTS: tl.constexpr,  # k and the number of experts, rounded up to powers of two
    EXPERTS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Top-k inside the level's group, softmax over the chosen, and how often this program's tokens chose each expert."""
    experts = tl.arange(0, EXPERTS)[None, :]
    slots = tl.arange(0, K_SLOTS)[None, :]
    counts = tl.zeros([EXPERTS], dtype=tl.int32)
    for chunk in range(chunks):
        tokens = (tl.program_id(0) * chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
        valid = tokens < num_tokens
        level = tl.zeros([BLOCK], dtype=tl.int32)
        for border in range(1, LEVELS):
            level += (tokens >= tl.load(level_offsets_ptr + border)).to(tl.int32)
        first = level[:, None] * GROUP
        inside = (experts >= first) & (experts < first + GROUP)
        rows = logits_ptr + tokens.to(tl.int64)[:, None] * logits_row_stride
        logits = tl.load(rows + experts, mask=valid[:, None] & inside, other=float("-inf")).to(tl.float32)
        # NaN compares with nothing and would choose no expert at all; as infinity it wins, as in a sort, and its weights are NaN
        logits = tl.where(logits != logits, float("inf"), logits)
        free = inside.to(tl.int32)
        top_logits = tl.full([BLOCK, K_SLOTS], float("-inf"), dtype=tl.float32)
        top_experts = tl.zeros([BLOCK, K_SLOTS], dtype=tl.int32)
        for slot in range(K):
            best = tl.max(tl.where(free > 0, logits, float("-inf")), axis=1)
            pick = tl.min(tl.where((free > 0) & (logits == best[:, None]), experts, EXPERTS), axis=1)
            top_logits = tl.where(slots == slot, best[:, None], top_logits)
            top_experts = tl.where(slots == slot, pick[:, None], top_experts)
            free = tl.where(experts == pick[:, None], 0, free)
        shares = tl.exp(top_logits - tl.max(top_logits, axis=1)[:, None])
        shares = shares / tl.sum(shares, axis=1)[:, None]
        places = tokens[:, None] * K + slots
        stored = valid[:, None] & (slots < K)
        tl.store(choice_ptr + places, top_experts, mask=stored)
        tl.store(weights_ptr + places, shares, mask=stored)
        picked = valid[:, None] & inside & (free == 0)
        counts += tl.sum(picked.to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def place_kernel(
    choice_ptr,
    counts_ptr,
    expert_offsets_ptr,  # int32 [E + 1]
    permutation_ptr,  # int32 [N · k]
    num_tokens,
    chunks,
    num_experts,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # rows of counts read at once
    BLOCK: tl.constexpr,
):
    """A choice's place = start of its expert + choices of earlier programs, earlier blocks and earlier tokens of this block.

    Each program sums the few counts itself, so the order is fixed and there is neither an atomic nor a third launch. A token never
    chooses an expert twice: a running count over tokens, per expert, is the whole order.
    """
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    earlier = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, tl.num_programs(0), PROGRAMS):
        programs = start + tl.arange(0, PROGRAMS)
        mask = (programs < tl.num_programs(0))[:, None]
        counts = tl.load(counts_ptr + programs[:, None] * EXPERTS + experts[None, :], mask=mask, other=0)
        total += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where((programs < tl.program_id(0))[:, None], counts, 0), axis=0)
    starts = tl.cumsum(total, axis=0) - total
    if tl.program_id(0) == 0:
        # experts beyond E count nothing: the start of the one after the last is the number of all choices
        tl.store(expert_offsets_ptr + experts, starts, mask=experts < num_experts)
        tl.store(expert_offsets_ptr + num_experts, tl.sum(total, axis=0))
    position = starts + earlier
    for chunk in range(chunks):
        tokens = (tl.program_id(0) * chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
        picked = tl.zeros([BLOCK, EXPERTS], dtype=tl.int32)
        slots = tl.zeros([BLOCK, EXPERTS], dtype=tl.int32)
        for slot in range(K):
            choice = tl.load(choice_ptr + tokens * K + slot, mask=tokens < num_tokens, other=-1)
            hit = choice[:, None] == experts[None, :]
            picked = tl.where(hit, 1, picked)
            slots = tl.where(hit, slot, slots)
        places = position[None, :] + tl.cumsum(picked, axis=0) - picked
        tl.store(permutation_ptr + places, tokens[:, None] * K + slots, mask=picked > 0)
        position += tl.sum(picked, axis=0)
