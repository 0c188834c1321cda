"""Times native kernels against torch baselines in one run: interleaved rounds, medians, and the machine's own limits beside them.

    python -m benchmarks.cpu_kernels --threads 1 2 --csv benchmarks/results/cpu_kernels.csv

With one thread, `--clock cpu` counts the thread's CPU time: other work on the machine then disturbs less. Every number is measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.rows import append_rows
from rsvlm_infer.hardware import probe
from rsvlm_infer.kernels.native.weight_matmul import NativeWeight, lay_out_weights
from rsvlm_infer.ops.registry import resolve
from rsvlm_infer.ops.weight_matmul import PackedWeight, join_weights, pack_weight, without_codes

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
    """12 experts, 3 levels, top-2, routing included."""
    experts = 12
    eager, native = ((resolve("route", name), resolve("grouped_experts", name)) for name in ("eager", "native"))
    for width, hidden, counts in ((384, 1536, (64, 256, 1024, 4096)), (384, 256, (1024, 4096)), (1152, 256, (1024, 4096))):
        sides = ((experts, hidden, width),) * 2 + ((experts, width, hidden),)
        matrices = [torch.randn(side).mul(0.05).to(DTYPES[dtype]) for side in sides]
        for tokens in counts:
            offsets = torch.tensor([0, tokens // 3, 2 * tokens // 3, tokens])
            x, logits = torch.randn(tokens, width).to(DTYPES[dtype]), torch.randn(tokens, experts)
            yield Case(
                "route + grouped_experts",
                f"{tokens} tokens of {width}, 12 experts of {hidden}, top-2",
                dtype,
                partial(_routed, native, x, logits, offsets, matrices),
                {
                    "eager loop": partial(_routed, eager, x, logits, offsets, matrices),
                    "sorted matmuls": partial(_routed, (eager[0], _sorted), x, logits, offsets, matrices),
                },
                12.0 * tokens * width * hidden,
                "gemm",
            )


def _routed(
    ops: tuple[Callable[..., Any], Callable[..., Tensor]], x: Tensor, logits: Tensor, offsets: Tensor, matrices: list[Tensor]
) -> Tensor:
    route, experts = ops
    return experts(x, *route(logits, offsets, 2), *matrices)


def _sorted(
    x: Tensor, expert_offsets: Tensor, permutation: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
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
    native, kind_of = resolve("weight_matmul", "native"), DTYPES[dtype]
    groups = [
        (576, (576, 192, 192)),
        (576, (576,)),
        (576, (1536, 1536)),
        (1536, (576,)),
    ] * 30  # In, Outs: q k v, o, gate up, down
    dense = [[torch.randn(rows, columns).mul(0.05) for rows in outs] for columns, outs in groups]
    xs = {columns: torch.randn(1, columns).to(kind_of) for columns in (576, 1536)}
    as_stored = [part.to(kind_of) for parts in dense for part in parts]
    for kind in ("int4", "int8", "bf16"):
        packed = [[pack_weight(part, kind) for part in parts] for parts in dense]
        joined = [join_weights(parts) for parts in packed]
        laid_out = lay_out_weights(joined)
        outs = [torch.empty(1, part.rows, dtype=kind_of) for part in laid_out]
        joined = [without_codes(part) for part in joined]
        lay_out_weights([part for parts in packed for part in parts])

        def core(laid_out: list[NativeWeight] = laid_out, outs: list[Tensor] = outs) -> None:
            for part, out in zip(laid_out, outs, strict=True):
                part.matmul[kind_of](xs[part.columns].data_ptr(), 1, out.data_ptr())

        def shared(joined: list[PackedWeight] = joined) -> None:
            for (columns, outs), part in zip(groups, joined, strict=True):
                out = native(xs[columns], part)
                if len(outs) > 1:
                    out.split_with_sizes(outs, -1)

        def apart(packed: list[list[PackedWeight]] = packed) -> None:
            for (columns, _), parts in zip(groups, packed, strict=True):
                for part in parts:
                    native(xs[columns], part)

        def linear() -> None:
            for part in as_stored:
                F.linear(xs[part.shape[1]], part)

        read = float(sum(part.memory.numel() for part in laid_out))
        for name, call in (("C++ alone", core), ("4 calls per layer", shared), ("7 calls per layer", apart)):
            yield Case(
                f"weight_matmul {kind}", f"30 layers, {name}", dtype, call, {f"torch linear {dtype}": linear}, read, "read"
            )


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


def cue_cases(dtype: str) -> Iterator[Case]:
    """Exact top 8 of float16 entries, against torch, which rounds differently from the op, and numpy without ties or checks."""
    if dtype != "float32":  # entries are float16 and queries float32, whatever the model computes in
        return
    eager, native, rng = resolve("cue_search", "eager"), resolve("cue_search", "native"), np.random.default_rng(0)
    for count in (2_000, 50_000):
        for views in (1, 20):
            entries, visual = (rng.standard_normal((rows, 256)).astype(np.float32) for rows in (count, views))
            entries, visual = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (entries, visual))
            half = entries.astype(np.float16)
            wide, query = torch.from_numpy(entries), torch.from_numpy(visual)
            narrow, narrow_query = torch.from_numpy(half), query.half()
            yield Case(
                "cue_search",
                f"{count} entries of 256, {views} views, top 8",
                "float16 entries",
                partial(native, visual, None, half, 8, 0.0),
                {
                    "eager float64": partial(eager, visual, None, half, 8, 0.0),
                    "numpy float32 kept": partial(_numpy_top, visual, entries),
                    "numpy float16 widened": partial(_widened_top, visual, half),
                    "torch float32 kept": partial(_torch_top, query, wide),
                    "torch float16, rounded": partial(_torch_top, narrow_query, narrow),
                },
                2.0 * count * 256,
                "read",
            )


def _widened_top(visual: NDArray[np.float32], entries: NDArray[np.float16]) -> NDArray[np.int64]:
    return _numpy_top(visual, entries.astype(np.float32))


def _torch_top(visual: Tensor, entries: Tensor) -> object:
    return (entries @ visual.T).amax(dim=1).topk(8)


def _numpy_top(visual: NDArray[np.float32], entries: NDArray[np.float32]) -> NDArray[np.int64]:
    scores = (entries @ visual.T).max(axis=1)  # [M]
    rows = np.argpartition(scores, len(scores) - 8)[-8:]
    return rows[np.argsort(-scores[rows])]


SUITES = {
    "attention": attention_cases,
    "experts": experts_cases,
    "weights": weights_cases,
    "decode": decode_cases,
    "cue": cue_cases,
}


def measure(calls: dict[str, Call], rounds: int, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each call; every round runs all of them, so that a busy moment meets all alike.

    `rounds` of them, or as many as fit into `seconds` of wall time but three.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
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
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="one run for each")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each case at most, beyond three rounds")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu = CPU time of the one thread")
    parser.add_argument("--csv", type=Path, help="appended to; the screen alone when left out")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu counts one thread; add --threads 1")
    known = {str(threads) for threads in options.threads} == {os.environ.get("OPENBLAS_NUM_THREADS")}
    for threads in [] if known else options.threads:  # numpy's BLAS counts threads when it is loaded: a process for each
        own = [*sys.argv[1:], "--threads", str(threads)]
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        subprocess.run([sys.executable, "-m", "benchmarks.cpu_kernels", *own], env={**os.environ, **variables}, check=True)
    if known:
        torch.set_num_threads(options.threads[0])
        rows = []
        with torch.inference_mode():
            for op, dtype in itertools.product(options.ops, options.dtypes):
                rows += rows_of(op, dtype, options.threads[0], options)
        if options.csv:
            append_rows(options.csv, [asdict(row) for row in rows])


def rows_of(op: str, dtype: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """The rows of one suite, printed as they come."""
    torch.manual_seed(0)
    machine = f"{probe().cpu}, {probe().cores} cores, {platform.machine()}, {(probe().native or {}).get('kernel_isa')}"
    rates, rows = limits(dtype), []
    for case in SUITES[op](dtype):
        limit_call, limit_work = rates[case.limit]
        calls = {"native": case.native, **case.baselines, "limit": limit_call}
        times = measure(calls, options.rounds, options.seconds, CLOCKS[options.clock])
        best = min(case.baselines, key=lambda name: times[name])
        for name in ("native", *case.baselines):
            share = case.work / times[name] / (limit_work / times["limit"])
            row = Row(
                dt.datetime.now(tz=dt.UTC).date().isoformat(),
                machine,
                case.op,
                case.shape,
                case.dtype,
                threads,
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
    return rows


if __name__ == "__main__":
    main()
