"""MS-VLAM heads: what each level reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rsvlm_infer.config import AlignmentConfig
from rsvlm_infer.layers.alignment import Alignment, most_salient

WIDTH, EMBED = 6, 4
BOUNDS = torch.tensor([0, 4, 6, 12])


def _taps(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randn((12, WIDTH), generator=torch.Generator().manual_seed(seed + level)) for level in range(3)]


def _expected(head: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(head.proj(head.norm(x)), dim=-1)  # type: ignore[operator]


def test_levels_read_salient_patches_tile_means_and_the_base_tile() -> None:
    torch.manual_seed(0)
    alignment, taps = Alignment(AlignmentConfig(EMBED, salient_patches=3), WIDTH, 8, 1e-6), _taps()
    nothing = [torch.zeros((0, WIDTH))] * 3
    objects, regions, scene = alignment(taps, nothing, BOUNDS)
    assert objects.shape == (3, 2, EMBED)  # the shortest tile has two patches
    assert alignment.region is not None
    assert alignment.scene is not None
    assert alignment.object is not None
    torch.testing.assert_close(regions[1], _expected(alignment.region, taps[1][4:6].mean(dim=0)))
    torch.testing.assert_close(scene, _expected(alignment.scene, taps[2][:4].mean(dim=0)))
    torch.testing.assert_close(objects[2], _expected(alignment.object, most_salient(taps[0][6:], 2)))
    torch.testing.assert_close(objects.norm(dim=-1), torch.ones(3, 2))


def test_class_pooling_reads_the_base_tiles_class_token() -> None:
    alignment = Alignment(AlignmentConfig(EMBED, pooling="class", levels=("scene",), head_bias=False), WIDTH, 8, 1e-6)
    class_tokens = [torch.randn(3, WIDTH) for _ in range(3)]
    objects, regions, scene = alignment(_taps(), class_tokens, BOUNDS)
    assert alignment.object is None
    assert alignment.region is None
    assert alignment.scene is not None
    assert objects.numel() == regions.numel() == 0
    torch.testing.assert_close(scene, _expected(alignment.scene, class_tokens[2][0]))
    assert alignment.scene.proj.bias is None


def test_most_salient_is_farthest_from_the_mean_and_ties_keep_their_order() -> None:
    tile = torch.tensor([[0.0], [5.0], [0.0], [-6.0], [5.0]])  # mean 0.8
    assert most_salient(tile, 4)[:, 0].tolist() == [-6.0, 5.0, 5.0, 0.0]
