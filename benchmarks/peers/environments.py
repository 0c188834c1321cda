"""Makes one virtual environment per peer from PyPI, with pinned versions. Knows no model; what fails is written down, never skipped.

python -m benchmarks.peers.environments FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The libraries under test, and beside them only what their own converters import. torch 2.14 and later pull gigabytes of CUDA packages.
TORCH = "torch==2.13.0"
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "transformers": (TORCH, "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.4.6"),
    "onnxruntime": (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "transformers==5.23.0",
        "safetensors==0.8.0",
        "numpy==2.4.6",
        TORCH,
    ),
    "openvino": (
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "optimum-intel==2.2.0",
        "safetensors==0.8.0",
        "numpy==2.4.6",
        TORCH,
    ),
    # the source distribution, compiled for this machine's CPU: wheels are made for older ones
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
}
# optimum-intel asks for torchvision, whose wheel on PyPI is for CUDA: beside a CPU build of torch it breaks every import of transformers
UNWANTED = {"openvino": ("torchvision",)}
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
STATUS = "installed.json"
LOG = "install.log"


def default_folder() -> Path:
    """Beside the default checkpoint's cache and outside of any source tree."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsvlm-peers"


def python_of(folder: Path, environment: str) -> Path:
    """The interpreter of one environment."""
    return folder / "environments" / environment / "bin" / "python"


def install(folder: Path, environment: str, requirements: Sequence[str]) -> dict[str, Any]:
    """Makes one environment, or leaves it when it holds these versions already.

    Returns:
        requirements, python, seconds, and `error`: None, or pip's own last line that says why it failed.
    """
    home = folder / "environments" / environment
    known = read_status(folder, environment)
    if known is not None and known["error"] is None and known["requirements"] == list(requirements):
        return known
    (home / STATUS).unlink(missing_ok=True)
    if not _has_pip(python_of(folder, environment)):
        venv.create(home, with_pip=True, clear=True)
    started = time.perf_counter()
    with (home / LOG).open("w", encoding="utf-8") as log:
        command = [str(python_of(folder, environment)), "-m", "pip", "install", *requirements]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | BUILD, check=False)
        if done.returncode == 0 and environment in UNWANTED:
            command = [str(python_of(folder, environment)), "-m", "pip", "uninstall", "--yes", *UNWANTED[environment]]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    error = None if done.returncode == 0 else last_error((home / LOG).read_text(encoding="utf-8", errors="replace"))
    status = {
        "requirements": list(requirements),
        "python": sys.version.split()[0],
        "seconds": round(time.perf_counter() - started, 1),
        "error": error,
    }
    waiting = home / f"{STATUS}.new"
    waiting.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
    waiting.rename(home / STATUS)
    return status


def _has_pip(python: Path) -> bool:
    return (
        python.exists()
        and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    )


def read_status(folder: Path, environment: str) -> dict[str, Any] | None:
    """What the last installation left; None when there was none, or it was interrupted."""
    file = folder / "environments" / environment / STATUS
    if not file.is_file():
        return None
    status: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return status


def last_error(log: str) -> str:
    """The last line of pip's output that names an error, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["pip said nothing"])[-1][:300]


def install_all(folder: Path, environments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every named environment, one after another; says on stderr what it does."""
    found = {}
    for environment in environments:
        print(f"installing {environment} ...", file=sys.stderr, flush=True)
        found[environment] = install(folder, environment, REQUIREMENTS[environment])
        error = found[environment]["error"]
        print(f"{environment}: {'ready' if error is None else error}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="where they go; default %(default)s")
    parser.add_argument("--only", nargs="+", choices=sorted(REQUIREMENTS), default=list(REQUIREMENTS), metavar="PEER")
    options = parser.parse_args()
    found = install_all(options.folder.expanduser(), options.only)
    raise SystemExit(int(any(status["error"] for status in found.values())))


if __name__ == "__main__":
    main()
