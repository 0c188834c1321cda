"""Proves that packages run on a box that never had torch: a virtual environment of its own, with the package's own dependencies only.

    python -m tests.torch_free

Exports a tiny checkpoint here, then captions, classifies and embeds with each package there, first with nothing beside the core
dependencies (native), then with onnxruntime too (onnx). Ends in red when torch can be imported there, or an answer differs from eager's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsvlm_export.export import export_checkpoint
from tests.export.packages import SPEAKING, make_pair

REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST_S = 600
VERBS = (
    ["caption", "-f", "json", "--max-new-tokens", "6"],
    ["classify", "-f", "json", "--labels", "river,forest,harbor"],
    ["embed"],
)


class CheckError(Exception):
    """A check that ended in red; the message is its last line."""


def run(program: Path | str, *arguments: str) -> str:
    """What a program prints; it sees this repository by the environment's own path file, not by PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    command = [str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_S)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_box(folder: Path) -> Path:
    """The Python of a new environment that has the core dependencies and this checkout, and nothing else."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *project["dependencies"])
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "checkout.pth").write_text(f"{REPOSITORY}\n", encoding="utf-8")
    for name in ("torch", "onnx", "onnxruntime", "rasterio", "transformers"):
        if run(python, "-c", f"import importlib.util; print(importlib.util.find_spec({name!r}))").strip() != "None":
            raise CheckError(
                f"{name} can be imported in an environment of core dependencies only; the box is no box without torch"
            )
    return python


def answers(python: Path | str, image: Path, folder: Path) -> list[dict[str, Any]]:
    """What each verb says about an image."""
    said = []
    for verb, *options in VERBS:
        output = run(python, "-m", "rsvlm_infer", verb, str(image), "-c", str(folder), *options)
        said.append(json.loads(output.strip().splitlines()[-1]))
    return said


def compare(box: list[dict[str, Any]], eager: list[dict[str, Any]], kind: str) -> None:
    """The same tokens, the same label, and embeddings within float32's rounding."""
    for key, index in (("token_ids", 0), ("label", 1)):
        if not eager[index][key]:
            raise CheckError(f"eager gave no {key}, so equal answers would prove nothing; the tiny checkpoint must speak")
        if box[index][key] != eager[index][key]:
            raise CheckError(f"{kind} without torch: {key} {box[index][key]}, eager {eager[index][key]}")
    worst = float(np.abs(np.subtract(box[2]["embedding"], eager[2]["embedding"])).max())
    if not worst <= 1e-4:
        raise CheckError(f"{kind} without torch: embedding differs from eager's by {worst:.2g}, expected at most 1e-4")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="torch-free-") as name:
        folder = Path(name)
        image = folder / "scene.png"
        pixels = np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        made = make_pair(folder, SPEAKING)
        native = export_checkpoint(made.checkpoint, folder / "native", format="native", precision="fp32")
        try:
            eager = answers(sys.executable, image, made.checkpoint)
            python = make_box(folder / "box")
            compare(answers(python, image, native), eager, "native")
            print("native: answers of eager with the core dependencies alone")
            run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "onnxruntime")
            compare(answers(python, image, made.package), eager, "onnx")
            print("onnx: answers of eager with onnxruntime beside them")
        except CheckError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
