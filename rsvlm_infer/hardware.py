"""What this machine can do, asked once: CPU, memory, native extension, optional libraries, GPUs. Knows no model and no op.

Nothing heavy is imported to find out: libraries are looked up, not loaded, and torch only when GPUs are asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# import name -> names it may be installed under (the first that is found gives the version)
LIBRARIES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "PIL": ("pillow",),
    "safetensors": ("safetensors",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
    "triton": ("triton",),
    "rasterio": ("rasterio",),
    "gguf": ("gguf",),
    "transformers": ("transformers",),
    "pycocoevalcap": ("pycocoevalcap",),
    "matplotlib": ("matplotlib",),
    "jinja2": ("jinja2",),
    "fastapi": ("fastapi",),
    "ray": ("ray",),
}

# The flags that a kernel of this project could care about, in Linux's spelling.
_X86_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
)
_AMX_FLAGS = ("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
_ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as torch reports it."""

    name: str
    memory_bytes: int
    capability: str  # "9.0"


@dataclass(frozen=True)
class Hardware:
    """One machine. `native` is what rsvlm_infer._C was built with, or None and `native_why_not` says why it is absent."""

    cpu: str
    cores: int  # usable by this process
    flags: tuple[str, ...]
    memory_bytes: int  # 0 when the system does not tell
    system: str
    python: str
    native: dict[str, str | bool | int] | None
    native_why_not: str | None
    libraries: dict[str, str | None]  # import name -> version, None = not installed
    gpus: tuple[Gpu, ...] | None  # None = not asked

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@cache
def probe(*, gpu: bool = False) -> Hardware:
    """This machine, looked at once per process. `gpu=True` also asks torch for CUDA devices, which loads torch."""
    reason = native_why_not()
    return Hardware(
        cpu=_cpu_name(),
        cores=usable_cores(),
        flags=_cpu_flags(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        native=None if reason else _extension().build_info(),
        native_why_not=reason,
        libraries={name: library_version(name) for name in LIBRARIES},
        gpus=_gpus() if gpu else None,
    )


@cache
def native_why_not() -> str | None:
    """Why `rsvlm_infer._C` cannot be used here; None when it can."""
    try:
        _extension()
    except ImportError as error:
        return f"rsvlm_infer._C cannot be imported ({error}); install a C++17 compiler and reinstall rsvlm-infer"
    return None


def library_version(name: str) -> str | None:
    """Installed version of a library by its import name, None when absent, "unknown" without metadata. Imports nothing."""
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a half-removed package
        found = False
    if not found:
        return None
    for distribution in LIBRARIES.get(name, (name,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_threads() -> int:
    """Threads for the work of one process: what OMP_NUM_THREADS says, as for the numeric libraries, else every usable core."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list holds one number for each nested level
    return min(int(first), usable_cores()) if first.isdecimal() and int(first) > 0 else usable_cores()


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes; 0 when the system does not tell.

    VmHWM comes first: ru_maxrss survives exec, so a small child of a large parent would report the parent's size.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _extension() -> Any:
    return importlib.import_module("rsvlm_infer._C")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _cpu_flags() -> tuple[str, ...]:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return tuple(flag for flag in (*_X86_FLAGS, *_AMX_FLAGS, *_ARM_FLAGS) if flag in present)
    return ()


def _memory_bytes() -> int:
    """Memory of the machine or of this container, the smaller of both."""
    total = 0
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        return min(total, int(limit)) if total else int(limit)
    return total


def _gpus() -> tuple[Gpu, ...]:
    if library_version("torch") is None:
        return ()
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        return ()
    found = []
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        found.append(Gpu(properties.name, int(properties.total_memory), f"{properties.major}.{properties.minor}"))
    return tuple(found)
