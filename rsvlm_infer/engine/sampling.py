"""Owns the choice of one token from one row of logits. Knows neither batches nor requests, so a row's token cannot depend on them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import BackendError


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64 so that sums over a long answer stay exact enough to compare."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float64)


def choose_token(
    logits: npt.NDArray[np.float32],
    temperature: float,
    top_p: float,
    generator: np.random.Generator,
    allowed_ids: npt.NDArray[np.int64] | None = None,
) -> int:
    """One token id from logits [V].

    temperature 0: the highest logit, ties to the lowest id, no draw. Otherwise one uniform draw through the inverse cumulative
    of the smallest set of most likely tokens (ties by lowest id) whose probability reaches top_p.
    allowed_ids: ascending ids; all others are left out before anything else.

    Raises:
        BackendError: the best logit is not a finite number.
    """
    row = logits if allowed_ids is None else logits[allowed_ids]
    best = row.max()
    if not np.isfinite(best):
        raise BackendError(
            f"logits must be finite, got a maximum of {best}; the weights or this precision overflow: try float32"
        )
    if temperature == 0:
        choice = int(row.argmax())
    else:
        scaled = (row.astype(np.float64) - float(best)) / temperature
        weights = np.exp(scaled)
        order = np.argsort(-weights, kind="stable")  # stable: equal weights stay in id order
        cumulative = np.cumsum(weights[order])
        cumulative /= cumulative[-1]
        kept = min(int(np.searchsorted(cumulative, top_p)) + 1, cumulative.size)
        draw = generator.random() * cumulative[kept - 1]
        choice = int(order[min(int(np.searchsorted(cumulative[:kept], draw, side="right")), kept - 1)])
    return choice if allowed_ids is None else int(allowed_ids[choice])
