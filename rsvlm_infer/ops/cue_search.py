"""cue_search: the k knowledge entries nearest to a scene and its query, exactly. Knows no texts, no levels and no index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

_CHUNK = 8192  # entries scored at once: at De 512 and 512 visual embeddings the scores then stay below 70 MB

# Products of float16 entries and float32 embeddings are exact in float64 and their sums nearly so: the float32 score of an
# entry then depends neither on chunks nor on threads, and equal entries tie exactly. Another implementation may sum in
# float32: a few roundings of scores of order 1.
TOLERANCE = 2e-6


def cue_search(
    visual: NDArray[np.float32], query: NDArray[np.float32] | None, entries: NDArray[np.float16], k: int, beta: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Entry score = largest dot product over the visual embeddings + beta x dot product with the query.

    Args:
        visual: [V, De] L2-normalised, V >= 1. query: [De] L2-normalised, or None. entries: [M, De] L2-normalised, M may be 0.
        k: how many to return, fewer when M is less.

    Returns:
        Scores float32 [k] in descending order and rows of `entries` int64 [k]; equal scores by the lowest row.

    Raises:
        InputError: shapes that do not fit, k below 1, or values that are not finite.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}; ask for one entry or more")
    width = entries.shape[-1]
    if entries.ndim != 2 or visual.ndim != 2 or len(visual) < 1 or visual.shape[1] != width:
        raise InputError(
            f"visual must be [V >= 1, De] with De of entries [M, De], got {list(visual.shape)} and {list(entries.shape)}; "
            "embed scene and entries with the same checkpoint"
        )
    if query is not None and query.shape != (width,):
        raise InputError(f"query must be [De] with De = {width}, got {list(query.shape)}; embed it with the same checkpoint")
    if not (np.isfinite(visual).all() and np.isfinite(beta) and (query is None or np.isfinite(query).all())):
        raise InputError("visual, query and beta must be finite, got NaN or infinity; look for an overflow in the embedding")
    scores = np.empty(len(entries), dtype=np.float32)
    seen = visual.astype(np.float64).T  # [De, V]
    asked = None if query is None else beta * query.astype(np.float64)  # [De]
    for start in range(0, len(entries), _CHUNK):
        chunk = entries[start : start + _CHUNK].astype(np.float64)  # [C, De]
        best = (chunk @ seen).max(axis=1)  # [C]
        scores[start : start + _CHUNK] = best if asked is None else best + chunk @ asked
    return _top(scores, min(k, len(scores)))


def _top(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if k == 0:
        return scores[:0], np.zeros(0, dtype=np.int64)
    kth = np.partition(scores, len(scores) - k)[len(scores) - k]
    rows = np.flatnonzero(scores >= kth)  # ascending, so that the stable sort leaves ties with the lowest row in front
    rows = rows[np.argsort(-scores[rows], kind="stable")][:k].astype(np.int64)
    return scores[rows], rows
