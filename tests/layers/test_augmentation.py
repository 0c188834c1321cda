"""Semantic augmentation: gates, scenes kept apart, nothing to read."""

from __future__ import annotations

import torch

from rsvlm_infer.config import AugmentationConfig
from rsvlm_infer.layers.augmentation import Augmentation

WIDTH, EMBED, LANGUAGE = 8, 4, 6
SCENES = torch.tensor([0, 5, 9], dtype=torch.int32)


def _module(gate: float) -> Augmentation:
    torch.manual_seed(0)
    module = Augmentation(AugmentationConfig(num_heads=2), WIDTH, EMBED, LANGUAGE)
    for level in module.levels:
        torch.nn.init.constant_(level.gate, gate)
    return module


def _inputs() -> tuple[list[torch.Tensor], list[list[torch.Tensor]], list[torch.Tensor]]:
    torch.manual_seed(1)
    taps = [torch.randn(9, WIDTH) for _ in range(3)]
    cues = [[torch.randn(count, EMBED) for count in counts] for counts in ((3, 1, 2), (2, 4, 1))]
    return taps, cues, [torch.randn(2, LANGUAGE), torch.randn(5, LANGUAGE)]


def test_gates_start_closed() -> None:
    torch.manual_seed(0)
    taps, cues, queries = _inputs()
    out = Augmentation(AugmentationConfig(2), WIDTH, EMBED, LANGUAGE)(taps, cues, queries, SCENES)
    assert all(torch.equal(one, other) for one, other in zip(out, taps, strict=True))


def test_a_scene_reads_its_own_cues_and_query_only() -> None:
    module, (taps, cues, queries) = _module(1.0), _inputs()
    together = module(taps, cues, queries, SCENES)
    for scene, rows in ((0, slice(0, 5)), (1, slice(5, 9))):
        own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = module([tap[rows] for tap in taps], [cues[scene]], [queries[scene]], own)
        for level in range(3):
            torch.testing.assert_close(together[level][rows], alone[level], atol=1e-6, rtol=1e-6)
            assert not torch.allclose(together[level][rows], taps[level][rows], atol=1e-3)


def test_level_adds_gated_attention_over_cues_then_query() -> None:
    module, (taps, cues, queries) = _module(0.5), _inputs()
    level, features = module.levels[1], taps[1][:5]
    context = torch.cat((module.cue_proj(cues[0][1]), module.query_proj(queries[0])))
    q, k, v = level.q(level.norm(features)).view(5, 2, 4), level.k(context).view(3, 2, 4), level.v(context).view(3, 2, 4)
    weights = (torch.einsum("qhd,khd->hqk", q, k) * 4**-0.5).softmax(dim=-1)
    expected = features + torch.tanh(torch.tensor(0.5)) * level.o(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    torch.testing.assert_close(module(taps, cues, queries, SCENES)[1][:5], expected, atol=1e-5, rtol=1e-5)


def test_without_cues_and_query_nothing_is_added() -> None:
    taps, _, _ = _inputs()
    nothing = [[torch.zeros(0, EMBED)] * 3] * 2
    out = _module(1.0)(taps, nothing, [torch.zeros(0, LANGUAGE)] * 2, SCENES)
    assert all(torch.equal(one, other) for one, other in zip(out, taps, strict=True))
