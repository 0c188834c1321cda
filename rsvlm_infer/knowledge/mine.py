"""Mines knowledge entries from captions of training images: object nouns, region phrases, scene names with facts.

Owns the rules; the word lists and the hand-written facts lie beside it as JSON. Knows no set of images, no model, no embedding.
The same captions give the same entries in the same order.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

OBJECT, REGION, SCENE = 0, 1, 2  # indices of config.LEVELS
MIN_IMAGES = 5  # rarer than this in the RSICD training captions are mostly slips of one writer
MAX_WORDS = 7
MAX_PART_WORDS = 3  # of a noun phrase on either side of a link
CONTAINED = 0.9  # a phrase that is this often only a part of one longer phrase says nothing of its own
TYPICAL_OBJECTS = 3
MIN_SHARE = 0.1  # of a theme's images that must show a typical object

_HERE = Path(__file__).resolve().parent
_TOKENS = re.compile(r"[a-z]+|[.,;:]")

# theme of an image, its captions
Image = tuple[str, Sequence[str]]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One text of a level, and in how many training images it was found; 0 = it was written by hand."""

    text: str
    level: int
    images: int = 0


@dataclass(frozen=True)
class Scene:
    """A scene's name, one line about it, and the classes of public sets that it stands for, as `set/Class`."""

    name: str
    fact: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """The words that rules know. Everything else ends a phrase."""

    objects: tuple[tuple[str, ...], ...]  # each the names of one object, singular
    places: frozenset[str]
    modifiers: frozenset[str]
    numbers: frozenset[str]
    links: tuple[Words, ...]
    determiners: frozenset[str]
    quantities: frozenset[str]

    @classmethod
    def from_dict(cls, lists: Mapping[str, Any]) -> Lexicon:
        """From the lists of lexicon.json."""
        links = sorted((tuple(link.split()) for link in lists["links"]), key=len, reverse=True)
        kinds = {name: frozenset(lists[name]) for name in ("places", "modifiers", "numbers", "determiners", "quantities")}
        return cls(objects=tuple(tuple(names) for names in lists["objects"]), links=tuple(links), **kinds)

    @cached_property
    def object_names(self) -> dict[Words, str]:
        """Every name of an object, singular and plural -> its first name."""
        return {tuple(form.split()): names[0] for names in self.objects for name in names for form in (name, plural(name))}

    @cached_property
    def compounds(self) -> frozenset[Words]:
        """Neighbouring words of objects' names: no phrase begins between them, as "lot near a road" would."""
        return frozenset(name[index : index + 2] for name in self.object_names for index in range(len(name) - 1))

    @cached_property
    def nouns(self) -> dict[str, str]:
        """One-word nouns, singular and plural -> singular."""
        words = {name for names in self.objects for name in names if " " not in name} | self.places
        return {form: word for word in sorted(words) for form in (word, plural(word))}


def read_lexicon() -> Lexicon:
    """The word lists of this package."""
    return Lexicon.from_dict(json.loads((_HERE / "lexicon.json").read_text(encoding="utf-8")))


def read_scenes() -> tuple[Scene, ...]:
    """The scenes of this package with their hand-written facts."""
    values = json.loads((_HERE / "facts.json").read_text(encoding="utf-8"))
    return tuple(Scene(value["name"], value["fact"], tuple(value["classes"])) for value in values)


def mine(images: Iterable[Image], lexicon: Lexicon, scenes: Sequence[Scene], min_images: int = MIN_IMAGES) -> list[Entry]:
    """All entries of some training images: objects, regions, then scenes with facts and with their typical objects.

    Objects and regions come by falling number of images, ties by text; scenes in the order of `scenes`. Without images only
    the facts remain.
    """
    read = [(theme, [tokens(caption) for caption in captions]) for theme, captions in images]
    objects, shown = mine_objects(read, lexicon, min_images)
    regions = mine_regions(read, lexicon, min_images)
    facts = [Entry(f"{scene.name}: {scene.fact}", SCENE) for scene in scenes]
    return [*objects, *regions, *facts, *typical_scenes(shown, objects, lexicon, scenes, min_images)]


def mine_objects(
    read: Sequence[tuple[str, Sequence[Words]]], lexicon: Lexicon, min_images: int
) -> tuple[list[Entry], list[tuple[str, frozenset[str]]]]:
    """Objects of the lexicon that enough images name, each by its most frequent name; and what each image shows, by theme."""
    longest = max((len(name) for name in lexicon.object_names), default=0)
    forms: Counter[tuple[str, Words]] = Counter()
    counts: Counter[str] = Counter()
    shown = []
    for theme, captions in read:
        found = {
            (lexicon.object_names[name], name)
            for words in captions
            for start in range(len(words))
            for name in (words[start : start + length] for length in range(1, longest + 1) if start + length <= len(words))
            if name in lexicon.object_names
        }
        names = frozenset(name for name, _ in found)
        forms.update(found)
        counts.update(names)
        shown.append((theme, names))
    kept = (name for name, count in counts.items() if count >= min_images)
    entries = [Entry(" ".join(_best(forms, name)), OBJECT, counts[name]) for name in kept]
    return sorted(entries, key=_by_count), shown


