"""MS-VLAM heads: which features each level reads, unit length, absent heads, ties."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import AlignmentConfig  # noqa: E402
from rsvlm_infer.layers.alignment import Alignment, most_salient  # noqa: E402

CONFIG = AlignmentConfig(embed_size=5, salient_patches=3)
CU_SEQLENS = torch.tensor([0, 9, 13, 20])


def made(config: AlignmentConfig = CONFIG) -> tuple[Alignment, list[torch.Tensor], list[torch.Tensor]]:
    """Heads, three taps [20, 6] and three class tokens [3, 6]."""
    torch.manual_seed(0)
    heads = Alignment(config, vision_size=6, text_size=7, eps=1e-6).eval().requires_grad_(False)
    return heads, [torch.randn(20, 6) for _ in range(3)], [torch.randn(3, 6) for _ in range(3)]


def unit(head: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm, Linear, L2 norm written out in float64."""
    x = x.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    x = x @ head.proj.weight.double().T + (0 if head.proj.bias is None else head.proj.bias.double())
    return (x / x.norm(dim=-1, keepdim=True)).float()


def test_each_level_reads_its_own_tap() -> None:
    heads, taps, class_tokens = made()
    objects, regions, scene = heads(taps, class_tokens, CU_SEQLENS)
    assert (tuple(objects.shape), tuple(regions.shape), tuple(scene.shape)) == ((3, 3, 5), (3, 5), (5,))
    for tile, (start, stop) in enumerate([(0, 9), (9, 13), (13, 20)]):
        torch.testing.assert_close(regions[tile], unit(heads.region, taps[1][start:stop].mean(0)), atol=1e-5, rtol=1e-5)
        own = taps[0][start:stop]
        farthest = (own - own.mean(0)).norm(dim=-1).argsort(descending=True)[:3]
        torch.testing.assert_close(objects[tile], unit(heads.object, own[farthest]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scene, unit(heads.scene, taps[2][:9].mean(0)), atol=1e-5, rtol=1e-5)  # the base tile only
    for part in (objects, regions, scene):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(part.shape[:-1]))


def test_class_pooling_reads_the_base_tiles_class_token() -> None:
    heads, taps, class_tokens = made(dataclasses.replace(CONFIG, pooling="class"))
    scene = heads(taps, class_tokens, CU_SEQLENS)[2]
    torch.testing.assert_close(scene, unit(heads.scene, class_tokens[2][0]), atol=1e-5, rtol=1e-5)


def test_absent_heads_own_no_weights_and_give_nothing() -> None:
    heads, taps, class_tokens = made(dataclasses.replace(CONFIG, levels=("scene",), head_bias=False))
    assert set(heads.state_dict()) == {"scene.norm.weight", "scene.norm.bias", "scene.proj.weight", "text_proj.weight"}
    objects, regions, scene = heads(taps, class_tokens, CU_SEQLENS)
    assert (objects.numel(), regions.numel(), scene.numel()) == (0, 0, 5)


def test_a_tile_shorter_than_the_salient_count() -> None:
    heads, taps, class_tokens = made(dataclasses.replace(CONFIG, salient_patches=8))
    assert heads(taps, class_tokens, CU_SEQLENS)[0].shape == (3, 4, 5)  # the shortest tile has four patches


def test_most_salient_takes_the_farthest_and_ties_to_the_first() -> None:
    tile = torch.tensor([[1.0], [-3.0], [3.0], [0.0], [-1.0]])  # mean 0
    assert most_salient(tile, 4)[:, 0].tolist() == [-3, 3, 1, -1]
    assert most_salient(torch.ones(5, 2) * torch.tensor([[1.0, 2.0]]), 2).tolist() == [[1, 2], [1, 2]]


def test_text_is_projected_and_normalised() -> None:
    heads, _, _ = made()
    states = torch.randn(4, 7)
    expected = states @ heads.text_proj.weight.T + heads.text_proj.bias
    torch.testing.assert_close(heads.embed_text(states), expected / expected.norm(dim=-1, keepdim=True))
