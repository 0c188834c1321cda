"""One form for every labelled set: items with an image, a question and what is true. Chooses the reader; knows no metric, no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..errors import InputError
from .datasets import (
    RSICD_THEMES,
    CaptionedImage,
    Question,
    class_words,
    read_class_folders,
    read_json,
    read_rsicd,
    read_rsvqa,
)
from .readers import read_answered, read_geochat_bench, read_instructions, read_karpathy, read_lines, read_nwpu

Task = Literal["caption", "retrieval", "classify", "vqa"]
TASKS: tuple[Task, ...] = get_args(Task)
DEFAULT_SPLIT = "test"


@dataclass(frozen=True)
class Item:
    """One thing to predict. `truths`: reference sentences, the one class, or the one answer; `kind`: the question's type."""

    key: str
    image: Path | None
    truths: tuple[str, ...]
    question: str = ""
    kind: str = ""


@dataclass(frozen=True)
class EvaluationSet:
    """Items of one task, keys unique. `labels`: class -> its words (classify); `answers`: predictions that the files held."""

    task: Task
    name: str
    reader: str
    split: str | None
    items: tuple[Item, ...]
    labels: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Short hash of everything that a prediction or a score depends on, except pixels and folders."""
        lines = [json.dumps([item.key, item.question, item.kind, item.truths]) for item in self.items]
        text = "\n".join([self.task, json.dumps(self.labels, sort_keys=True), *lines])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def kinds(self) -> list[str]:
        """The types of the questions, most frequent first; without types [""]."""
        return [kind for kind, _ in Counter(item.kind for item in self.items).most_common()]

    def of_kinds(self, kinds: Sequence[str]) -> EvaluationSet:
        """The items of these types only.

        Raises:
            InputError: a type that no item has.
        """
        unknown = [kind for kind in kinds if kind not in self.kinds]
        if unknown:
            raise InputError(f"--kind must be among {self.kinds[:20]} in {self.name}, got {unknown}; choose of these")
        return self._with(item for item in self.items if item.kind in kinds)

    def limited(self, limit: int) -> EvaluationSet:
        """At most `limit` items, drawn with a fixed seed, in the set's order."""
        if limit >= len(self.items):
            return self
        chosen = set(random.Random(0).sample(range(len(self.items)), limit))
        return self._with(item for index, item in enumerate(self.items) if index in chosen)

    def missing(self) -> list[Item]:
        """Items whose image is not on this disk."""
        return [item for item in self.items if item.image is not None and not item.image.is_file()]

    def without(self, items: Sequence[Item]) -> EvaluationSet:
        """The set without these items."""
        keys = {item.key for item in items}
        return self._with(item for item in self.items if item.key not in keys)

    def _with(self, items: Iterable[Item]) -> EvaluationSet:
        return dataclasses.replace(self, items=tuple(items))


@dataclass(frozen=True)
class Reader:
    """How one format is read: which tasks it serves, whether it has splits, and the function (source, task, split, images)."""

    tasks: tuple[Task, ...]
    splits: bool
    read: Callable[[Path, Task, str, Path | None], EvaluationSet]