def mine_regions(read: Sequence[tuple[str, Sequence[Words]]], lexicon: Lexicon, min_images: int) -> list[Entry]:
    """Noun phrases and pairs of them that enough images name, each in its most frequent wording.

    Left out: names of objects, whole captions, and phrases that are nearly always part of one longer phrase.
    """
    forms: Counter[tuple[Words, Words]] = Counter()
    counts: Counter[Words] = Counter()
    whole: set[Words] = set()
    for _, captions in read:
        found = {phrase for words in captions for phrase in phrases(words, lexicon)}
        forms.update(found)
        counts.update({key for key, _ in found})
        whole |= {_without_determiners(words, lexicon) for words in captions}
    objects = {tuple(name.split()) for names in lexicon.objects for name in names}
    kept = {key: count for key, count in counts.items() if count >= min_images and key not in objects}
    contained = _contained(kept)
    kept = {key: count for key, count in kept.items() if key not in contained}
    best: dict[Words, tuple[int, Words]] = {}
    for (key, words), count in forms.items():
        if key in kept and words not in whole:
            best[key] = min(best.get(key, (0, words)), (-count, words))
    return sorted((Entry(" ".join(words), REGION, kept[key]) for key, (_, words) in best.items()), key=_by_count)


def typical_scenes(
    shown: Sequence[tuple[str, frozenset[str]]],
    objects: Sequence[Entry],
    lexicon: Lexicon,
    scenes: Sequence[Scene],
    min_images: int,
) -> list[Entry]:
    """For each theme that enough images have: its name with the objects that set it apart, as `airport with planes, ...`.

    An object's score is p log(p / q): p is the share of the theme's images that show it, q the share of all images.
    """
    texts = {lexicon.object_names[tuple(entry.text.split())]: entry.text for entry in objects}
    overall = Counter(name for _, names in shown for name in names)
    entries = []
    for scene in scenes:
        themes = {name.partition("/")[2] for name in scene.classes}
        of_theme = [names for theme, names in shown if theme in themes]
        if len(of_theme) < min_images:
            continue
        counts = Counter(name for names in of_theme for name in names)
        scores = {}
        for name, count in counts.items():
            p, q = count / len(of_theme), overall[name] / len(shown)
            if name in texts and p >= MIN_SHARE and p > q and not _singular(name, lexicon) & _singular(scene.name, lexicon):
                scores[name] = p * math.log(p / q)
        best = [texts[name] for name in sorted(scores, key=lambda name: (-scores[name], name))[:TYPICAL_OBJECTS]]
        if best:
            entries.append(Entry(f"{scene.name} with {_listed(best)}", SCENE, len(of_theme)))
    return entries


def phrases(words: Words, lexicon: Lexicon) -> Iterator[tuple[Words, Words]]:
    """Region phrases of one caption: (key, wording). The key is singular and has no determiners, so that variants meet.

    A noun phrase is modifiers and nouns that end with a noun. Found are its endings of two words or more that do not begin with
    a number, and its endings joined by a link to the next noun phrase: "green trees", "two sides of a river".
    """
    ends = _noun_phrases(words, lexicon)
    for start, end in ends.items():
        heads = [
            first
            for first in range(start, end)
            if end - first <= MAX_PART_WORDS and (first == start or words[first - 1 : first + 1] not in lexicon.compounds)
        ]
        for first in heads:
            if end - first > 1 and words[first] not in lexicon.numbers:
                yield _key(words[first:end], lexicon), words[first:end]
        link = next((link for link in lexicon.links if words[end : end + len(link)] == link), None)
        if link is None:
            continue
        second = end + len(link)
        if words[second : second + 1] and words[second] in lexicon.determiners:
            second += 1
        stop = ends.get(second)
        if stop is None or stop - second > MAX_PART_WORDS:
            continue
        for first in heads:
            if stop - first <= MAX_WORDS:
                yield _key(words[first:stop], lexicon), words[first:stop]


def tokens(caption: str) -> Words:
    """Lower-case words and punctuation that ends a phrase."""
    return tuple(_TOKENS.findall(caption.lower()))


def plural(noun: str) -> str:
    """The regular plural of an English noun."""
    if noun.endswith(("s", "x", "sh", "ch")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def _noun_phrases(words: Words, lexicon: Lexicon) -> dict[int, int]:
    """Start -> end of the longest noun phrases. "a piece of" and its like count as determiners, not as nouns."""
    found = {}
    start = 0
    while start < len(words):
        end = noun_end = start
        while end < len(words) and _belongs(words, end, lexicon):
            end += 1
            if words[end - 1] in lexicon.nouns:
                noun_end = end
        if noun_end > start:
            found[start] = noun_end
        start = max(end, start + 1)
    return found


def _belongs(words: Words, index: int, lexicon: Lexicon) -> bool:
    word = words[index]
    quantity = word in lexicon.quantities and words[index + 1 : index + 2] == ("of",)
    if quantity and words[max(index - 1, 0) : index] != ("parking",):
        return False
    return word in lexicon.nouns or word in lexicon.modifiers or word in lexicon.numbers


def _key(words: Words, lexicon: Lexicon) -> Words:
    return tuple(lexicon.nouns.get(word, word) for word in words if word not in lexicon.determiners)


def _without_determiners(words: Words, lexicon: Lexicon) -> Words:
    """A caption without the determiners at its start and the punctuation at its end."""
    first, last = 0, len(words)
    while first < last and words[first] in lexicon.determiners:
        first += 1
    while last > first and not words[last - 1].isalpha():
        last -= 1
    return words[first:last]


def _contained(counts: Mapping[Words, int]) -> set[Words]:
    """Phrases that are nearly always part of one longer phrase of `counts`."""
    return {
        part
        for key, count in counts.items()
        for start in range(len(key))
        for part in (key[start:stop] for stop in range(start + 1, len(key) + 1) if stop - start < len(key))
        if count >= CONTAINED * counts.get(part, math.inf)
    }


def _best(forms: Counter[tuple[str, Words]], name: str) -> Words:
    return min((-count, words) for (owner, words), count in forms.items() if owner == name)[1]


def _by_count(entry: Entry) -> tuple[int, str]:
    return -entry.images, entry.text


def _singular(text: str, lexicon: Lexicon) -> set[str]:
    return {lexicon.nouns.get(word, word) for word in text.split()}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
