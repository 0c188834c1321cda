"""RSICD as the recipe reads it: tidy sentences and pixels. Knows where the files are, nothing of models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from rsvlm_infer.evaluation.datasets import CaptionedImage, read_rsicd


def read_split(split: str) -> list[CaptionedImage]:
    """Images of "train", "val" or "test", from RSVLM_DATA or shared/data beside the repository."""
    root = Path(os.environ.get("RSVLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    return read_rsicd(root / "rsicd", split)


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """[H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def distinct_captions(captions: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each distinct sentence, tidied, with how often it was given."""
    counts: dict[str, int] = {}
    for caption in captions:
        text = " ".join(caption.replace(" .", ".").replace(" ,", ",").split())
        text = text if text.endswith(".") else text + "."
        text = text[:1].upper() + text[1:]
        counts[text] = counts.get(text, 0) + 1
    return list(counts.items())
