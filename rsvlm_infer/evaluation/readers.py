"""Readers of public annotation files: Karpathy-style captions, NWPU-Captions, instruction lists, GeoChat-Bench, released answers.

Owns formats only: no image is opened here and no metric is known. RSICD's own file, class folders and RSVQA are in `datasets`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .datasets import IMAGE_SUFFIXES, CaptionedImage, Question, read_json

NWPU_SENTENCES = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")
_IMAGE_FOLDERS = ("images", "Images", "imgs", "NWPU_images", ".")
_IMAGE_MARK = re.compile(r"<image>|<image_placeholder>")
_TASK_MARK = re.compile(r"^\s*\[(\w[\w -]*)\]\s*")  # VRSBench and GeoChat begin a turn with [caption], [vqa], [refer], ...


@dataclass(frozen=True)
class AnsweredItem:
    """A released answer of some model beside its truth; there is no image."""

    key: str
    question: str
    answer: str
    truths: tuple[str, ...]


def read_karpathy(file: Path, split: str, images: Path | None = None) -> list[CaptionedImage]:
    """One split of {"images": [{filename, split, sentences: [{raw}]}]}, as of RSICD, UCM, Sydney and RSITMD. Themes are "".

    Raises:
        InputError: the file is missing or of another format, or lacks the split.
    """
    try:
        entries = read_json(file)["images"]
        splits = sorted({str(entry["split"]) for entry in entries})
        found = [
            (entry["filename"], tuple(sentence["raw"] for sentence in entry["sentences"]))
            for entry in entries
            if entry["split"] == split
        ]
    except (TypeError, KeyError) as error:
        raise _format_error(file, '{"images": [{filename, split, sentences: [{raw}]}]}', error) from None
    require_split(file, split, splits)
    root = image_root(file, images, found[0][0])
    return [CaptionedImage(image_path(root, name), "", captions) for name, captions in found]


def read_nwpu(file: Path, split: str, images: Path | None = None) -> list[CaptionedImage]:
    """One split of NWPU-Captions: {class: [{filename, split, raw, raw_1, ..., raw_4}]}; images lie in a folder per class.

    Raises:
        InputError: the file is missing or of another format, or lacks the split.
    """
    values = read_json(file)
    try:
        splits = sorted({str(entry["split"]) for entries in values.values() for entry in entries})
        found = [
            (f"{name}/{entry['filename']}", name, tuple(entry[key] for key in NWPU_SENTENCES if key in entry))
            for name, entries in values.items()
            for entry in entries
            if entry["split"] == split
        ]
    except (AttributeError, TypeError, KeyError) as error:
        raise _format_error(file, "{class: [{filename, split, raw, raw_1, ...}]}", error) from None
    require_split(file, split, splits)
    root = image_root(file, images, found[0][0])
    return [CaptionedImage(image_path(root, path), theme, captions) for path, theme, captions in found]


def read_instructions(file: Path, images: Path | None = None) -> list[Question]:
    """Questions of a LLaVA-style list [{id, image, conversations: [{from, value}]}], as of RS-GPT4V, GeoChat-Instruct and VRSBench.

    Each pair of turns is one question; its kind is the mark in front, as in "[vqa] ...". VRSBench's evaluation files, which are lists
    of {image_id, question, ground_truth, type}, are read too. Entries without an image are left out.

    Raises:
        InputError: the file is missing or of another format, or no entry has an image.
    """
    expected = "a list of {id, image, conversations: [{from, value}]} or of {image_id, question, ground_truth}"
    entries = read_json(file)
    found: list[tuple[str, str, str, str, str]] = []  # image, kind, question, answer, key
    try:
        for index, entry in enumerate(entries):
            if "conversations" not in entry:
                found.append(_flat_question(entry, index))
            elif entry.get("image"):
                turns = entry["conversations"]
                for turn in range(0, len(turns) - 1, 2):
                    asked, kind = _plain_question(turns[turn]["value"])
                    key = f"{entry.get('id', index)}#{turn // 2}"
                    found.append((_image_name(entry["image"]), kind, asked, str(turns[turn + 1]["value"]), key))
    except (AttributeError, TypeError, KeyError) as error:
        raise _format_error(file, expected, error) from None
    if not found:
        raise InputError(f"{file} must hold an entry with an image and a question, found none; it must be {expected}")
    return _questions(file, images, found)


def read_geochat_bench(file: Path, images: Path | None = None) -> list[Question]:
    """Questions of a GeoChat-Bench file: one {question_id, image, text, category?, ground_truth?} on each line.

    A scene's class is the folder of its question_id, as GeoChat's own evaluation takes it: aid.jsonl's `ground_truth` is damaged.

    Raises:
        InputError: the file is missing, damaged, or without answers, as lrben.jsonl and hrben.jsonl are.
    """
    found = []
    for index, entry in enumerate(read_lines(file)):
        try:
            identity = str(entry.get("question_id", index))
            if "/" in identity:
                entry = {**entry, "ground_truth": identity.split("/")[0], "category": entry.get("category") or "scene"}
            if "ground_truth" not in entry and "answer" not in entry:
                raise InputError(
                    f"{file} line {index + 1} has no ground_truth; for RSVQA, which GeoChat-Bench publishes without answers, read "
                    "RSVQA's own folder with --reader rsvqa"
                )
            found.append(_flat_question(entry, index))
        except (AttributeError, TypeError, KeyError) as error:
            raise _format_error(file, "lines of {question_id, image, text, ground_truth}", error) from None
    return _questions(file, images, found)


def read_answered(file: Path) -> list[AnsweredItem]:
    """Released answers: one {question?, answer, annotation} or {question?, answer, caption0, caption1, ...} on each line.

    Raises:
        InputError: the file is missing or of another format.
    """
    items = []
    for index, entry in enumerate(read_lines(file)):
        try:
            captions = [entry[key] for key in sorted(entry) if re.fullmatch(r"caption\d+", key)]
            truths = tuple(captions) if captions else (entry["annotation"],)
            items.append(AnsweredItem(str(index + 1), str(entry.get("question", "")), entry["answer"], truths))
        except (AttributeError, TypeError, KeyError) as error:
            raise _format_error(file, "lines of {answer, annotation} or {answer, caption0, ...}", error) from None
    return items


def read_lines(file: Path) -> list[Any]:
    """The values of a file with one JSON value on each line, blank lines left out.

    Raises:
        InputError: the file cannot be read, is empty, or a line is not JSON.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({error}); pass a file with one JSON object on each line") from None
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{file} line {number} is not JSON ({error}); restore the file") from None
    if not values:
        raise InputError(f"{file} must hold one JSON object on each line, got an empty file; restore it")
    return values


