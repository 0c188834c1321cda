"""One call on a CUDA machine: parity in all dtypes, choice among candidate configurations, timings against named baselines.

    python -m benchmarks.gpu_suite --out results.csv               everything, about ten minutes on an H100-class GPU
    python -m benchmarks.gpu_suite --only attention --quick        fewer shapes and repetitions

Every time is taken with a cold L2 cache (a buffer larger than it is overwritten before each repetition) and is the median of CUDA
event times, launches included. `ratio` = baseline time / our time. `share_of_limit` = the time that the larger of (bytes that must
move / copy bandwidth) and (multiply-adds / matrix rate) would take, over ours; both limits are measured first, in the same call.
Rows where we lose are written like all others.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime as dt
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    "date", "device", "torch", "triton", "op", "shape", "dtype", "implementation", "config", "baseline",
    "milliseconds", "p20", "p80", "baseline_milliseconds", "ratio", "limit", "share_of_limit", "note",
)  # fmt: skip
OPS = ("attention", "experts", "decode")
PRINTED = ("op", "shape", "dtype", "implementation", "config", "baseline", "milliseconds", "ratio", "share_of_limit", "note")
DEVICE = "cuda"
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured call, what it must move and multiply, and how else it can be done."""

    op: str
    shape: str
    dtype: Any
    run: partial[Any]
    baselines: dict[str, Callable[[], Callable[[], Any]]]
    bytes_moved: float
    flop: float


