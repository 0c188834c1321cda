"""hardware: what is found must be true, and nothing heavy may be loaded to find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from rsvlm_infer import hardware


def test_probe_describes_this_machine() -> None:
    found = hardware.probe()
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_bytes == 0 or found.memory_bytes > 1 << 28
    assert found.libraries["numpy"] == np.__version__
    assert found.gpus is None
    assert (found.native is None) == (found.native_why_not is not None)
    assert json.loads(json.dumps(found.to_dict()))["python"] == found.python
    assert hardware.probe() is found


def test_native_build_is_described() -> None:
    if reason := hardware.native_why_not():
        pytest.skip(reason)
    native = hardware.probe().native
    assert native is not None
    assert native["isa"] in ("avx512", "avx2", "baseline")
    assert isinstance(native["openmp"], bool)
    assert int(native["num_threads"]) >= 1


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rsvlm_infer._C", None)
    hardware.native_why_not.cache_clear()
    hardware.probe.cache_clear()
    try:
        found = hardware.probe()
        assert found.native is None
        assert found.native_why_not is not None
        assert "install a C++17 compiler" in found.native_why_not
    finally:
        hardware.native_why_not.cache_clear()
        hardware.probe.cache_clear()


def test_library_version_of_absent_and_undocumented_modules() -> None:
    assert hardware.library_version("no_such_library") is None
    assert hardware.library_version("json") == "unknown"


def test_probe_loads_no_heavy_library() -> None:
    code = (
        "import sys; from rsvlm_infer.hardware import probe; probe();"
        "print([m for m in ('torch', 'onnxruntime', 'rasterio', 'tensorrt', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gpus_are_asked_of_torch_only_on_request() -> None:
    gpus = hardware.probe(gpu=True).gpus
    assert isinstance(gpus, tuple)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert len(gpus) == torch.cuda.device_count()


def test_gpus_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "library_version", lambda name: None)
    assert hardware._gpus() == ()


def test_gpu_properties_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "A GPU", 8 << 30, 9, 0

    class Cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda index: Properties)

    class Torch:
        cuda = Cuda

    monkeypatch.setattr(hardware.importlib, "import_module", lambda name: Torch)
    monkeypatch.setattr(hardware, "library_version", lambda name: "2.13.0")
    assert hardware._gpus() == (hardware.Gpu("A GPU", 8 << 30, "9.0"),)


def test_peak_rss_holds_the_largest_moment() -> None:
    slack = 2 << 20  # the kernel sums per-CPU counters lazily
    before = hardware.peak_rss_bytes()
    block = np.ones(8_000_000, dtype=np.float64)  # 64 MB, touched
    after = hardware.peak_rss_bytes()
    assert before > 10 << 20
    assert after >= max(before, block.nbytes) - slack
    del block
    assert hardware.peak_rss_bytes() >= after - slack


def test_systems_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: "")
    assert hardware._cpu_name()
    assert hardware._cpu_flags() == ()
    assert hardware._memory_bytes() == 0
    assert hardware.peak_rss_bytes() > 10 << 20
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert hardware.usable_cores() == (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("variable", "threads"),
    [(None, 6), ("", 6), ("1", 1), (" 4 ", 4), ("2,3", 2), ("64", 6), ("0", 6), ("-1", 6), ("many", 6)],
)
def test_threads_are_those_of_the_numeric_libraries(
    variable: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "usable_cores", lambda: 6)
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert hardware.num_threads() == threads


def test_container_limit_and_arm_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:       1000 kB\n",
        "/sys/fs/cgroup/memory.max": "4096\n",
        "/proc/cpuinfo": "Features\t: fp asimd asimddp sve crc32\nModel\t\t: Jetson\n",
    }
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(path, ""))
    assert hardware._memory_bytes() == 4096
    assert hardware._cpu_flags() == ("asimd", "asimddp", "sve")
    assert hardware._cpu_name() == "Jetson"