def require_split(file: Path, split: str, splits: list[str]) -> None:
    """Raises an InputError that names the splits there are, when `split` is not among them."""
    if split not in splits:
        raise InputError(f"split must be one of {splits} in {file}, got {split!r}; choose one of them")


def image_root(file: Path, images: Path | None, example: str) -> Path:
    """The folder below which image names are: the given one, else the first usual place beside `file` that has the example."""
    if images is not None:
        if not images.is_dir():
            raise InputError(f"--images must name a folder, got {str(images)!r}; check the path")
        return images
    places = [file.parent / name for name in _IMAGE_FOLDERS]
    return next((place for place in places if image_path(place, example).is_file()), places[0])


def image_path(root: Path, name: str) -> Path:
    """The image of that name; where the set has the suffix wrong or leaves it out, the file that is there."""
    path = root / name
    if path.is_file():
        return path
    bare = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
    others = (bare.with_name(bare.name + suffix) for suffix in IMAGE_SUFFIXES)
    return next((other for other in others if other.is_file()), path)


def _flat_question(entry: dict[str, Any], index: int) -> tuple[str, str, str, str, str]:
    """(image, kind, question, answer, key) of one record; KeyError for one without image, question or answer."""
    image = _image_name(entry["image"] if "image" in entry else entry["image_id"])
    asked, mark = _plain_question(entry["text"] if "text" in entry else entry["question"])
    answer = entry["ground_truth"] if "ground_truth" in entry else entry["answer"]
    kind = str(entry.get("category") or entry.get("type") or mark)
    return image, kind, asked, str(answer), str(entry.get("question_id", index))


def _image_name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the image {value!r}, which is not one name")
    return value


def _plain_question(text: str) -> tuple[str, str]:
    """A turn without its image mark, and the task mark in front of it, if any."""
    plain = _IMAGE_MARK.sub("", text).strip()
    mark = _TASK_MARK.match(plain)
    return (plain[mark.end() :].strip(), mark.group(1)) if mark else (plain, "")


def _questions(file: Path, images: Path | None, found: list[tuple[str, str, str, str, str]]) -> list[Question]:
    root = image_root(file, images, found[0][0])
    return [Question(image_path(root, image), kind, asked, answer, key) for image, kind, asked, answer, key in found]


def _format_error(file: Path, expected: str, error: Exception) -> InputError:
    return InputError(f"{file} must hold {expected}, got {error!r}; choose another --reader or restore the file")
