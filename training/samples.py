"""What the language model is taught: captions and questions whose answers are certain, several per image, packed into rows.

All answers of one image branch off its visual tokens: each branch sees the image and itself, so an image is paid for once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.evaluation.captions import tokenize
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, CaptionedImage, Question
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene
from rsvlm_infer.text.chat import encode_prompt
from rsvlm_infer.text.tokenizer import Tokenizer

from .dataset import Labelled, read_rgb, tidied, varied

THEME_QUESTION = "What kind of place is this?"
PRESENCE_QUESTION = "Is there a {theme} in this image?"
MOSAIC_QUESTION = "Which kinds of places are in this mosaic?"
AREA_QUESTION = "Is it a rural or an urban area"

# Themes whose answer to AREA_QUESTION nobody would dispute.
RURAL = ("bareland", "beach", "desert", "farmland", "forest", "meadow", "mountain", "river", "sparseresidential")
URBAN = (
    "center",
    "church",
    "commercial",
    "denseresidential",
    "industrial",
    "mediumresidential",
    "parking",
    "railwaystation",
    "square",
)

# Objects as RSVQA names them, and the caption words that prove them.
OBJECTS: dict[str, str] = {
    "building": r"buildings?|houses?",
    "residential building": r"houses?|residential buildings?",
    "road": r"roads?|streets?|highways?",
    "water area": r"water|river|lake|pond|sea|ocean",
    "forest": r"forests?",
    "farmland": r"farmlands?",
    "grass area": r"meadows?|lawns?|grass|grassland",
    "parking": r"parking|parking lots?",
    "pitch": r"playgrounds?|football field|baseball fields?|tennis courts?|basketball fields?",
    "bridge": r"bridges?",
}
PRESENCE_FORMS = ("Is there a {}?", "Is a {} present?", "Is there a {} in the image?", "Is a {} present in the image?")
# RSVQA-LR's train questions are answered "yes" three times in four; an object that is there is asked for that much more often.
ABSENT_SHARE = 1 / 3

# What a Sentinel-2 tile of a class surely shows, in RSVQA's words; the classes that make an area urban.
CLASS_OBJECTS: dict[str, tuple[str, ...]] = {
    "annual crop": ("farmland",),
    "forest": ("forest",),
    "herbaceous vegetation": ("grass area",),
    "highway": ("road",),
    "industrial": ("building", "commercial building"),
    "pasture": ("grass area",),
    "permanent crop": ("farmland",),
    "residential": ("building", "residential building", "road"),
    "river": ("water area",),
    "sea lake": ("water area",),
}
URBAN_CLASSES = ("industrial", "residential")


@dataclass(frozen=True)
class Branch:
    """Token ids that follow the image, or the caption question when `after_stem`; the last `answer` of them are learned."""

    ids: list[int]
    answer: int
    weight: float
    after_stem: bool = False


@dataclass(frozen=True)
class Sample:
    """One image: its tiles, the query that augments it, the prompt up to its last placeholder, the stem, the branches."""

    scene: PackedScene
    query: str
    prefix: list[int]
    stem: list[int]
    branches: list[Branch]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.stem) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class Row:
    """A packed row: token ids, rotation positions, targets (-100 = none), target weights, mask, and the samples in it."""

    token_ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor
    samples: list[Sample]


def consensus(records: Sequence[CaptionedImage]) -> list[list[tuple[str, float]]]:
    """Each image's distinct captions with a weight: how well the image's other captions agree with it (CIDEr), plus a little.

    People differ; what most of them say about an image is what a reader wants to hear about it. A repeated sentence is no agreement:
    RSICD's authors filled up to five with copies.
    """
    from pycocoevalcap.cider.cider import Cider

    texts = [list(dict.fromkeys(record.captions)) for record in records]
    words = {index: [tokenize(caption) for caption in part] for index, part in enumerate(texts)}
    found: list[list[tuple[str, float]]] = [[] for _ in records]
    for place in range(max(len(part) for part in words.values())):
        guess = {index: [part[place]] for index, part in words.items() if place < len(part) > 1}
        truth = {index: [text for other, text in enumerate(words[index]) if other != place] for index in guess}
        if guess:
            _, scores = Cider().compute_score(truth, guess)
            for index, score in zip(guess, scores, strict=True):
                found[index].append((tidied(texts[index][place]), 0.2 + float(score)))
    return [part or [(tidied(texts[index][0]), 1.0)] for index, part in enumerate(found)]


class SampleMaker:
    """Draws samples from all sets in the shares of the recipe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: RsvlmConfig,
        settings: dict[str, Any],
        records: Sequence[CaptionedImage],
        captions: Sequence[list[tuple[str, float]]],
        sets: dict[str, Labelled],
        questions: Sequence[Question],
        seed: int,
    ) -> None:
        self.tokenizer, self.config, self.settings = tokenizer, config, settings
        self.records, self.captions, self.sets = records, captions, sets
        self.by_image: dict[Any, list[Question]] = {}
        for question in questions:
            self.by_image.setdefault(question.path, []).append(question)
        self.rng = np.random.default_rng(seed)
        self.themes = sorted(RSICD_THEMES)
        self.of_theme = {theme: [row for row, record in enumerate(records) if record.theme == theme] for theme in self.themes}
        self.end = list(config.eos_token_ids[:1])
        self._waiting: dict[str, list[int]] = {}
        self._pixels: dict[Any, npt.NDArray[np.uint8]] = {}

    @cached_property
    def queries(self) -> list[str]:
        """All texts that may augment an image."""
        words = [*RSICD_THEMES.values(), *(word for part in self.sets.values() for word in part.words)]
        asked = {question.question for part in self.by_image.values() for question in part}
        named = {*OBJECTS, *(name for names in CLASS_OBJECTS.values() for name in names)}
        objects = {form.format(name) for form in PRESENCE_FORMS for name in named}
        presence = {PRESENCE_QUESTION.format(theme=word) for word in words}
        return sorted({CAPTION_PROMPT, THEME_QUESTION, MOSAIC_QUESTION, AREA_QUESTION, *presence, *objects, *asked})

    def rows(self, row_tokens: int, budgets: Sequence[int]) -> Iterator[Row]:
        """Endless packed rows; mosaics take one of `budgets` visual tokens."""
        kinds = list(self.settings["shares"])
        shares = np.array([self.settings["shares"][kind] for kind in kinds], dtype=float)
        makers: dict[str, Callable[[], Sample]] = {
            "rsicd": self._captioned,
            "rsvqa": self._asked,
            "mosaic": lambda: self._mosaic(budgets),
            "patchwork": self._patchwork,
        }
        waiting: list[Sample] = []
        while True:
            kind = kinds[int(self.rng.choice(len(kinds), p=shares / shares.sum()))]
            sample = makers[kind]() if kind in makers else self._labelled(kind)
            if sample.length > row_tokens:
                continue
            if sum(item.length for item in waiting) + sample.length > row_tokens:
                yield pack_row(waiting, row_tokens)
                waiting = []
            waiting.append(sample)

    def caption_prompts(self) -> Iterator[tuple[int, Sample]]:
        """Endless images of RSICD without an answer: the row of each in the records, and its prompt; `stem` is all of the question."""
        while True:
            row, scene = self._next_captioned()
            prefix, stem = self._split(CAPTION_PROMPT, scene.num_tokens)
            yield row, Sample(scene, CAPTION_PROMPT, prefix, stem, [])

    def _next_captioned(self) -> tuple[int, PackedScene]:
        """A row of RSICD and its image in a new variation: themes by chance, a theme's images in turn.

        Only images with `least_sentences` distinct sentences, where the recipe asks for that.
        """
        theme = str(self.rng.choice(self.themes))
        if not self._waiting.get(theme):
            least = self.settings.get("least_sentences", 1)
            rich = [row for row in self.of_theme[theme] if len(self.captions[row]) >= least]
            self._waiting[theme] = self.rng.permutation(rich).tolist()
        row = self._waiting[theme].pop()
        pixels = self._read(self.records[row].path)
        return row, self._scene(varied(pixels, self.config.preprocess.tile_px, self.rng, self.settings["least_area"]))

    def _captioned(self) -> Sample:
        row, scene = self._next_captioned()
        record = self.records[row]
        found = self.captions[row]
        weights = np.array([weight for _, weight in found])
        count = min(self.settings["captions"], len(found))
        chosen = self.rng.choice(len(found), count, replace=False, p=weights / weights.sum())
        answers = [(found[place][0], float(weights[place] / weights[chosen].sum())) for place in chosen]
        asks: list[tuple[str, str]] = []
        theme = RSICD_THEMES[record.theme]
        if self.rng.random() < 0.25:
            asks.append((THEME_QUESTION, theme[:1].upper() + theme[1:]))
        if self.rng.random() < 0.3:
            asks.append(self._presence([theme], list(RSICD_THEMES.values())))
        if self.rng.random() < 0.3:
            asks.extend(self._objects(record))
        if self.rng.random() < 0.2 and record.theme in (*RURAL, *URBAN):
            asks.append((AREA_QUESTION, "urban" if record.theme in URBAN else "rural"))
        return self._sample(scene, asks, answers)

    def _objects(self, record: CaptionedImage) -> list[tuple[str, str]]:
        """An object that a caption names (yes), and one that no caption of the theme names more than once in 200 (no)."""
        text = " ".join(record.captions).lower()
        named = [name for name, words in OBJECTS.items() if re.search(rf"\b(?:{words})\b", text)]
        absent = [name for name in OBJECTS if self._object_rates[record.theme][name] < 0.005 and name not in named]
        out = []
        if named:
            out.append(self._object_question(named, "yes"))
        if absent and self.rng.random() < ABSENT_SHARE:
            out.append(self._object_question(absent, "no"))
        return out

    def _object_question(self, names: Sequence[str], answer: str) -> tuple[str, str]:
        return str(self.rng.choice(PRESENCE_FORMS)).format(self.rng.choice(list(names))), answer

    @cached_property
    def _object_rates(self) -> dict[str, dict[str, float]]:
        rates = {}
        for theme, rows in self.of_theme.items():
            texts = [" ".join(self.records[row].captions).lower() for row in rows]
            rates[theme] = {
                name: sum(bool(re.search(rf"\b(?:{words})\b", text)) for text in texts) / max(1, len(texts))
                for name, words in OBJECTS.items()
            }
        return rates

    def _labelled(self, name: str) -> Sample:
        part = self.sets[name]
        row = int(self.rng.integers(len(part.images)))
        word = part.words[part.classes[row]]
        image = self._read(part.images[row].path)
        # Small images are shown as they are; larger ones keep their size so that leaves get something to resolve.
        scene = self._scene(varied(image, image.shape[0], self.rng, self.settings["least_area"]))
        asks = [(THEME_QUESTION, word[:1].upper() + word[1:])]
        asks += [self._presence([word], part.words) for _ in range(2)]
        return self._sample(scene, asks)

    def _patchwork(self) -> Sample:
        """4 x 4 EuroSAT tiles of a few classes: an image of RSVQA-LR's size and ground sample distance with known content."""
        part = self.sets["eurosat"]
        classes = self.rng.choice(len(part.words), int(self.rng.integers(1, 5)), replace=False)
        cells = self.rng.choice(classes, 16)
        by_class = self._rows_of_class
        tiles = [self._read(part.images[int(self.rng.choice(by_class[int(number)]))].path) for number in cells]
        image = np.concatenate([np.concatenate(tiles[row : row + 4], axis=1) for row in range(0, 16, 4)])
        present = {name for number in cells for name in CLASS_OBJECTS[part.words[number]]}
        absent = sorted({name for names in CLASS_OBJECTS.values() for name in names} - present)
        asks = [self._object_question(sorted(present), "yes") for _ in range(2)]
        if absent and self.rng.random() < 2 * ABSENT_SHARE:
            asks.append(self._object_question(absent, "no"))
        urban = sum(part.words[number] in URBAN_CLASSES for number in cells)
        if urban == 0 or urban >= 4:
            asks.append((AREA_QUESTION, "urban" if urban else "rural"))
        return self._sample(self._scene(image), asks)

    @cached_property
    def _rows_of_class(self) -> list[list[int]]:
        part = self.sets["eurosat"]
        return [[row for row, number in enumerate(part.classes) if number == place] for place in range(len(part.words))]

    def _asked(self) -> Sample:
        """Questions of one RSVQA image, presence and area above all; only its orientation may change: answers count and compare."""
        paths = list(self.by_image)
        path = paths[int(self.rng.integers(len(paths)))]
        turns = int(self.rng.integers(4))
        kept = [
            question
            for question in self.by_image[path]
            if turns == 0 or not re.search(r"left|right|top|bottom", question.question)
        ]
        likely = np.array([4.0 if question.kind in ("presence", "rural_urban") else 1.0 for question in kept])
        chosen = self.rng.choice(len(kept), min(10, len(kept)), replace=False, p=likely / likely.sum())
        turned = np.ascontiguousarray(np.rot90(self._read(path), turns))
        return self._sample(self._scene(turned), [(kept[i].question, kept[i].answer) for i in chosen])

    def _mosaic(self, budgets: Sequence[int]) -> Sample:
        rows, image = self.mosaic_image()
        present = list(dict.fromkeys(RSICD_THEMES[self.records[row].theme] for row in rows))
        tiling = str(self.rng.choice(list(self.settings["tilings"]), p=list(self.settings["tilings"].values())))
        budget = int(self.rng.choice(list(budgets)))
        scene = self._scene(image, tiling, max(budget, self._anyres_tokens if tiling == "anyres" else 0))
        words = list(RSICD_THEMES.values())
        asks = [self._presence(present, words) for _ in range(4)]
        if self.rng.random() < 0.4:
            listed = ", ".join(present)
            asks.append((MOSAIC_QUESTION, listed[:1].upper() + listed[1:] + "."))
        return self._sample(scene, asks)

    _anyres_tokens = 1200

    def mosaic_image(self) -> tuple[list[int], npt.NDArray[np.uint8]]:
        """16 to 64 images of at most half of the themes in the cells of a uniform square, and their rows in raster order."""
        return mosaic(
            self.rng,
            {theme: self.of_theme[theme] for theme in self.themes},
            lambda row: self._read(self.records[row].path),
            self.settings["mosaic_images"],
        )

    def _presence(self, present: Sequence[str], words: Sequence[str]) -> tuple[str, str]:
        if self.rng.random() < 0.5:
            return PRESENCE_QUESTION.format(theme=self.rng.choice(list(present))), "yes"
        absent = [word for word in words if word not in present]
        return PRESENCE_QUESTION.format(theme=self.rng.choice(absent)), "no"

    def _sample(self, scene: PackedScene, asks: list[tuple[str, str]], captions: Sequence[tuple[str, float]] = ()) -> Sample:
        """A sample whose query is one of its own questions: features encoded for one question are reused by the others."""
        prefix, stem = self._split(CAPTION_PROMPT, scene.num_tokens)
        branches = []
        for text, weight in captions:
            ids = self.tokenizer.encode(text) + self.end
            # The question's last token predicts the first word, so each branch has its own copy of it.
            branches.append(Branch(stem[-1:] + ids, len(ids), weight, after_stem=True))
        for question, answer in asks:
            ids = self.tokenizer.encode(answer) + self.end
            branches.append(Branch(self._split(question, scene.num_tokens)[1] + ids, len(ids), self.settings["answer_weight"]))
        use_caption = captions and (not asks or self.rng.random() < 0.7)
        query = CAPTION_PROMPT if use_caption else asks[int(self.rng.integers(len(asks)))][0]
        return Sample(scene, query, prefix, stem[:-1] if captions else [], branches)

    def _split(self, question: str, visual: int) -> tuple[list[int], list[int]]:
        """The prompt's ids up to its last placeholder, and the rest."""
        template, image_id, bos = self.config.chat_template, self.config.image_token_id, self.config.bos_token_id
        ids = [int(i) for i in encode_prompt(self.tokenizer, template, question, visual, image_id, bos)]
        start = len(ids) - ids[::-1].index(image_id)
        return ids[:start], ids[start:]

    def _scene(self, image: npt.NDArray[np.uint8], tiling: Any = None, budget: int | None = None) -> PackedScene:
        return prepare_scene(image, self.config, SceneSettings(tiling=tiling, max_visual_tokens=budget)).packed

    def _read(self, path: Any) -> npt.NDArray[np.uint8]:
        if path not in self._pixels:
            self._pixels[path] = read_rgb(path)
        return self._pixels[path]


