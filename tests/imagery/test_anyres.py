"""LLaVA-NeXT geometry against the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsvlm_infer.imagery.anyres import best_resolution, fit_inside, kept_window
from tests.imagery.configs import NEXT_PINPOINTS

sides = st.integers(1, 6000)


def test_known_scenes() -> None:
    assert best_resolution(256, 256, NEXT_PINPOINTS) == (336, 672)
    assert best_resolution(512, 512, NEXT_PINPOINTS) == (672, 672)
    assert best_resolution(600, 1000, NEXT_PINPOINTS) == (672, 672)
    assert best_resolution(300, 1000, NEXT_PINPOINTS) == (336, 1008)
    assert fit_inside(600, 1000, (672, 672)) == (404, 672)
    assert kept_window(600, 1000, 48, 48) == (10, 38, 0, 48)
    assert kept_window(256, 256, 24, 48) == (0, 24, 12, 36)


@given(sides, sides)
def test_equals_transformers(height: int, width: int) -> None:
    utils = pytest.importorskip("transformers.image_processing_utils")
    target = best_resolution(height, width, NEXT_PINPOINTS)
    assert target == utils.select_best_resolution((height, width), [list(pinpoint) for pinpoint in NEXT_PINPOINTS])
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    channel_last = utils.ChannelDimension.LAST if hasattr(utils, "ChannelDimension") else "channels_last"
    assert fit_inside(height, width, target) == utils.get_patch_output_size(image, target, channel_last)


@given(sides, sides)
def test_unpadding_equals_transformers(height: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    llava_next = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    target = best_resolution(height, width, NEXT_PINPOINTS)
    rows, cols = target[0] // 14, target[1] // 14
    numbers = torch.arange(rows * cols).view(1, rows, cols)
    top, bottom, left, right = kept_window(height, width, rows, cols)
    assert torch.equal(numbers[:, top:bottom, left:right], llava_next.unpad_image(numbers, (height, width)))
