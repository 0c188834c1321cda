"""Texts that a language model is rounded on: prompts with visual tokens and the model's own answers, and sentences that it embeds.

Knows images and prompts, no rounding. The model speaks through the native backend, several times as fast as eager, from weights that
are laid out in memory: its bfloat16 tokens are also what the rounded language model will be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rsvlm_infer.backends.base import Query
from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.datasets import read_rsicd
from rsvlm_infer.models.load import LoadedCheckpoint
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.classify import LABEL_TEMPLATE, label_prompts
from rsvlm_infer.tasks.generation import prompt_ids
from rsvlm_infer.tasks.result import Answer
from rsvlm_infer.tasks.retrieve import text_ids
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene
from rsvlm_infer.text.tokenizer import Tokenizer

from .calibrate import NEW_TOKENS, TOGETHER, WORDS
from .layerwise import HELD_OUT, CalibrationText
from .native import in_memory

CAPTION_PRECISION = "bf16"
SENTENCES = 2000  # of RSICD's 8,734 train images; the distinct ones of these fit and measure the text projection
ROUNDING_SENTENCES = 400  # of them codes are fitted to some: more tokens than 64 prompts with images have


@dataclass(frozen=True)
class Calibration:
    """What a language model is rounded on.

    Attributes:
        texts: of every image its caption prompt with the model's own caption; and, where the model embeds texts, some sentences.
        fitted, held_out: distinct sentences that are embedded; the latter measure only. Both empty where no text is embedded.
    """

    texts: list[CalibrationText]
    fitted: list[str]
    held_out: list[str]


def calibrate(loaded: LoadedCheckpoint, images: list[Path], report: Callable[[int], None]) -> Calibration:
    """Captions the images. The sentences are RSICD's train split's, or, elsewhere, the captions.

    Args:
        report: takes the number of images done.

    Raises:
        InputError: too few images can be read to hold one out.
    """
    rsvlm = RSVLM(in_memory(loaded, CAPTION_PRECISION), Tokenizer.from_folder(loaded.folder))
    language = loaded.model.language_model
    assert language is not None
    table = language.embed_tokens.weight.detach().float().numpy()
    answers = _captions(rsvlm, images, report)
    texts = [
        _prompt(rsvlm, table, path, [int(token) for token in answer.token_ids], _is_held_out(place))
        for place, (path, answer) in enumerate(answers)
    ]
    if loaded.config.alignment is None:
        return Calibration(texts, [], [])
    fitted, held_out = _split(_written(images) or [answer.text for _, answer in answers])
    few = ROUNDING_SENTENCES // HELD_OUT
    texts += [_embedded(rsvlm, table, each, True) for each in spread(held_out, few)]
    texts += [_embedded(rsvlm, table, each, False) for each in spread(fitted, ROUNDING_SENTENCES - few)]
    return Calibration(texts, fitted, held_out)


def calibration_sentences(
    loaded: LoadedCheckpoint, images: list[Path], report: Callable[[int], None]
) -> tuple[list[str], list[str]]:
    """Those of `calibrate` alone, fitted ones and held-out ones: images are captioned only where there is no RSICD.

    Raises:
        InputError: too few images can be read to hold one out.
    """
    sentences = _written(images)
    if not sentences:
        rsvlm = RSVLM(in_memory(loaded, CAPTION_PRECISION), Tokenizer.from_folder(loaded.folder))
        sentences = [answer.text for _, answer in _captions(rsvlm, images, report)]
    return _split(sentences)


def _captions(rsvlm: RSVLM, images: list[Path], report: Callable[[int], None]) -> list[tuple[Path, Answer]]:
    """Of the images that can be read."""
    found: list[tuple[Path, Answer]] = []
    reason = ""
    for start in range(0, len(images), TOGETHER):
        batch = images[start : start + TOGETHER]
        for path, answer in zip(batch, rsvlm.caption_many(batch, batch_size=TOGETHER, max_new_tokens=NEW_TOKENS), strict=True):
            if answer.error is None:
                found.append((path, answer))
            else:
                reason = str(answer.error)
        report(start + len(batch))
    if len(found) < HELD_OUT:
        raise InputError(
            f"--calibrate needs at least {HELD_OUT} images that can be read, {len(found)} of {len(images)} can "
            f"({reason or 'no more given'}); pass other images"
        )
    return found


def _written(images: list[Path]) -> list[str]:
    """The first sentences of RSICD's train images, evenly spread, when these images are of it; none elsewhere.

    More images than were asked for have a say here: a sentence costs no more than a forward pass of some twenty tokens.
    """
    folder = images[0].parent.parent if images else Path()
    if not (folder / "captions.json").is_file():
        return []
    return spread([image.captions[0] for image in read_rsicd(folder, "train") if image.captions], SENTENCES)


def _split(sentences: list[str]) -> tuple[list[str], list[str]]:
    """Distinct ones, after a few words and labels: what to fit, and every fourth to hold out, so neither is empty.

    Every other four begin with a capital letter. RSICD's are written small, and codes that were fitted to those alone turned val
    sentences by 0.0118 as retrieval capitalises them, where sentences written small turned by 0.0078.
    """
    distinct = list(dict.fromkeys([*WORDS, *label_prompts(WORDS, LABEL_TEMPLATE), *map(str.strip, sentences)]))
    fitted: list[str] = []
    held_out: list[str] = []
    for place, sentence in enumerate(filter(None, distinct)):
        form = sentence[0].upper() + sentence[1:] if place // HELD_OUT % 2 else sentence
        (held_out if _is_held_out(place) else fitted).append(form)
    return fitted, held_out


def _is_held_out(place: int) -> bool:
    return place % HELD_OUT == HELD_OUT - 1


def spread(sentences: list[str], limit: int) -> list[str]:
    """At most `limit` of them, evenly."""
    count = min(limit, len(sentences))
    return [sentences[place * len(sentences) // count] for place in range(count)]


def _prompt(rsvlm: RSVLM, table: npt.NDArray[np.float32], image: Path, answer: list[int], held_out: bool) -> CalibrationText:
    """The caption prompt and its answer, whose last token is never fed."""
    query = None
    if rsvlm.config.augmentation is not None:
        words = np.array(rsvlm.tokenizer.encode(CAPTION_PROMPT), dtype=np.int32)
        query = Query(words, rsvlm.embed_text(CAPTION_PROMPT))
    scene = prepare_scene(image, rsvlm.config, SceneSettings())
    (features,) = rsvlm.backend.encode([scene.packed], [query])
    ids = prompt_ids(rsvlm.tokenizer, rsvlm.config, CAPTION_PROMPT, features.num_tokens).astype(np.int64)
    visual = ids == rsvlm.config.image_token_id
    embeddings = table[np.where(visual, 0, ids)]
    if visual.any():
        embeddings[visual] = features.handle.tokens
    return CalibrationText(np.concatenate([embeddings, table[answer[:-1]]]), len(ids), held_out)


def _embedded(rsvlm: RSVLM, table: npt.NDArray[np.float32], text: str, held_out: bool) -> CalibrationText:
    ids = text_ids(rsvlm.tokenizer, rsvlm.config, text)
    return CalibrationText(table[ids], len(ids), held_out)
