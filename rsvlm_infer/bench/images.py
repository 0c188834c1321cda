"""Which images a run measures, and what is known about them. Knows folders and wheels; opens no image and knows no model.

In order: the folder that the user names, RSICD from the shared data folder when there is one, else the RSVQA scenes inside the
wheel `configilm`, which pip can fetch on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..evaluation.datasets import (
    IMAGE_SUFFIXES,
    RSICD_THEMES,
    Question,
    class_words,
    read_class_folders,
    read_rsicd,
    read_rsvqa,
)


@dataclass(frozen=True)
class Sample:
    """One image with whatever truth there is: class, sentences, questions."""

    name: str
    path: Path
    label: str | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """Images in the order of measurement. `labels`: class -> the words that describe it."""

    name: str
    source: str
    samples: tuple[Sample, ...]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Short hash of names in order, file lengths, labels, sentences and questions: equal digests are the same work.

        Paths are left out, so that the same set in another place still compares.
        """
        samples = [
            [
                sample.name,
                sample.path.stat().st_size,
                sample.label,
                sample.captions,
                [[question.kind, question.question, question.answer] for question in sample.questions],
            ]
            for sample in self.samples
        ]
        return hashlib.sha256(json.dumps([samples, list(self.labels.items())]).encode()).hexdigest()[:16]

    def limited(self, limit: int | None, seed: int) -> ImageSet:
        """At most `limit` images in a seeded random order."""
        order = list(self.samples)
        random.Random(seed).shuffle(order)
        return ImageSet(self.name, self.source, tuple(order[:limit]), self.labels)


def shared_folder() -> Path | None:
    """The data folder named by RSVLM_DATA, or `../shared/data` seen from here; None when neither is there.

    Raises:
        InputError: RSVLM_DATA names no folder.
    """
    named = os.environ.get("RSVLM_DATA")
    if named:
        if not Path(named).is_dir():
            raise InputError(f"RSVLM_DATA must name a folder, got {named!r}; correct or unset it")
        return Path(named)
    sibling = Path.cwd().parent / "shared" / "data"
    return sibling if sibling.is_dir() else None


def choose_images(
    folder: Path | None, *, split: str, questions_per_image: int, seed: int, fetch_rsvqa: Callable[[], Path]
) -> ImageSet:
    """The images of a run; `fetch_rsvqa` is called for the fallback only and gives the folder that holds RSVQA-LR and RSVQA-HR.

    Raises:
        InputError: the folder holds no image or a damaged set.
    """
    if folder is not None:
        return _from_folder(folder, split)
    shared = shared_folder()
    if shared is not None and (shared / "rsicd" / "captions.json").is_file():
        return rsicd_images(shared / "rsicd", split)
    return rsvqa_images(fetch_rsvqa(), questions_per_image, seed)


def rsicd_images(folder: Path, split: str) -> ImageSet:
    """RSICD's images of one split that are on this disk."""
    images = [image for image in read_rsicd(folder, split) if image.path.is_file()]
    if not images:
        raise InputError(f"the images of RSICD's split {split!r} must lie in {folder / 'images'}, found none; restore them")
    samples = tuple(Sample(image.path.name, image.path, image.theme, image.captions) for image in images)
    themes = sorted({image.theme for image in images})
    labels = RSICD_THEMES if set(themes) <= RSICD_THEMES.keys() else {theme: theme for theme in themes}
    return ImageSet(f"RSICD {split}", str(folder), samples, dict(labels))


def rsvqa_images(folder: Path, questions_per_image: int, seed: int) -> ImageSet:
    """RSVQA's low- and high-resolution scenes with a seeded choice of their questions."""
    samples: list[Sample] = []
    for part in ("LR", "HR"):
        by_image: dict[Path, list[Question]] = {}
        for question in read_rsvqa(folder / f"RSVQA-{part}"):
            by_image.setdefault(question.path, []).append(question)
        for path, questions in by_image.items():
            draw = random.Random(f"{seed} {part} {path.name}")
            chosen = draw.sample(questions, min(questions_per_image, len(questions)))
            samples.append(Sample(f"RSVQA-{part}/{path.name}", path, questions=tuple(chosen)))
    return ImageSet("RSVQA LR+HR", str(folder), tuple(samples))


def _from_folder(folder: Path, split: str) -> ImageSet:
    if not folder.is_dir():
        raise InputError(f"--images must name a folder, got {str(folder)!r}; check the path")
    if (folder / "captions.json").is_file():
        return rsicd_images(folder, split)
    flat = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if flat:
        return ImageSet(folder.name, str(folder), tuple(Sample(path.name, path) for path in flat))
    images = read_class_folders(folder)
    samples = tuple(Sample(f"{image.label}/{image.path.name}", image.path, image.label) for image in images)
    return ImageSet(
        folder.name, str(folder), samples, {label: class_words(label) for label in sorted({image.label for image in images})}
    )