def mosaic(
    rng: np.random.Generator,
    of_theme: dict[str, list[int]],
    read: Callable[[int], npt.NDArray[np.uint8]],
    images: Sequence[int],
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Images of a few themes in the cells of a uniform grid that holds about twice as many cells as images.

    Args:
        of_theme: rows that may be drawn, by theme. read: pixels of a row. images: least and most images.

    Returns:
        The rows drawn, in raster order, and the picture [side, side, 3].
    """
    count = int(rng.integers(images[0], images[1] + 1))
    themes = rng.choice(sorted(of_theme), min(len(of_theme) // 2, int(rng.integers(3, 13))), replace=False)
    rows = [int(rng.choice(of_theme[str(rng.choice(themes))])) for _ in range(count)]
    side = int(np.ceil(np.sqrt(2 * count)))
    cells = sorted(rng.choice(side * side, count, replace=False).tolist())
    cell = 224
    picture = np.empty((side * cell, side * cell, 3), np.uint8)
    picture[:] = rng.integers(40, 216, 3)
    for row, place in zip(rows, cells, strict=True):
        top, left = place // side * cell, place % side * cell
        picture[top : top + cell, left : left + cell] = read(row)
    return rows, picture


def pack_row(samples: list[Sample], row_tokens: int) -> Row:
    """Lays samples side by side; a token sees what comes before it on its own branch and nothing else."""
    ids = np.zeros(row_tokens, np.int64)
    positions = np.zeros(row_tokens, np.int64)
    targets = np.full(row_tokens, -100, np.int64)
    weights = np.zeros(row_tokens, np.float32)
    mask = np.eye(row_tokens, dtype=np.bool_)  # unused places see themselves: a softmax over nothing is NaN
    at = 0
    for sample in samples:
        image = np.arange(at, at + len(sample.prefix))
        stem = np.arange(image.size + at, image.size + at + len(sample.stem))
        parts: list[tuple[list[int], int, float, list[npt.NDArray[np.int64]]]] = [
            (sample.prefix, 0, 0.0, []),
            (sample.stem, 0, 0.0, [image]),
        ]
        parts += [
            (branch.ids, branch.answer, branch.weight, [image, stem] if branch.after_stem else [image])
            for branch in sample.branches
        ]
        for part, answer, weight, before in parts:
            stop = at + len(part)
            seen = sum(len(places) for places in before)
            ids[at:stop] = part
            positions[at:stop] = np.arange(len(part)) + seen
            for places in before:
                mask[at:stop, places] = True
            mask[at:stop, at:stop] = np.tri(len(part), dtype=np.bool_)
            if answer:
                targets[stop - answer - 1 : stop - 1] = part[-answer:]
                weights[stop - answer - 1 : stop - 1] = weight
            at = stop
    tensors = [torch.from_numpy(part) for part in (ids, positions, targets, weights, mask)]
    return Row(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], samples)
