"""Importing must be quick and light: an exported package runs on boxes without torch, rasterio or onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "onnxruntime", "rasterio", "tensorrt", "triton", "transformers", "matplotlib", "onnx", "gguf")
TORCH_FREE = (
    "rsvlm_infer",
    "rsvlm_infer.pipeline",
    "rsvlm_infer.cli",
    "rsvlm_infer.bench",
    "rsvlm_infer.pull",
    "rsvlm_infer.tasks",
    "rsvlm_infer.engine",
    "rsvlm_infer.backends",
    "rsvlm_infer.backends.onnx",
    "rsvlm_infer.models.package",
    "rsvlm_infer.contract",
    "rsvlm_infer.backends.native",
    "rsvlm_infer.models.native_package",
    "rsvlm_infer.knowledge",
    "rsvlm_infer.imagery.source",
    "rsvlm_infer.imagery.plan",
    "rsvlm_infer.imagery.pack",
    "rsvlm_infer.text",
    "rsvlm_infer.evaluation",
    "rsvlm_infer.ops.registry",
    "rsvlm_infer.kernels.native.pack_tiles",
    "rsvlm_infer.kernels.native.complexity_map",
    "rsvlm_infer.hardware",
)


def run_python(code: str) -> str:
    """Output of a fresh interpreter, without coverage's hooks."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_less_than_300_ms() -> None:
    code = "import time; t = time.perf_counter(); import rsvlm_infer; print(time.perf_counter() - t)"
    seconds = min(float(run_python(code)) for _ in range(3))
    assert seconds < 0.3


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_loads_nothing_heavy(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded == ""


def test_config_and_planner_need_no_torch() -> None:
    code = "import sys; from rsvlm_infer import RsvlmConfig, RsvlmError, open_scene, plan_scene; print('torch' in sys.modules)"
    assert run_python(code) == "False"
