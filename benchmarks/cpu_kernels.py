"""Times native kernels against torch baselines in one run: interleaved rounds, medians, and the machine's own limits beside them.

    python -m benchmarks.cpu_kernels --ops attention experts weights --threads 2 --csv cpu_kernels.csv

With one thread, `--clock cpu` counts the thread's CPU time: other work on the machine then disturbs less. Every number is measured.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsvlm_infer.hardware import probe
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.weight_matmul import PackedWeight, pack_weight

Call = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXED = [16, 64, 144, 256, 576]


@dataclass
class Row:
    """One line: what, on what, against what, and how far from the machine's limit."""

    date: str
    machine: str
    op: str
    shape: str
    dtype: str
    threads: int
    implementation: str
    baseline: str
    milliseconds: float
    ratio_to_baseline: float  # baseline's time / this time
    share_of_limit: float
    limit_name: str


@dataclass
class Case:
    """Calls that compute the same; `work` in flops or bytes, measured against the limit of that name."""

    op: str
    shape: str
    dtype: str
    native: Call
    baselines: dict[str, Call]
    work: float
    limit: str  # gemm or read


def attention_cases(dtype: str) -> Iterator[Case]:
    """32 mixed tiles, and one tile of 576 patches."""
    eager, native = resolve("varlen_tile_attention", "eager"), resolve("varlen_tile_attention", "native")
    for name, heads in (("vit-s", 6), ("clip-l", 16)):
        for shape, lengths in (("32 mixed tiles", [MIXED[i % 5] for i in range(32)]), ("1 tile of 576", [576])):
            cu = torch.tensor([0, *lengths]).cumsum(0)
            q, k, v = (torch.randn((int(cu[-1]), heads, 64)).to(DTYPES[dtype]) for _ in range(3))
            yield Case(
                "varlen_tile_attention",
                f"{name} {shape}",
                dtype,
                partial(native, q, k, v, cu),
                {
                    "sdpa loop": partial(eager, q, k, v, cu),
                    "sdpa padded": partial(_padded, q, k, v, lengths),
                    "sdpa bucketed": partial(_bucketed, q, k, v, lengths),
                },
                sum(4.0 * n * n * heads * 64 for n in lengths),
                "gemm",
            )


def _padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    sizes = torch.tensor(lengths)
    seen = torch.arange(max(lengths))[None] < sizes[:, None]  # [T, n]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    q, k, v = (pad(list(part.split_with_sizes(lengths))).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None]).transpose(1, 2)[seen]


