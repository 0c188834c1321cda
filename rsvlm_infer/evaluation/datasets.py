"""Readers of labelled sets as they lie on disk: RSICD's captions.json, one folder per class, RSVQA's JSON triples.

Owns formats only: no image is opened here and no metric is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")

# RSICD's folder names as a person would say them, for classification by text.
RSICD_THEMES: dict[str, str] = {
    "airport": "airport",
    "bareland": "bare land",
    "baseballfield": "baseball field",
    "beach": "beach",
    "bridge": "bridge",
    "center": "center",
    "church": "church",
    "commercial": "commercial area",
    "denseresidential": "dense residential area",
    "desert": "desert",
    "farmland": "farmland",
    "forest": "forest",
    "industrial": "industrial area",
    "meadow": "meadow",
    "mediumresidential": "medium residential area",
    "mountain": "mountain",
    "park": "park",
    "parking": "parking lot",
    "playfields": "playground",
    "pond": "pond",
    "port": "port",
    "railwaystation": "railway station",
    "resort": "resort",
    "river": "river",
    "school": "school",
    "sparseresidential": "sparse residential area",
    "square": "square",
    "stadium": "stadium",
    "storagetanks": "storage tanks",
    "viaduct": "viaduct",
}


@dataclass(frozen=True)
class CaptionedImage:
    """One RSICD image: its theme and its reference sentences."""

    path: Path
    theme: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class LabelledImage:
    """One image whose class is the name of its folder."""

    path: Path
    label: str


@dataclass(frozen=True)
class Question:
    """One question on one image; `kind` is the set's own word (RSVQA: presence, count, comp, area, rural_urban), `key` its name."""

    path: Path
    kind: str
    question: str
    answer: str
    key: str = ""


def read_rsicd(folder: Path, split: str) -> list[CaptionedImage]:
    """Images of one split, in the order of captions.json, which may itself be named; paths are not checked.

    Raises:
        InputError: captions.json is missing, not RSICD's format, or lacks the split.
    """
    file = Path(folder) if Path(folder).is_file() else Path(folder) / "captions.json"
    entries = read_json(file)
    try:
        splits = sorted({entry["split"] for entry in entries})
        images = [
            CaptionedImage(file.parent / "images" / entry["filename"], entry["theme"], tuple(entry["captions"]))
            for entry in entries
            if entry["split"] == split
        ]
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{file} must be a list of {{filename, split, theme, captions}}, got {error!r}; restore the file"
        ) from None
    if not images:
        raise InputError(f"split must be one of {splits} in {file}, got {split!r}; choose one of them")
    return images


def read_class_folders(folder: Path) -> list[LabelledImage]:
    """Images below one sub-folder per class, sorted by class and file name.

    Raises:
        InputError: the folder has no class folder with an image.
    """
    images = [
        LabelledImage(path, path.parent.name)
        for path in sorted(Path(folder).glob("*/*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not images:
        raise InputError(f"folder must hold one sub-folder of images per class, found no image in {folder}; check the path")
    return images


def read_rsvqa(folder: Path, splits: Sequence[str] = ("train", "val", "test", "test_phili")) -> list[Question]:
    """Questions of RSVQA-LR or RSVQA-HR (the folder with `*_split_*_questions.json`), by split, image and question id.

    Ids are the positions in the full lists, with stubs {id, active: false} for what other splits hold. Entries are found by their
    `id`, never by position: cut-down copies of the set keep the ids but not the stubs. Where the images file lies beside, a question
    on an image that it does not list as active is damage.

    Raises:
        InputError: no split's files are there, or they are damaged.
    """
    folder = Path(folder)
    images_folder = next(
        (path for path in (folder / "Images_LR", folder / "Images" / "Data", folder / "Data") if path.is_dir()), None
    )
    if images_folder is None:
        raise InputError(f"folder must hold RSVQA's Images_LR or Images/Data, found neither in {folder}; check the path")
    questions: list[Question] = []
    for split in splits:
        for file in sorted(folder.glob(f"*_split_{split}_questions.json")):
            answers_file = file.with_name(file.name.replace("_questions", "_answers"))
            images_file = file.with_name(file.name.replace("_questions", "_images"))
            try:
                answers = {item["id"]: item for item in _active(read_json(answers_file)["answers"])}
                found = _active(read_json(file)["questions"])
                if images_file.is_file():
                    listed = {item["id"] for item in _active(read_json(images_file)["images"])}
                    if unlisted := sorted({item["img_id"] for item in found} - listed):
                        raise KeyError(f"img_id {unlisted[0]}")
                questions += [
                    Question(
                        images_folder / f"{item['img_id']}.tif",
                        item["type"],
                        item["question"],
                        str(answers[item["answers_ids"][0]]["answer"]),
                        f"{split}/{item['id']}",
                    )
                    for item in sorted(found, key=lambda item: (item["img_id"], item["id"]))
                ]
            except (TypeError, KeyError, IndexError) as error:
                raise InputError(
                    f"{file} and {answers_file.name} must be RSVQA's JSON, got {error!r}; restore the files"
                ) from None
    if not questions:
        raise InputError(
            f"folder must hold RSVQA's *_split_*_questions.json of {list(splits)}, found none in {folder}; check the path"
        )
    return questions


def class_words(name: str) -> str:
    """`AnnualCrop` and `dense_residential` as words."""
    spaced = "".join(f" {letter}" if letter.isupper() else letter for letter in name.replace("_", " "))
    return " ".join(spaced.lower().split())


def _active(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for item in items if item.get("active")]


def read_json(file: Path) -> Any:
    """The values of a JSON file.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the folder of the set") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); pass a file of the set") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not JSON ({error}); restore the file") from None
