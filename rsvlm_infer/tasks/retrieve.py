"""Owns the alignment score between images and texts, and the relevance map made of it. Knows only embeddings, not their models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..backends.base import Embeddings
from ..config import LEVELS, AlignmentConfig, RsvlmConfig
from ..engine.checks import check_text
from ..errors import CheckpointError, InputError

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

RELEVANCE_SIDE = 64  # cells on the long side of a relevance map; finer than any coarse plan


def require_alignment(config: RsvlmConfig) -> AlignmentConfig:
    """The alignment settings, or an InputError for a checkpoint without alignment heads."""
    if config.alignment is None:
        raise InputError("this checkpoint has no alignment heads, so it cannot embed or score; use a checkpoint that has them")
    return config.alignment


def text_ids(tokenizer: Tokenizer, config: RsvlmConfig, text: str) -> npt.NDArray[np.int32]:
    """Token ids [n] of a text to embed, inside the checkpoint's text template.

    CLIP's begin and end tokens are added for a text encoder, nothing for the language model.

    Raises:
        InputError: no text, a blank one, or one longer than the text model reads.
    """
    check_text("text", text)
    alignment = require_alignment(config)
    from_encoder = alignment.text_source == "text_encoder"
    reader = config.text_encoder if from_encoder else config.language
    if not text.strip():
        raise InputError(f"text must not be blank, got {text!r}; pass some words")
    ids = tokenizer.encode(alignment.text_template.replace("{}", text.strip()), add_special=from_encoder)
    if reader is not None and len(ids) > reader.max_positions:
        raise InputError(f"text must be at most {reader.max_positions} tokens, got {len(ids)}; shorten {text[:40]!r}...")
    return np.array(ids, dtype=np.int32)


def alignment_scores(image: Embeddings, texts: npt.NDArray[np.float32], alignment: AlignmentConfig) -> npt.NDArray[np.float32]:
    """Score [N] of one image with texts [N, De]: w_g cos(scene) + w_r max over tiles cos(region) + w_o mean of the top cos(object).

    Raises:
        CheckpointError: a level with a weight that the checkpoint has no head for.
    """
    global_weight, region_weight, object_weight = alignment.weights
    scores = np.zeros(texts.shape[0], dtype=np.float32)
    if global_weight:
        scores += global_weight * (texts @ _present(image.scene, 2))
    if region_weight:
        scores += region_weight * (texts @ _present(image.region, 1).T).max(axis=1)
    if object_weight:
        cosines = texts @ _present(image.object, 0).reshape(-1, texts.shape[1]).T  # [N, T k]
        top = min(alignment.salient_patches, cosines.shape[1])
        scores += object_weight * np.sort(cosines, axis=1)[:, -top:].mean(axis=1)
    return scores


def softmax_scores(scores: npt.NDArray[np.floating], scale: float) -> npt.NDArray[np.float64]:
    """Probabilities [N] of scores [N] at an inverse temperature."""
    scaled = scores.astype(np.float64) * scale
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def relevance_map(
    boxes: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], height: int, width: int
) -> npt.NDArray[np.float32]:
    """How much each place of a scene concerns a query, in [0, 1]: float32 [h, w] over the scene, long side RELEVANCE_SIDE.

    boxes: (cx, cy, w, h) of the tiles as shares of the scene, [T, 4] · scores: region cosines [T]. Small tiles lie over large
    ones. Equal scores say nothing, so they give 1 everywhere and change no plan.
    """
    scale = RELEVANCE_SIDE / max(height, width)
    rows, cols = max(1, round(height * scale)), max(1, round(width * scale))
    relevance = np.ones((rows, cols), dtype=np.float32)
    low, high = float(scores.min()), float(scores.max())
    if high - low < 1e-6:
        return relevance
    for index in np.argsort(-boxes[:, 2] * boxes[:, 3], kind="stable"):
        cx, cy, w, h = (float(value) for value in boxes[index])
        top, left = max(0, round((cy - h / 2) * rows)), max(0, round((cx - w / 2) * cols))
        bottom, right = max(top + 1, round((cy + h / 2) * rows)), max(left + 1, round((cx + w / 2) * cols))
        relevance[top:bottom, left:right] = (float(scores[index]) - low) / (high - low)
    return relevance


def _present(embedding: npt.NDArray[np.float32], level: int) -> npt.NDArray[np.float32]:
    if embedding.size == 0:
        raise CheckpointError(
            f"alignment.weights give the {LEVELS[level]} level a weight, but the checkpoint has no {LEVELS[level]} head; "
            "set that weight to 0 in config.json"
        )
    return embedding
