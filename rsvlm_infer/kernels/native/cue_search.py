"""cue_search through rsvlm_infer._C: a float32 pass with error bounds, then exact sums of what can still win. Owns no arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ...hardware import native_why_not
from ...ops.cue_search import cue_search as eager


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def cue_search(
    visual: NDArray[np.float32], query: NDArray[np.float32] | None, entries: NDArray[np.float16], k: int, beta: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """See `rsvlm_infer.ops.cue_search.cue_search`."""
    from rsvlm_infer import _C

    eager(visual, query, entries[:0], k, beta)  # its checks, without its work
    if entries.dtype != np.float16:
        raise InputError(f"entries must be float16 for the native implementation, got {entries.dtype}; convert or use 'eager'")
    return _C.cue_search(
        visual=np.ascontiguousarray(visual, dtype=np.float32),
        query=None if query is None else np.ascontiguousarray(query, dtype=np.float32),
        entries=np.ascontiguousarray(entries).view(np.uint16),
        k=k,
        beta=beta,
    )
