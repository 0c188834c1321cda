"""What one process pays for a native package: time to load it, peak memory with one caption. Prints JSON; imports no torch.

    python -m benchmarks.package_load PACKAGE scene.jpg

The file is taken to be in the system's page cache. `cpu` is the process's CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rsvlm_infer import RSVLM
from rsvlm_infer.backends.native import NativeBackend


def status_mb(name: str) -> float:
    """A number of /proc/self/status, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def main() -> None:
    package, image = Path(sys.argv[1]), Path(sys.argv[2])
    found = {"imported_rss_mb": status_mb("VmHWM")}
    NativeBackend.load(package, verify=False)
    start, start_cpu = time.perf_counter(), time.process_time()
    model = RSVLM.from_pretrained(package)
    found |= {"load_s": time.perf_counter() - start, "load_cpu_s": time.process_time() - start_cpu}
    found["loaded_rss_mb"] = status_mb("VmHWM")
    model.caption(image)
    found["peak_rss_mb"] = status_mb("VmHWM")
    found["anonymous_mb"] = status_mb("RssAnon")
    assert "torch" not in sys.modules
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
