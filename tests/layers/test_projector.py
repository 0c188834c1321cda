"""Projector and visual-token order: values against index arithmetic, and what is off is absent."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import ProjectorConfig  # noqa: E402
from rsvlm_infer.layers.projector import Projector, assemble_anyres  # noqa: E402

GRIDS = torch.tensor([[4, 4], [2, 6], [2, 2]])
BOXES = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0], [0.75, 0.75, 0.5, 0.5]])
PATCHES = 16 + 12 + 4


def features(width: int = 6) -> torch.Tensor:
    return torch.randn(PATCHES, width, generator=torch.Generator().manual_seed(0))


def test_two_layers_with_gelu_between() -> None:
    projector = Projector(ProjectorConfig(hidden_size=10), 6, 8)
    x = features()
    expected = projector.fc2(torch.nn.functional.gelu(projector.fc1(x)))
    tiles = projector(x, GRIDS, None)
    assert [tuple(tile.shape) for tile in tiles] == [(16, 8), (12, 8), (4, 8)]
    torch.testing.assert_close(torch.cat(tiles), expected)


def test_options_that_are_off_own_no_weights() -> None:
    assert set(Projector(ProjectorConfig(hidden_size=10), 6, 8).state_dict()) == {
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    }
    full = Projector(ProjectorConfig(hidden_size=10, input_norm=True, box_embedding=True, pixel_shuffle=2), 6, 8)
    assert {"input_norm.weight", "input_norm.bias", "box.weight"} <= set(full.state_dict())
    assert full.fc1.in_features == 24


def test_pixel_shuffle_merges_the_2x2_blocks_of_one_tile() -> None:
    """Token (r, c) of a tile reads patches (2r, 2c), (2r, 2c+1), (2r+1, 2c), (2r+1, 2c+1) of that tile."""
    projector = Projector(ProjectorConfig(hidden_size=5, pixel_shuffle=2), 6, 8)
    x = features()
    tiles = projector(x, GRIDS, None)
    start = 0
    for tile, (rows, columns) in zip(tiles, GRIDS.tolist(), strict=True):
        square = x[start : start + rows * columns].reshape(rows, columns, 6)
        expected = [
            torch.cat([square[r, c], square[r, c + 1], square[r + 1, c], square[r + 1, c + 1]])
            for r in range(0, rows, 2)
            for c in range(0, columns, 2)
        ]
        merged = projector.fc2(torch.nn.functional.gelu(projector.fc1(torch.stack(expected))))
        torch.testing.assert_close(tile, merged)
        start += rows * columns


def test_box_embedding_starts_at_zero_and_then_shifts_whole_tiles() -> None:
    projector = Projector(ProjectorConfig(hidden_size=10, box_embedding=True), 6, 8)
    plain = projector(features(), GRIDS, None)
    for one, other in zip(plain, projector(features(), GRIDS, BOXES), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        projector.box.weight.normal_()
    for tile, (one, other) in enumerate(zip(plain, projector(features(), GRIDS, BOXES), strict=True)):
        torch.testing.assert_close(other - one, (projector.box.weight @ BOXES[tile]).expand_as(one), atol=1e-5, rtol=1e-5)
    for one, other in zip(plain, projector(features(), GRIDS, None), strict=True):
        assert torch.equal(one, other)  # outside `dris` no boxes are given, and nothing is added


def test_input_norm_comes_first() -> None:
    projector = Projector(ProjectorConfig(hidden_size=10, input_norm=True), 6, 8)
    x = features()
    scaled = torch.cat(projector(x * 50 + 3, GRIDS, None))
    torch.testing.assert_close(scaled, torch.cat(projector(x, GRIDS, None)), atol=1e-4, rtol=1e-4)


def test_anyres_order_newlines_and_unpadding() -> None:
    """Base tile, then the canvas of 2 x 1 tiles of 2 x 2 patches row by row, its first row and last column cut off."""
    tiles = [torch.arange(4.0)[:, None] + 100 * number for number in range(3)]  # values: 100 · tile + patch
    out = assemble_anyres(tiles, (2, 1), 2, (1, 4, 0, 1), torch.tensor([-1.0]))
    assert out[:, 0].tolist() == [0, 1, 2, 3, 102, -1, 200, -1, 202, -1]


def test_anyres_of_a_wide_canvas() -> None:
    tiles = [torch.arange(4.0)[:, None] + 100 * number for number in range(3)]
    out = assemble_anyres(tiles, (1, 2), 2, (0, 2, 0, 4), torch.tensor([-1.0]))
    assert out[4:, 0].tolist() == [100, 101, 200, 201, -1, 102, 103, 202, 203, -1]
