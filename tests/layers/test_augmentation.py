"""Semantic augmentation: the formula in float64, closed gates, scenes that do not see each other, empty contexts."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import AugmentationConfig  # noqa: E402
from rsvlm_infer.layers.augmentation import Augmentation  # noqa: E402

CU_SCENES = torch.tensor([0, 7, 12])
WIDTH, EMBED, LANGUAGE, HEADS = 8, 5, 6, 2


def made(gate: float = 0.7) -> tuple[Augmentation, list[torch.Tensor], list[list[torch.Tensor]], list[torch.Tensor]]:
    """Module, three taps [12, 8], cues of two scenes (3 and 2 per level), queries of 4 and 1 tokens."""
    torch.manual_seed(0)
    module = Augmentation(AugmentationConfig(num_heads=HEADS), WIDTH, EMBED, LANGUAGE).eval().requires_grad_(False)
    for level in module.levels:
        level.gate.fill_(gate)
    taps = [torch.randn(12, WIDTH) for _ in range(3)]
    cues = [[torch.randn(count, EMBED) for _ in range(3)] for count in (3, 2)]
    return module, taps, cues, [torch.randn(4, LANGUAGE), torch.randn(1, LANGUAGE)]


def linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())


def expected(module: Augmentation, level: int, features: torch.Tensor, cues: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """H_l of one scene, head by head, in float64."""
    block, x = module.levels[level], features.double()
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    context = torch.cat([linear(module.cue_proj, cues.double()), linear(module.query_proj, query.double())])
    q, k, v = linear(block.q, normed), linear(block.k, context), linear(block.v, context)
    size = WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
    return (x + math.tanh(float(block.gate)) * linear(block.o, torch.cat(heads, -1))).float()


def test_formula_per_scene_and_level() -> None:
    module, taps, cues, queries = made()
    out = module(taps, cues, queries, CU_SCENES)
    for level in range(3):
        for scene, (start, stop) in enumerate([(0, 7), (7, 12)]):
            wanted = expected(module, level, taps[level][start:stop], cues[scene][level], queries[scene])
            torch.testing.assert_close(out[level][start:stop], wanted, atol=1e-5, rtol=1e-5)
            assert not torch.equal(out[level][start:stop], taps[level][start:stop])


def test_closed_gates_change_nothing() -> None:
    module, taps, cues, queries = made(gate=0.0)
    for before, after in zip(taps, module(taps, cues, queries, CU_SCENES), strict=True):
        assert torch.equal(before, after)
    fresh = Augmentation(AugmentationConfig(num_heads=HEADS), WIDTH, EMBED, LANGUAGE)
    assert [level.gate.item() for level in fresh.levels] == [0, 0, 0]  # so does an untrained module


def test_a_scene_does_not_see_another_scenes_cues() -> None:
    module, taps, cues, queries = made()
    before = module(taps, cues, queries, CU_SCENES)
    cues[1] = [cue * 9 for cue in cues[1]]
    after = module(taps, cues, queries, CU_SCENES)
    for level in range(3):
        assert torch.equal(before[level][:7], after[level][:7])
        assert not torch.equal(before[level][7:], after[level][7:])


def test_levels_have_their_own_cues() -> None:
    module, taps, cues, queries = made()
    before = module(taps, cues, queries, CU_SCENES)
    cues[0][1] = cues[0][1] + 1
    after = module(taps, cues, queries, CU_SCENES)
    assert [torch.equal(before[level], after[level]) for level in range(3)] == [True, False, True]


def test_without_cues_and_query_a_scene_stays_as_it_is() -> None:
    module, taps, cues, queries = made()
    nothing = [torch.zeros(0, EMBED) for _ in range(3)]
    out = module(taps, [nothing, cues[1]], [torch.zeros(0, LANGUAGE), queries[1]], CU_SCENES)
    for level in range(3):
        assert torch.equal(out[level][:7], taps[level][:7])
        wanted = expected(module, level, taps[level][7:], cues[1][level], queries[1])
        torch.testing.assert_close(out[level][7:], wanted, atol=1e-5, rtol=1e-5)
    out = module(taps, [nothing, nothing], [torch.zeros(0, LANGUAGE)] * 2, CU_SCENES)
    assert all(torch.equal(before, after) for before, after in zip(taps, out, strict=True))


def test_cues_alone_and_query_alone() -> None:
    module, taps, cues, queries = made()
    nothing = [torch.zeros(0, EMBED) for _ in range(3)]
    out = module(taps, [cues[0], nothing], [torch.zeros(0, LANGUAGE), queries[1]], CU_SCENES)
    alone = expected(module, 0, taps[0][:7], cues[0][0], torch.zeros(0, LANGUAGE))
    torch.testing.assert_close(out[0][:7], alone, atol=1e-5, rtol=1e-5)
    asked = expected(module, 2, taps[2][7:], nothing[2], queries[1])
    torch.testing.assert_close(out[2][7:], asked, atol=1e-5, rtol=1e-5)
