"""What of the GPU suite can be held without a GPU: its help, its refusal, and that its baselines compute the same thing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsvlm_infer.ops.route import route
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from tests.kernels.triton_cases import prefix_sums, random_tensor


def _suite(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu_suite.py", *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_it_explains_itself_and_says_that_it_needs_a_gpu(repository: Path) -> None:
    assert "named baselines" in _suite(repository, "--help").stdout
    refused = _suite(repository)
    assert refused.returncode == 2
    assert "needs a CUDA device" in refused.stderr


def test_attention_baselines_equal_the_definition(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from benchmarks.gpu_baselines import attention_baselines

    lengths = [16, 64, 5, 16]
    cu_seqlens = prefix_sums(lengths)
    q, k, v = (random_tensor(seed, sum(lengths), 2, 32) for seed in range(3))
    expected = varlen_tile_attention(q, k, v, cu_seqlens)
    makers = attention_baselines(q, k, v, cu_seqlens, lengths)
    for name in ("sdpa loop", "sdpa padded", "sdpa bucketed"):
        torch.testing.assert_close(makers[name]()(), expected, atol=2e-6, rtol=1e-5)


def test_experts_baselines_equal_the_definition(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from benchmarks.gpu_baselines import experts_baselines

    routed = route(random_tensor(0, 30, 6), prefix_sums([10, 10, 10]), 2)
    x = random_tensor(1, 30, 32, dtype=torch.bfloat16)
    gate, up = (random_tensor(seed, 6, 64, 32, dtype=torch.bfloat16) * 0.2 for seed in (2, 3))
    makers = experts_baselines(x, routed, gate, up, random_tensor(4, 6, 32, 64, dtype=torch.bfloat16) * 0.2)
    torch.testing.assert_close(makers["torch._grouped_mm"]()(), makers["eager loop"]()(), atol=0.02, rtol=0.02)
    assert makers["dense ffn of equal flop"]()().shape == (60, 32)


def test_the_reference_in_double_is_the_definition_on_the_arguments_of_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_suite
    from rsvlm_infer.kernels.triton import route as triton_route

    monkeypatch.setattr(gpu_suite, "DEVICE", "cpu")
    monkeypatch.setattr(triton_route, "route", route)  # routing happens before a case exists
    seen = set()
    for op in gpu_suite.OPS:
        for case in itertools.islice(gpu_suite.CASES[op](torch.float32, True), 3):
            reference = gpu_suite._in_double(case)
            if reference is None or case.op in seen:
                continue
            seen.add(case.op)
            name = {"varlen_tile_attention": "sdpa loop", "grouped_experts": "eager loop"}.get(case.op, "torch eager")
            assert reference.dtype is torch.float64
            torch.testing.assert_close(case.baselines[name]()().double(), reference, atol=1e-4, rtol=1e-4)
    assert seen == {"varlen_tile_attention", "grouped_experts", "decode_attention"}
