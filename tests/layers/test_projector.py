"""Projector and the order of visual tokens."""

from __future__ import annotations

import torch

from rsvlm_infer.config import ProjectorConfig
from rsvlm_infer.layers.projector import Projector, assemble_anyres


def test_pixel_shuffle_joins_the_four_neighbours_of_one_tile() -> None:
    projector = Projector(ProjectorConfig(8, pixel_shuffle=2), 1, 8)
    projector.fc1, projector.fc2, projector.activation = torch.nn.Identity(), torch.nn.Identity(), lambda x: x  # type: ignore[assignment]
    features = torch.arange(16 + 8, dtype=torch.float32)[:, None]
    first, second = projector(features, torch.tensor([[4, 4], [2, 4]]), None)
    assert first.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert second.tolist() == [[16, 17, 20, 21], [18, 19, 22, 23]]


def test_boxes_start_without_effect_and_reach_every_token_of_their_tile() -> None:
    projector = Projector(ProjectorConfig(8, box_embedding=True), 6, 5)
    features, grids = torch.randn(4 + 2, 6), torch.tensor([[2, 2], [1, 2]])
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 0.5, 0.5]])
    plain = projector(features, grids, None)
    assert all(torch.equal(one, other) for one, other in zip(plain, projector(features, grids, boxes), strict=True))
    assert projector.box is not None
    torch.nn.init.ones_(projector.box.weight)
    moved = projector(features, grids, boxes)
    torch.testing.assert_close(moved[0] - plain[0], torch.full((4, 5), 3.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[1] - plain[1], torch.full((2, 5), 2.0), atol=1e-5, rtol=0)


def test_input_norm_takes_out_scale_and_shift() -> None:
    projector = Projector(ProjectorConfig(8, input_norm=True), 6, 5)
    features, grids = torch.randn(4, 6), torch.tensor([[2, 2]])
    torch.testing.assert_close(
        projector(features * 50 + 7, grids, None)[0], projector(features, grids, None)[0], atol=1e-4, rtol=1e-4
    )


def test_anyres_puts_a_newline_after_each_kept_row() -> None:
    tiles = [torch.full((4, 1), 100.0), *(torch.arange(4.0)[:, None] + 10 * number for number in range(2))]
    tokens = assemble_anyres(tiles, (1, 2), 2, (0, 2, 1, 4), torch.tensor([-1.0]))
    assert tokens[:, 0].tolist() == [100] * 4 + [1, 10, 11, -1] + [3, 12, 13, -1]
