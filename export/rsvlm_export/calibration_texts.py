"""Texts that a language model is rounded on: prompts with visual tokens and the model's own answers, and sentences that it embeds.

Knows images and prompts, no rounding. The model speaks through the native backend, several times as fast as eager, from weights that
are laid out in memory: its bfloat16 tokens are also what the rounded language model will be given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rsvlm_infer.backends.base import Query
from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.datasets import read_rsicd
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.load import LoadedCheckpoint
from rsvlm_infer.models.native_package import NativePackage
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.generation import prompt_ids
from rsvlm_infer.tasks.retrieve import text_ids
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene
from rsvlm_infer.text.tokenizer import Tokenizer

from .calibrate import NEW_TOKENS, TOGETHER, WORDS
from .layerwise import HELD_OUT, CalibrationText
from .native import lay_out

CAPTION_PRECISION = "bf16"


def calibration_texts(loaded: LoadedCheckpoint, images: list[Path], report: Callable[[int], None]) -> list[CalibrationText]:
    """For every image its caption prompt with the model's own caption, and, where the model embeds texts, one sentence about it.

    The sentence is the image's first one in RSICD, else the caption. report: takes the number of images done.

    Raises:
        InputError: too few images can be read to hold one out.
    """
    rsvlm = RSVLM(_native(loaded), Tokenizer.from_folder(loaded.folder))
    language = loaded.model.language_model
    assert language is not None
    table = language.embed_tokens.weight.detach().float().numpy()
    written = _sentences(images)
    texts: list[CalibrationText] = []
    read, reason = 0, ""
    for start in range(0, len(images), TOGETHER):
        batch = images[start : start + TOGETHER]
        for path, answer in zip(batch, rsvlm.caption_many(batch, batch_size=TOGETHER, max_new_tokens=NEW_TOKENS), strict=True):
            if answer.error is not None:
                reason = str(answer.error)
                continue
            held_out = read % HELD_OUT == HELD_OUT - 1
            read += 1
            texts.append(_prompt(rsvlm, table, path, [int(token) for token in answer.token_ids], held_out))
            sentence = written.get(path.name, answer.text).strip()
            if loaded.config.alignment is not None and sentence:
                texts.append(_embedded(rsvlm, table, sentence, held_out))
        report(start + len(batch))
    if read < HELD_OUT:
        raise InputError(
            f"--calibrate needs at least {HELD_OUT} images that can be read, {read} of {len(images)} can ({reason or 'no more given'}); "
            "pass other images"
        )
    if loaded.config.alignment is not None:
        texts += [_embedded(rsvlm, table, words, False) for words in WORDS]
    return texts


def _native(loaded: LoadedCheckpoint) -> NativeBackend:
    """The checkpoint in the native backend, without a file."""
    state = loaded.model.state_dict()
    laid = lay_out(loaded.config, state, CAPTION_PRECISION)
    weights = {
        name: (kind, rows, columns, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        for name, (kind, rows, columns, values) in laid.items()
    }
    manifest = {"kind": "native", "precision": CAPTION_PRECISION}
    knowledge = None if loaded.knowledge_folder is None else KnowledgeBase.load(loaded.knowledge_folder)
    return NativeBackend(NativePackage(loaded.folder, manifest, loaded.config, weights), knowledge)


def _sentences(images: list[Path]) -> dict[str, str]:
    """RSICD's first sentence of each image, by file name; empty elsewhere."""
    folder = images[0].parent.parent if images else Path()
    if not (folder / "captions.json").is_file():
        return {}
    return {image.path.name: image.captions[0] for image in read_rsicd(folder, "train") if image.captions}


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