def _bucketed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    out = torch.empty_like(q)
    starts = [0, *itertools.accumulate(lengths)]
    for length in sorted(set(lengths)):
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i, n in enumerate(lengths) if n == length])
        q_part, k_part, v_part = (part[rows].view(-1, length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        out[rows] = F.scaled_dot_product_attention(q_part, k_part, v_part).transpose(1, 2).reshape(-1, *q.shape[1:])
    return out


def experts_cases(dtype: str) -> Iterator[Case]:
    """12 experts, 3 levels, top-2, Dv 384, routing included."""
    width, hidden, experts = 384, 1536, 12
    gate, up, down = (
        torch.randn(s).mul(0.05).to(DTYPES[dtype]) for s in ((experts, hidden, width),) * 2 + ((experts, width, hidden),)
    )
    eager, native = ((resolve("route", name), resolve("grouped_experts", name)) for name in ("eager", "native"))

    def routed(ops: tuple[Callable[..., Any], Callable[..., Any]], x: Tensor, logits: Tensor, offsets: Tensor) -> Any:
        return ops[1](x, *ops[0](logits, offsets, 2), gate, up, down)

    def sorted_matmuls(x: Tensor, logits: Tensor, offsets: Tensor) -> Tensor:
        return _sorted(x, eager[0](logits, offsets, 2), gate, up, down)

    for tokens in (64, 256, 1024, 4096):
        offsets = torch.tensor([0, tokens // 3, 2 * tokens // 3, tokens])
        x, logits = torch.randn(tokens, width).to(DTYPES[dtype]), torch.randn(tokens, experts)
        yield Case(
            "route + grouped_experts",
            f"12 experts top-2 {tokens} tokens",
            dtype,
            partial(routed, native, x, logits, offsets),
            {
                "eager loop": partial(routed, eager, x, logits, offsets),
                "sorted matmuls": partial(sorted_matmuls, x, logits, offsets),
            },
            12.0 * tokens * width * hidden,
            "gemm",
        )


def _sorted(x: Tensor, routed: tuple[Tensor, Tensor, Tensor], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    expert_offsets, permutation, weights = routed
    order = permutation.long()
    rows, results = x[order // weights.shape[1]], x.new_empty((len(order), x.shape[1]))
    for expert, (start, stop) in enumerate(itertools.pairwise(expert_offsets.tolist())):
        part = rows[start:stop]
        torch.matmul(F.silu(part @ gate[expert].T) * (part @ up[expert].T), down[expert].T, out=results[start:stop])
    slots = torch.empty_like(results)
    slots[order] = results
    return (slots.view(*weights.shape, -1).float() * weights[..., None]).sum(dim=1).to(x.dtype)


def weights_cases(dtype: str) -> Iterator[Case]:
    """All 30 layers of the default language model in sequence, one token: larger than any cache."""
    from rsvlm_infer.kernels.native.weight_matmul import lay_out_weight

    native = resolve("weight_matmul", "native")
    sides = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
    dense = [torch.randn(side).mul(0.05) for side in sides]
    xs = {columns: torch.randn(1, columns).to(DTYPES[dtype]) for columns in (576, 1536)}
    as_stored = [part.to(DTYPES[dtype]) for part in dense]
    for kind in ("int4", "int8", "bf16"):
        packed = [pack_weight(part, kind) for part in dense]
        laid_out = [lay_out_weight(part) for part in packed]
        outs = [torch.empty(1, part.rows, dtype=DTYPES[dtype]) for part in laid_out]

        def core(laid_out: list = laid_out, outs: list = outs) -> None:  # type: ignore[type-arg]
            for part, out in zip(laid_out, outs, strict=True):
                part.matmul(x=xs[part.columns].data_ptr(), tokens=1, dtype=dtype, out=out.data_ptr())

        def twin(packed: list[PackedWeight] = packed) -> None:
            for part in packed:
                native(xs[part.shape[1]], part)

        def linear() -> None:
            for part in as_stored:
                F.linear(xs[part.shape[1]], part)

        read = float(sum(part.memory.numel() for part in laid_out))
        for name, call in (("30 layers, C++ alone", core), ("30 layers, through Python", twin)):
            yield Case(f"weight_matmul {kind}", name, dtype, call, {f"torch linear {dtype}": linear}, read, "read")


def decode_cases(dtype: str) -> Iterator[Case]:
    """The default language model's decode step and prompt: 9 query heads, 3 key-value heads of 64."""
    ops = {op: (resolve(op, "eager"), resolve(op, "native")) for op in ("decode_attention", "rms_norm", "rope")}
    kind = DTYPES[dtype]
    for batch, tokens, capacity in ((1, 1, 600), (8, 1, 600), (1, 531, 531)):
        q, k, v = (torch.randn(batch, n, h, 64).to(kind) for n, h in ((tokens, 9), (capacity, 3), (capacity, 3)))
        positions = (torch.arange(tokens) + capacity - tokens).repeat(batch, 1)
        x, weight = torch.randn(batch, tokens, 576).to(kind), torch.ones(576, dtype=kind)
        shape, size = f"batch {batch}, {tokens} new of {capacity}", 4 if kind is torch.float32 else 2
        calls = {
            "decode_attention": ((q, k, v, positions), 2.0 * batch * capacity * 192 * size),
            "rms_norm": ((x, weight, 1e-5), 2.0 * x.numel() * size),
            "rope": ((q, positions, 1e5), 2.0 * q.numel() * size),
        }
        for op, (arguments, read) in calls.items():
            eager, native = ops[op]
            yield Case(
                op,
                shape,
                dtype,
                partial(native, *arguments),
                {"eager": partial(eager, *arguments)},
                read,
                "read",
            )


SUITES = {"attention": attention_cases, "experts": experts_cases, "weights": weights_cases, "decode": decode_cases}


def measure(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each call; every round runs all of them, so that a busy moment meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def limits(dtype: str) -> dict[str, tuple[Call, float]]:
    """The machine's own rates: a 1024-cubed torch matmul in flops, the sum of 192 MiB in bytes."""
    a, b = (torch.randn(1024, 1024).to(DTYPES[dtype]) for _ in range(2))
    large = torch.randn(48 << 20)
    return {"gemm": (lambda: a @ b, 2.0 * 1024**3), "read": (large.sum, large.numel() * 4.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=sorted(SUITES), default=sorted(SUITES))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu = CPU time of the one thread")
    parser.add_argument("--csv", type=Path, help="appended to; the screen alone when left out")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread; add --threads 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = f"{probe().cpu}, {probe().cores} cores, {platform.machine()}, {(probe().native or {}).get('kernel_isa')}"
    rows = []
    with torch.inference_mode():
        for op, dtype in itertools.product(options.ops, options.dtypes):
            rates = limits(dtype)
            for case in SUITES[op](dtype):
                limit_call, limit_work = rates[case.limit]
                times = measure(
                    {"native": case.native, **case.baselines, "limit": limit_call}, options.rounds, CLOCKS[options.clock]
                )
                best = min(case.baselines, key=lambda name: times[name])
                for name in ("native", *case.baselines):
                    share = case.work / times[name] / (limit_work / times["limit"])
                    row = Row(
                        dt.date.today().isoformat(),
                        machine,
                        case.op,
                        case.shape,
                        case.dtype,
                        options.threads,
                        name,
                        best,
                        round(times[name] * 1e3, 4),
                        round(times[best] / times[name], 3),
                        # a baseline may read more bytes than `work` counts: its share says nothing
                        round(share, 3) if name == "native" or case.limit == "gemm" else float("nan"),
                        f"{case.limit}: {limit_work / times['limit'] / 1e9:.1f} G{'flop' if case.limit == 'gemm' else 'B'}/s",
                    )
                    rows.append(row)
                    print(*list(asdict(row).values())[2:], sep=" | ", flush=True)
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            if new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
