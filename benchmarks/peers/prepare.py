"""Everything before the clock starts: weights and inputs for the peers, each peer's own format, the program that measures limits.

Made once into a folder and left alone while the checkpoint is the same. Offline; a conversion that fails is a reason, not an exception.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contestants import Entry
from benchmarks.peers.environments import last_error, python_of, read_status
from rsvlm_infer.bench.evaluate import checkpoint_digest
from rsvlm_infer.errors import MissingDependencyError
from rsvlm_infer.evaluation.datasets import read_rsicd

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
HANDOUT_VERSION = 1  # raise it when handout.py writes something else


def prepare_handout(checkpoint: Path, image: Path, folder: Path) -> None:
    """`hf/` and `inputs/`; converted models of another checkpoint are removed with them."""
    stamp = folder / "handout.json"
    wanted = {"checkpoint": checkpoint_digest(checkpoint), "image": str(image.resolve()), "version": HANDOUT_VERSION}
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return
    from benchmarks.peers.handout import write_handout  # loads torch

    print("writing weights and inputs ...", file=sys.stderr, flush=True)
    stamp.unlink(missing_ok=True)
    for part in ("hf", "inputs", "models"):
        shutil.rmtree(folder / part, ignore_errors=True)
    write_handout(checkpoint, image, folder)
    stamp.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def write_caption_list(captions: Path | None, image: Path, folder: Path) -> None:
    """`inputs/captions.json`: pictures whose captions tell what guessed tokens are worth, in an order that has nothing to do with names.

    Args:
        captions: an RSICD folder, whose test split is taken: guesses were trained on the train split; None = the pictures beside `image`.
    """
    if captions is None:
        pictures = sorted(path for path in image.parent.iterdir() if path.suffix == image.suffix)
    else:
        pictures = [item.path for item in read_rsicd(captions, "test")]
    random.Random(0).shuffle(pictures)
    text = json.dumps([str(path.resolve()) for path in pictures])
    (folder / "inputs" / "captions.json").write_text(text + "\n", encoding="utf-8")


def why_not(entry: Entry, folder: Path) -> str | None:
    """Converts the model when it is not there yet; why this peer cannot take part, or None."""
    if entry.environment:
        status = read_status(folder, entry.environment)
        if status is None:
            return (
                f"environment {entry.environment!r} was never installed; run python -m benchmarks.peers.environments {folder}"
            )
        if status["error"]:
            return f"could not be installed: {status['error']}"
    if entry.convert is None or (folder / entry.model).is_dir():
        return None
    return _convert(entry, folder)


def _convert(entry: Entry, folder: Path) -> str | None:
    out, final = folder / "models" / f".{entry.model.name}", folder / entry.model
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    places = {"hf": folder / "hf", "inputs": folder / "inputs", "out": out}
    command = [str(python_of(folder, entry.environment)), "-m", *(part.format(**places) for part in entry.convert or ())]
    print(f"converting {entry.model.name} ...", file=sys.stderr, flush=True)
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    (folder / "models" / f"{entry.model.name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    shutil.rmtree(f"{out}.cache", ignore_errors=True)
    if done.returncode:
        return f"could not be converted: {last_error(done.stderr)}"
    out.rename(final)
    return None


def build_limits(folder: Path) -> Path:
    """The compiled `limits.cpp`.

    Raises:
        MissingDependencyError: no compiler, or one that cannot build it.
    """
    program = folder / "limits"
    source = Path(__file__).with_name("limits.cpp")
    if program.is_file() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    compiler = os.environ.get("CXX", "g++")
    waiting = folder / "limits.new"
    command = [compiler, "-O2", "-std=c++17", "-pthread", str(source), "-o", str(waiting)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingDependencyError(
            f"limits need a C++ compiler, {compiler} does not run ({error}); install g++ or set CXX"
        ) from None
    if done.returncode:
        raise MissingDependencyError(
            f"{compiler} cannot build limits.cpp ({last_error(done.stderr)}); set CXX to g++ 12 or newer"
        )
    waiting.rename(program)
    return program


def measure_limits(program: Path, threads: int) -> dict[str, float]:
    """Operations per second of fp32, bf16 and int8, and bytes per second of `read`; what the CPU lacks is absent."""
    lines = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True).stdout.splitlines()
    return parse_limits(lines)


def parse_limits(lines: Sequence[str]) -> dict[str, float]:
    """`NAME VALUE` lines."""
    return {name: float(value) for name, value in (line.split() for line in lines)}
