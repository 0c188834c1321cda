"""cell_means through rsvlm_infer._C. Owns no arithmetic: same contract and equal bits as the eager definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...hardware import native_why_not
from ...ops.cell_means import Cells, check_cell_means


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def cell_means(
    values: NDArray[Any],
    factor: int,
    valid: NDArray[np.bool_] | None = None,
    nodata: Sequence[int] | None = None,
    out: Cells | None = None,
) -> Cells:
    """See `rsvlm_infer.ops.cell_means.cell_means`. Rows of `out` that are not contiguous cost a copy."""
    from rsvlm_infer import _C

    check_cell_means(values, factor, valid, nodata, out)
    shape = (len(values), *(-(-side // factor) for side in values.shape[1:]))
    ours = out
    if ours is None or not all(_rows_in_order(part) for part in ours):
        ours = np.empty(shape, values.dtype), np.empty(shape, np.bool_)
    _C.cell_means(
        values=np.ascontiguousarray(values),
        factor=factor,
        valid=None if valid is None else np.ascontiguousarray(valid),
        nodata=None if nodata is None else np.array([int(value) for value in nodata], dtype=values.dtype),
        means=ours[0],
        found=ours[1],
    )
    if out is None:
        return ours
    if ours is not out:
        out[0][...], out[1][...] = ours
    return out


def _rows_in_order(part: NDArray[Any]) -> bool:
    """Whether the pixels of a row lie side by side and rows and bands further on in memory, each on its element's boundary."""
    return (
        part.strides[2] == part.itemsize and all(s > 0 and s % part.itemsize == 0 for s in part.strides) and part.flags.aligned
    )
