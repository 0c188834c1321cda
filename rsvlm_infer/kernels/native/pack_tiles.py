"""pack_tiles through rsvlm_infer._C. Owns no arithmetic: the same uint8 canvas as Pillow, fused with the rest of the op.

Faster than eager because it resamples only what the crop needs, 16 rows per step in SIMD lanes, and on every core.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...hardware import native_why_not
from ...ops.pack_tiles import check_pack_tiles, vertical_first


def why_not() -> str | None:
    """Why this twin cannot run here; None when it can."""
    return native_why_not()


def pack_tiles(
    images: Sequence[NDArray[np.uint8]],
    canvases: ArrayLike,
    crops: ArrayLike,
    grids: ArrayLike,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str,
    fill: Sequence[int],
) -> NDArray[np.float32]:
    """See `rsvlm_infer.ops.pack_tiles.pack_tiles`."""
    from rsvlm_infer import _C

    canvases, crops, grids = check_pack_tiles(images, canvases, crops, grids, patch, mean, std, resample, fill)
    # row strides may be anything (a window of a scene); only the pixels of a row must be contiguous
    images = [image if image.strides[1:] == (3, 1) else np.ascontiguousarray(image) for image in images]
    return _C.pack_tiles(
        images=images,
        canvases=canvases,
        crops=crops,
        grids=grids,
        vertical_first=[vertical_first(image.shape, canvas) for image, canvas in zip(images, canvases.tolist(), strict=True)],
        patch=int(patch),
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
        resample=resample,
        fill=[int(value) for value in fill],
    )