class Clock:
    """Cold-cache timings and the machine's two limits."""

    def __init__(self, quick: bool) -> None:
        import torch

        self.torch: Any = torch
        self.repetitions = 15 if quick else 50
        properties = torch.cuda.get_device_properties(0)
        self.device = properties.name
        self.flush = torch.empty(max(1 << 28, 4 * properties.L2_cache_size), dtype=torch.int8, device=DEVICE)
        source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        copy_ms = self.measure(lambda: target.copy_(source))[0]
        self.bandwidth = 2 * source.numel() / (copy_ms * 1e-3)  # bytes per second
        self.rates = {dtype: self._matrix_rate(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}

    def _matrix_rate(self, dtype: Any) -> float:
        side = 4096 if dtype == self.torch.float32 else 8192
        a, b = (self.torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        return 2 * side**3 / (self.measure(lambda: a @ b)[0] * 1e-3)  # operations per second

    def measure(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in milliseconds."""
        for _ in range(3):
            run()
        events = [[self.torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repetitions)]
        for start, stop in events:
            self.flush.zero_()
            start.record()
            run()
            stop.record()
        self.torch.cuda.synchronize()
        times = sorted(start.elapsed_time(stop) for start, stop in events)
        return statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5]

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The same call as a CUDA graph: what a decode step costs without the host."""
        run()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            run()
        replay: Callable[[], Any] = graph.replay
        return replay


def attention_cases(dtype: Any, quick: bool) -> Iterator[Case]:
    """Tiles of 224 pixels in mixed grids, at the widths of three published encoders."""
    import torch

    from rsvlm_infer.kernels.triton.varlen_tile_attention import varlen_tile_attention

    from .gpu_baselines import attention_baselines

    cycle = [grid**2 for grid in (16, 8, 4, 24)]
    mixes = {
        "1 tile 16²": [256],
        "20 tiles 4²-16²": [256] * 5 + [64] * 11 + [16] * 4,
        "32 tiles 4²-24²": [16, 64, 144, 256, 576] * 6 + [576, 16],
        "144 tiles 4²-24²": cycle * 36,
        "64 tiles 24²": [576] * 64,
        "576 tiles 4²-24²": cycle * 144,
    }
    models = {"ViT-S/14": (6, 64), "CLIP-L/336": (16, 64), "SigLIP-so400m": (16, 72)}
    for model, (heads, head_dim) in models.items():
        for name, lengths in list(mixes.items())[: 3 if quick else None]:
            rows = sum(lengths)
            q, k, v = torch.randn(3, rows, heads, head_dim, device=DEVICE).to(dtype).unbind(0)
            cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
            yield Case(
                "varlen_tile_attention",
                f"{model}, {name}",
                dtype,
                partial(varlen_tile_attention, q, k, v, cu),
                attention_baselines(q, k, v, cu, lengths),
                4 * q.numel() * q.element_size(),
                4 * sum(length**2 for length in lengths) * heads * head_dim,
            )


def experts_cases(dtype: Any, quick: bool) -> Iterator[Case]:
    """12 experts of three levels, top-2, at the widths of the same encoders."""
    import torch

    from rsvlm_infer.kernels.triton.grouped_experts import grouped_experts
    from rsvlm_infer.kernels.triton.route import route

    from .gpu_baselines import experts_baselines

    for width in (384, 1024, 1152):
        gate, up = (torch.randn(2, 12, 2 * width, width, device=DEVICE) * width**-0.5).to(dtype).unbind(0)
        down = (torch.randn(12, width, 2 * width, device=DEVICE) * (2 * width) ** -0.5).to(dtype)
        for tokens in (64, 1024) if quick else (64, 512, 4096, 32768):
            x, logits = torch.randn(3 * tokens, width, device=DEVICE).to(dtype), torch.randn(3 * tokens, 12, device=DEVICE)
            levels = torch.arange(4, device=DEVICE, dtype=torch.int32) * tokens
            routed = route(logits, levels, 2)
            weights = (gate, up, down)
            slots = 6 * tokens
            yield Case(
                "grouped_experts",
                f"Dv {width}, 12 experts, top-2, 3 x {tokens} tokens",
                dtype,
                partial(grouped_experts, x, *routed, *weights),
                experts_baselines(x, routed, *weights),
                (2 * x.numel() + sum(part.numel() for part in weights)) * x.element_size(),
                slots * 3 * 2 * width * 2 * width,
            )
            if dtype == torch.float32:
                from rsvlm_infer.ops.route import route as eager_route

                yield Case(
                    "route",
                    f"12 experts, top-2, 3 x {tokens} tokens",
                    dtype,
                    partial(route, logits, levels, 2),
                    {"torch eager": partial(partial, eager_route, logits, levels, 2)},
                    logits.numel() * 4 + slots * 8,
                    0.0,
                )


def decode_cases(dtype: Any, quick: bool) -> Iterator[Case]:
    """The parts of one decode step: the default language model (576 wide, 9:3 heads) and a 7B one (4096 wide, 32:8 heads)."""
    import torch

    from rsvlm_infer.kernels.triton.decode_attention import decode_attention
    from rsvlm_infer.kernels.triton.rms_norm import add_rms_norm
    from rsvlm_infer.kernels.triton.rope import rope_append
    from rsvlm_infer.kernels.triton.weight_matmul import weight_matmul
    from rsvlm_infer.ops.weight_matmul import pack_weight

    from .gpu_baselines import append_baselines, decode_baselines, linear_baselines, norm_baselines

    models = {"135M": (576, 1536, 9, 3, 64), "7B": (4096, 11008, 32, 8, 128)}
    for model, (width, hidden, heads, kv_heads, head_dim) in models.items():
        for batch in (1,) if quick else (1, 8):
            item = torch.empty(0, dtype=dtype).element_size()
            x, residual = torch.randn(2, batch, 1, width, device=DEVICE).to(dtype).unbind(0)
            weight = torch.ones(width, device=DEVICE, dtype=dtype)
            yield Case(
                "add_rms_norm",
                f"{model}, batch {batch}",
                dtype,
                partial(add_rms_norm, x, residual, weight, 1e-5),
                norm_baselines(x, residual, weight, 1e-5),
                4 * x.numel() * item,
                0.0,
            )
            for length in (1024,) if quick else (256, 1024, 8192):
                q = torch.randn(batch, 1, heads, head_dim, device=DEVICE).to(dtype)
                k, v = torch.randn(2, batch, 1, kv_heads, head_dim, device=DEVICE).to(dtype).unbind(0)
                k_cache, v_cache = torch.randn(2, batch, length, kv_heads, head_dim, device=DEVICE).to(dtype).unbind(0)
                positions = torch.full((batch, 1), length - 1, device=DEVICE)
                step = (q, k, v, k_cache, v_cache, positions)
                yield Case(
                    "rope_append",
                    f"{model}, batch {batch}, cache {length}",
                    dtype,
                    partial(rope_append, *step, 1e4),
                    append_baselines(*step, 1e4),
                    (2 * q.numel() + 4 * k.numel()) * item,
                    0.0,
                )
                yield Case(
                    "decode_attention",
                    f"{model}, batch {batch}, cache {length}",
                    dtype,
                    partial(decode_attention, q, k_cache, v_cache, positions),
                    decode_baselines(q, k_cache, v_cache, positions),
                    (2 * k_cache.numel() + 2 * q.numel()) * item,
                    4.0 * batch * heads * head_dim * length,
                )
            for rows, columns in ((hidden, width), (width, hidden)):
                for kind in ("int4", "int8"):
                    packed = pack_weight(torch.randn(rows, columns, device=DEVICE), kind)
                    assert packed.scales is not None
                    inputs = torch.randn(batch, columns, device=DEVICE).to(dtype)
                    yield Case(
                        "weight_matmul",
                        f"{model}, {kind} [{rows}, {columns}], batch {batch}",
                        dtype,
                        partial(weight_matmul, inputs, packed),
                        linear_baselines(inputs, packed),
                        packed.codes.numel() + 2 * packed.scales.numel() + (inputs.numel() + batch * rows) * item,
                        2.0 * batch * rows * columns,
                    )


CASES = {"attention": attention_cases, "experts": experts_cases, "decode": decode_cases}


def check_parity(only: tuple[str, ...], quick: bool) -> list[str]:
    """The two-times rule on the benchmark's own shapes: the failures, each with its numbers."""
    import torch

    from tests.parity import assert_parity

    epsilon = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
    problems = []
    for op in only:
        for dtype in epsilon:
            for case in CASES[op](dtype, True):
                name = {"varlen_tile_attention": "sdpa loop", "grouped_experts": "eager loop"}.get(case.op, "torch eager")
                if name not in case.baselines:
                    continue
                eager, ours = (_first(case.baselines[name]()()), _first(case.run()))
                reference = _first(_in_double(case))
                try:
                    assert_parity(ours, eager, eager if reference is None else reference, epsilon=4 * epsilon[dtype])
                except AssertionError as error:
                    problems.append(f"{case.op} {case.shape} {dtype}: {error}")
                again = _first(case.run())
                if not torch.equal(again, ours):
                    problems.append(f"{case.op} {case.shape} {dtype}: a second run gives other bits")
                if quick:
                    break
    return problems


def _in_double(case: Case) -> Any:
    """The definition on the same numbers in float64, from what the case's own call holds; None where it has no such form."""
    from rsvlm_infer.ops import decode_attention, grouped_experts, varlen_tile_attention

    held = case.run.args
    if case.op == "varlen_tile_attention":
        q, k, v, cu = held
        return varlen_tile_attention.varlen_tile_attention(q.double(), k.double(), v.double(), cu)
    if case.op == "grouped_experts":
        x, expert_offsets, permutation, weights, *matrices = held
        return grouped_experts.grouped_experts(
            x.double(), expert_offsets, permutation, weights, *(part.double() for part in matrices)
        )
    if case.op == "decode_attention":
        q, k_cache, v_cache, positions = held
        return decode_attention.decode_attention(q.double(), k_cache.double(), v_cache.double(), positions)
    return None


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def candidates(op: str) -> Iterator[tuple[str, Any, str]]:
    """(module, configuration, text) of everything that is tried besides what is shipped."""
    from rsvlm_infer.kernels.triton.configs import Config

    if op == "attention":
        for rows, columns, warps, stages in (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
        ):  # fmt: skip
            config = Config(rows, columns, 0, warps, stages)
            yield "attention_config", config, f"{rows}x{columns} {warps} warps {stages} stages"
    elif op == "experts":
        for rows, columns, depth, warps, stages in (
            (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3),
        ):  # fmt: skip
            up, down = Config(rows, columns, depth, warps, stages), Config(rows, min(128, 2 * columns), depth, warps, stages)
            yield "experts_config", (up, down), f"{rows}x{columns}x{depth} {warps} warps {stages} stages"


@contextlib.contextmanager
def configured(name: str, config: Any) -> Iterator[None]:
    """Inside, launches use `config` in the place of the shipped one."""
    from rsvlm_infer.kernels.triton import grouped_experts, varlen_tile_attention

    module: Any = varlen_tile_attention if name == "attention_config" else grouped_experts
    shipped = getattr(module, name)
    setattr(module, name, lambda *_: config)
    try:
        yield
    finally:
        setattr(module, name, shipped)


def measure_case(clock: Clock, op: str, case: Case) -> Iterator[Row]:
    """Rows of one case: ours as shipped (as a graph too for decode), then the best candidate, each against every baseline."""
    import torch
    import triton

    limit_ms = case.bytes_moved / clock.bandwidth * 1e3
    limit = "bandwidth"
    if case.flop / clock.rates[case.dtype] * 1e3 > limit_ms:
        limit, limit_ms = "matrix rate", case.flop / clock.rates[case.dtype] * 1e3
    ours: list[tuple[str, str, tuple[float, float, float]]] = [("triton", "shipped", clock.measure(case.run))]
    if op == "decode":
        ours.append(("triton in a CUDA graph", "shipped", clock.measure(clock.captured(case.run))))
    tried = []
    if case.dtype != torch.float32 and case.op != "route":
        for name, config, text in candidates(op):
            with configured(name, config), contextlib.suppress(Exception):  # a block that this chip cannot hold
                tried.append(("triton", text, clock.measure(case.run)))
    if tried:
        ours.append(min(tried, key=lambda entry: entry[2][0]))
    theirs: dict[str, tuple[float, str]] = {}
    for name, maker in case.baselines.items():
        try:
            theirs[name] = clock.measure(maker())[0], ""
        except Exception as error:  # a baseline that cannot run is a row with its reason, not the end of the suite
            theirs[name] = float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:160]
            torch.cuda.synchronize()
    for implementation, config, (median, low, high) in ours:
        for name, (other, note) in theirs.items():
            yield {
                "date": dt.datetime.now(dt.UTC).date().isoformat(),
                "device": clock.device,
                "torch": torch.__version__,
                "triton": triton.__version__,
                "op": case.op,
                "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "implementation": implementation,
                "config": config,
                "baseline": name,
                "milliseconds": f"{median:.4f}",
                "p20": f"{low:.4f}",
                "p80": f"{high:.4f}",
                "baseline_milliseconds": f"{other:.4f}",
                "ratio": f"{other / median:.3f}",
                "limit": limit,
                "share_of_limit": f"{limit_ms / median:.3f}",
                "note": note,
            }


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when parity fails (the timings are still taken), 2 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-suite.csv"), help="CSV file, overwritten")
    parser.add_argument("--only", choices=OPS, nargs="+", default=list(OPS), help="a part of it")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"), default=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--no-parity", action="store_true", help="timings only")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        print("gpu_suite needs torch with CUDA, and torch is not installed", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "gpu_suite needs a CUDA device and this machine has none; benchmarks/compile_gates.py needs none", file=sys.stderr
        )
        return 2
    from rsvlm_infer.kernels.triton.launch import interpreting, triton_why_not

    reason = "TRITON_INTERPRET is set" if interpreting() else triton_why_not()
    if reason is not None:
        print(f"gpu_suite needs Triton: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, ours is exact too
    only = tuple(options.only)
    with torch.inference_mode():
        problems = [] if options.no_parity else check_parity(only, options.quick)
        print("\n".join(problems) if problems else "parity not asked for" if options.no_parity else "parity holds", flush=True)
        clock = Clock(options.quick)
        rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.0f} T/s" for dtype, rate in clock.rates.items())
        print(f"{clock.device}: copy {clock.bandwidth / 1e12:.2f} TB/s, matrix products {rates}", flush=True)
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for op in only:
                for dtype in options.dtypes:
                    for case in CASES[op](getattr(torch, dtype), options.quick):
                        for row in measure_case(clock, op, case):
                            writer.writerow(row)
                            file.flush()
                            print(" | ".join(row[column] for column in PRINTED), flush=True)
                        torch.compiler.reset()
                        torch.cuda.empty_cache()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