def read_set(
    source: Path, task: Task, *, reader: str = "auto", split: str | None = None, images: Path | None = None
) -> EvaluationSet:
    """The labelled set at `source`, a file or a folder, as items of `task`.

    reader: one of READERS, or "auto", which looks at the files · split: None takes "test" where the set has splits · images: the folder
    below which image names are, when it is not beside the file.

    Raises:
        InputError: an unknown reader, one that does not serve the task, a missing split, or a damaged or empty set.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {list(TASKS)}, got {task!r}; choose one of them")
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source} does not exist; pass the file or folder of a labelled set")
    name = detect_reader(source) if reader == "auto" else reader
    if name not in READERS:
        raise InputError(f"--reader must be one of {['auto', *READERS]}, got {name!r}; choose one of them")
    chosen = READERS[name]
    if task not in chosen.tasks:
        fitting = [other for other, each in READERS.items() if task in each.tasks]
        raise InputError(
            f"task {task!r} cannot be scored on a set read by {name!r}, which serves {list(chosen.tasks)}; choose another task, "
            f"or one of the readers {fitting}"
        )
    if split is not None and not chosen.splits:
        raise InputError(
            f"--split does not apply to sets read by {name!r}, got {split!r}; leave it out and name the part itself"
        )
    return dataclasses.replace(_unique(chosen.read(source, task, split or DEFAULT_SPLIT, images)), reader=name)


def detect_reader(source: Path) -> str:
    """The reader that fits a file or folder, by its own words.

    Raises:
        InputError: nothing fits.
    """
    if source.is_dir():
        if (source / "captions.json").is_file():
            return "rsicd"
        return "rsvqa" if any(source.glob("*_split_*_questions.json")) else "folders"
    if source.suffix.lower() == ".jsonl":
        first = read_lines(source)[0]
        keys = set(first) if isinstance(first, dict) else set()
        if "answer" in keys and keys & {"annotation", "caption0"}:
            return "answered"
        if "image" in keys:
            return "geochat-bench"
    else:
        values = read_json(source)
        if isinstance(values, dict):
            return "karpathy" if isinstance(values.get("images"), list) else "nwpu"
        first = values[0] if isinstance(values, list) and values else None
        if isinstance(first, dict) and "captions" in first:
            return "rsicd"
        if isinstance(first, dict) and ("conversations" in first or first.keys() & {"image", "image_id"}):
            return "instructions"
    raise InputError(f"no reader knows the format of {source}; name one of {list(READERS)} with --reader")


def _rsicd(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    folder = source if source.is_dir() else source.parent
    found = read_rsicd(source, split)
    if images is not None:
        found = [dataclasses.replace(image, path=images / image.path.name) for image in found]
    return _captioned(folder.resolve().name, task, split, found, folder / "images" if images is None else images, RSICD_THEMES)


def _karpathy(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    return _captioned(source.stem, task, split, read_karpathy(source, split, images), None, {})


def _nwpu(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    return _captioned(source.stem, task, split, read_nwpu(source, split, images), None, {})


def _captioned(
    name: str, task: Task, split: str, found: Sequence[CaptionedImage], root: Path | None, words: dict[str, str]
) -> EvaluationSet:
    """Sentences grouped by image file: a file that stands twice is one item with all its sentences."""
    if task == "classify":
        themes = {image.path: image.theme for image in found}
        labels = words if set(themes.values()) <= words.keys() else _labels(themes.values())
        items = [Item(_image_key(path, root), path, (theme,)) for path, theme in themes.items()]
        return EvaluationSet(task, name, "", split, tuple(items), dict(labels))
    grouped: dict[Path, list[str]] = {}
    for image in found:
        grouped.setdefault(image.path, []).extend(image.captions)
    items = [Item(_image_key(path, root), path, tuple(sentences)) for path, sentences in grouped.items()]
    return EvaluationSet(task, name, "", split, tuple(items))


def _folders(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    found = read_class_folders(source)
    items = [Item(f"{image.label}/{image.path.name}", image.path, (image.label,)) for image in found]
    name = f"{source.resolve().parent.name} {source.resolve().name}"
    return EvaluationSet(task, name, "", None, tuple(items), _labels(image.label for image in found))


def _rsvqa(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    found = read_rsvqa(source, [split])
    if images is not None:
        found = [dataclasses.replace(question, path=images / question.path.name) for question in found]
    return _asked(source.resolve().name, task, split, found)


def _instructions(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    return _asked(source.stem, task, None, read_instructions(source, images))


def _geochat_bench(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    return _asked(source.stem, task, None, read_geochat_bench(source, images))


def _asked(name: str, task: Task, split: str | None, found: Sequence[Question]) -> EvaluationSet:
    """Questions as they are; for captions and retrieval the answers are the sentences of their image."""
    if task == "vqa":
        items = [Item(each.key, each.path, (each.answer,), each.question, each.kind) for each in found]
        return EvaluationSet(task, name, "", split, tuple(items))
    if task == "classify":
        items = [Item(each.key, each.path, (each.answer,), kind=each.kind) for each in found]
        return EvaluationSet(task, name, "", split, tuple(items), _labels(each.answer for each in found))
    grouped: dict[tuple[Path, str], list[str]] = {}
    for each in found:
        grouped.setdefault((each.path, each.kind), []).append(each.answer)
    items = [Item(_image_key(path, None), path, tuple(texts), kind=kind) for (path, kind), texts in grouped.items()]
    return EvaluationSet(task, name, "", split, tuple(items))


def _answered(source: Path, task: Task, split: str, images: Path | None) -> EvaluationSet:
    found = read_answered(source)
    items = tuple(Item(each.key, None, each.truths, each.question) for each in found)
    labels = _labels(each.truths[0] for each in found) if task == "classify" else {}
    return EvaluationSet(task, source.stem, "", None, items, labels, {each.key: each.answer for each in found})


def _labels(names: Iterable[str]) -> dict[str, str]:
    return {name: class_words(name) for name in sorted(set(names))}


def _image_key(path: Path, root: Path | None) -> str:
    """The file name, with its folder when the images lie in several."""
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.name


def _unique(found: EvaluationSet) -> EvaluationSet:
    """The set without blank sentences, and with a number behind every key that stands a second time.

    Raises:
        InputError: an item without a truth.
    """
    seen: Counter[str] = Counter()
    items = []
    for item in found.items:
        truths = tuple(text for text in item.truths if text.strip())
        if not truths:
            raise InputError(f"item {item.key!r} of {found.name} has no truth to hold an answer against; repair the set")
        seen[item.key] += 1
        key = item.key if seen[item.key] == 1 else f"{item.key}#{seen[item.key]}"
        items.append(dataclasses.replace(item, key=key, truths=truths))
    if len({item.key for item in items}) != len(items):
        raise InputError(f"the keys of {found.name} cannot be told apart; give its items distinct names")
    return dataclasses.replace(found, items=tuple(items))


_SENTENCES: tuple[Task, ...] = ("caption", "retrieval")
READERS: dict[str, Reader] = {
    "rsicd": Reader(("caption", "retrieval", "classify"), True, _rsicd),
    "karpathy": Reader(_SENTENCES, True, _karpathy),
    "nwpu": Reader(("caption", "retrieval", "classify"), True, _nwpu),
    "instructions": Reader(TASKS, False, _instructions),
    "geochat-bench": Reader(TASKS, False, _geochat_bench),
    "rsvqa": Reader(("vqa",), True, _rsvqa),
    "folders": Reader(("classify",), False, _folders),
    "answered": Reader(("caption", "classify", "vqa"), False, _answered),
}
