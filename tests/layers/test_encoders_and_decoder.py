"""Vision encoder, text encoder and decoder beyond what the comparison with transformers shows: caches, padding, order."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.layers.language_model import KvCache, LanguageModel  # noqa: E402
from rsvlm_infer.layers.text_encoder import TextEncoder  # noqa: E402
from rsvlm_infer.layers.vision_encoder import VisionEncoder  # noqa: E402
from tests.models.tiny import LANGUAGE, TEXT_ENCODER, VISION  # noqa: E402

GRIDS = torch.tensor([[3, 1], [2, 2], [1, 5]])
CU_SEQLENS = torch.tensor([0, 3, 7, 12])


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def patches() -> torch.Tensor:
    return torch.randn(12, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("class_token", [True, False])
def test_a_tile_is_the_same_alone_and_among_others(class_token: bool) -> None:
    encoder = randomised(VisionEncoder(dataclasses.replace(VISION, class_token=class_token)))
    taps, class_tokens = encoder(patches(), CU_SEQLENS, GRIDS)
    assert [tuple(tokens.shape) for tokens in class_tokens] == [(3 if class_token else 0, 16)] * 3
    for tile, (start, stop) in enumerate([(0, 3), (3, 7), (7, 12)]):
        alone, alone_class = encoder(patches()[start:stop], torch.tensor([0, stop - start]), GRIDS[tile : tile + 1])
        for level in range(3):
            torch.testing.assert_close(taps[level][start:stop], alone[level], atol=1e-5, rtol=1e-5)
            if class_token:
                torch.testing.assert_close(class_tokens[level][tile], alone_class[level][0], atol=1e-5, rtol=1e-5)


def test_a_changed_position_table_never_meets_a_stale_one() -> None:
    encoder = randomised(VisionEncoder(VISION))
    with torch.inference_mode():
        first = encoder(patches(), CU_SEQLENS, GRIDS)[0][0]
        again = encoder(patches(), CU_SEQLENS, GRIDS)[0][0]
    assert torch.equal(first, again)
    encoder.position_table.mul_(2)
    fresh = VisionEncoder(VISION)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(patches(), CU_SEQLENS, GRIDS)[0][0], fresh(patches(), CU_SEQLENS, GRIDS)[0][0])


def test_a_trainable_position_table_gets_gradients_on_every_grid() -> None:
    encoder = randomised(VisionEncoder(VISION))
    encoder(patches(), CU_SEQLENS, GRIDS)  # fills the cache
    encoder.position_table.requires_grad_(True)
    encoder(patches(), CU_SEQLENS, GRIDS)[0][0].square().sum().backward()
    assert encoder.position_table.grad is not None
    assert (encoder.position_table.grad.abs().sum(-1) > 0).all()


def test_bilinear_positions() -> None:
    encoder = randomised(VisionEncoder(dataclasses.replace(VISION, interpolation="bilinear", class_token=False)))
    table = encoder.position_table.view(2, 2, 16)
    middle = encoder._grid_positions(1, 1)[0]
    torch.testing.assert_close(middle, table.mean(dim=(0, 1)))  # one patch in the centre of the four
    wide = encoder._grid_positions(2, 4).view(2, 4, 16)
    torch.testing.assert_close(wide[:, 1], 0.75 * table[:, 0] + 0.25 * table[:, 1])


def test_layer_scale_of_zero_leaves_the_stream() -> None:
    encoder = randomised(VisionEncoder(dataclasses.replace(VISION, layer_scale=True, taps=(0, 1, 3))))
    for block in encoder.blocks:
        block.scale1.zero_()
        block.scale2.zero_()
    taps, _ = encoder(patches(), CU_SEQLENS, GRIDS)
    assert torch.equal(taps[0], taps[1])
    assert torch.equal(taps[0], taps[2])


def test_text_encoder_pools_at_the_first_end_and_ignores_padding() -> None:
    encoder = randomised(TextEncoder(TEXT_ENCODER))
    ids = torch.tensor([[5, 6, 39, 0, 0], [7, 39, 39, 39, 39]])
    out = encoder(ids)
    torch.testing.assert_close(out[0], encoder(ids[:1, :3])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], encoder(ids[1:, :2])[0], atol=1e-5, rtol=1e-5)
    legacy = randomised(TextEncoder(dataclasses.replace(TEXT_ENCODER, eos_token_id=2)))
    assert torch.equal(legacy(ids), out)  # 39 is the highest id


def decoder() -> LanguageModel:
    module = randomised(LanguageModel(LANGUAGE))
    assert isinstance(module, LanguageModel)
    return module


@pytest.mark.parametrize("split", [1, 4, 6])
def test_a_cache_filled_in_parts_gives_the_states_of_one_pass(split: int) -> None:
    model = decoder()
    embeds = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(7).expand(2, -1)
    whole = model(embeds, positions)
    cache = KvCache.empty(LANGUAGE, 2, 9, embeds)
    parts = [model(embeds[:, :split], positions[:, :split], cache), model(embeds[:, split:], positions[:, split:], cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_may_stand_at_different_places() -> None:
    model = decoder()
    embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3))
    cache = KvCache.empty(LANGUAGE, 2, 6, embeds)
    model(embeds[:, :5], torch.arange(5).expand(2, -1), cache)
    step = model(torch.stack([embeds[0, 5:], embeds[1, 3:4]]), torch.tensor([[5], [3]]), cache)
    positions = torch.arange(6).expand(2, -1)
    whole = model(embeds, positions)
    torch.testing.assert_close(step[0, 0], whole[0, 5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step[1, 0], whole[1, 3], atol=1e-5, rtol=1e-5)


def test_kept_rows_of_a_cache_are_a_copy_in_the_given_order() -> None:
    cache = KvCache.empty(LANGUAGE, 3, 2, torch.zeros(1))
    cache.keys += torch.arange(3.0).view(1, 3, 1, 1, 1)
    cache.lengths = torch.tensor([4, 5, 6])
    kept = cache.keep(torch.tensor([2, 0]))
    assert kept.lengths.tolist() == [6, 4]
    assert kept.keys[0, :, 0, 0, 0].tolist() == [2, 0]
    kept.keys.zero_()
    assert cache.keys[0, 2, 0, 0, 0] == 2


def test_tied_and_untied_heads() -> None:
    tied = decoder()
    assert "lm_head.weight" not in tied.state_dict()
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embed_tokens.weight.T)
    untied = randomised(LanguageModel(dataclasses.replace(LANGUAGE, tie_embeddings=False)))
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.lm_head.weight.T)
