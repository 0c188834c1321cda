"""complexity_map through rsvlm_infer._C. Owns no arithmetic: same contract and equal bits as the eager definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...hardware import native_why_not
from ...ops.complexity_map import check_complexity_map


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def complexity_map(gray: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """See `rsvlm_infer.ops.complexity_map.complexity_map`."""
    from rsvlm_infer import _C

    check_complexity_map(gray, mask)
    return _C.complexity_map(gray=np.ascontiguousarray(gray), mask=np.ascontiguousarray(mask))
