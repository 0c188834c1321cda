"""The training sets and how their images are varied. Knows files and pixels, nothing of models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from rsvlm_infer.evaluation.datasets import (
    CaptionedImage,
    LabelledImage,
    Question,
    class_words,
    read_class_folders,
    read_rsicd,
    read_rsvqa,
)
from rsvlm_infer.imagery.source import open_scene


def data_folder() -> Path:
    """RSVLM_DATA, or shared/data beside the repository."""
    return Path(os.environ.get("RSVLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def read_split(split: str) -> list[CaptionedImage]:
    """RSICD's images of "train", "val" or "test"."""
    return read_rsicd(data_folder() / "rsicd", split)


@dataclass(frozen=True)
class Labelled:
    """A set with one folder per class: its images, the class of each, and the classes as words."""

    images: list[LabelledImage]
    classes: list[int]
    words: list[str]


def read_labelled(name: str, split: str = "train") -> Labelled:
    """ "eurosat" or "rsscn7"."""
    images = read_class_folders(data_folder() / name / split)
    labels = sorted({image.label for image in images})
    return Labelled(images, [labels.index(image.label) for image in images], [class_words(label) for label in labels])


def read_questions(split: str) -> list[Question]:
    """RSVQA-LR's questions of "train", "val" or "test", from RSVLM_RSVQA, or rsvqa beside the other sets; none there, none read."""
    folder = Path(os.environ.get("RSVLM_RSVQA", data_folder() / "rsvqa"))
    return read_rsvqa(folder, [split]) if folder.is_dir() else []


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """[H, W, 3]."""
    if path.suffix == ".tif":
        with open_scene(path) as scene:
            return scene.read(0, 0, scene.height, scene.width)[0]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def varied(image: npt.NDArray[np.uint8], pixels: int, rng: np.random.Generator, least: float) -> npt.NDArray[np.uint8]:
    """A random window of at least `least` of the area, any of the eight orientations, a little light: [pixels, pixels, 3]."""
    height, width = image.shape[:2]
    side = float(np.sqrt(rng.uniform(least, 1.0))) if rng.random() < 0.8 else 1.0
    rows, columns = height * side, width * side
    top, left = rng.uniform(0, height - rows), rng.uniform(0, width - columns)
    window = Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BICUBIC, (left, top, left + columns, top + rows))
    turned = np.rot90(np.asarray(window), int(rng.integers(4)))
    if rng.random() < 0.5:
        turned = turned[:, ::-1]
    if rng.random() < 0.5:
        gain, shift = rng.uniform(0.85, 1.15), rng.uniform(-15, 15)
        turned = np.clip(turned * gain + shift, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(turned)


def tidied(caption: str) -> str:
    """RSICD's sentence as a person would type it."""
    text = " ".join(caption.replace(" .", ".").replace(" ,", ",").split())
    text = text if text.endswith(".") else text + "."
    return text[:1].upper() + text[1:]
