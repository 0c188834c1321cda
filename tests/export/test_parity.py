"""Every graph of a package against the eager backend in float32, on tiny random models with every part present and absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.export.packages import CONFIGS, Pair, greedy, packed, prompt, query, relative, torch

Get = Callable[..., Pair]

# fp32 through up to four blocks, other orders of sums: 3e-7 of scale is typical, a swapped weight gives 0.1
PARITY = 1e-5
GENERATIVE = [name for name, config in CONFIGS.items() if config.language is not None]
# (height, width) of the scene: several lengths of tiles, a strip, and one that is a single tile
SIZES = [(90, 130), (150, 33), (32, 32)]


@pytest.mark.parametrize("name", CONFIGS)
def test_taps_and_class_tokens(pair: Get, name: str) -> None:
    made = pair(name)
    scenes = [packed(made.config, *size) for size in SIZES]
    taps, class_tokens, tiles, patches = made.eager._encode_tiles(scenes)
    found = made.onnx.encode_tiles(scenes)
    for level, tap in enumerate(("tap_object", "tap_region", "tap_scene")):
        assert relative(np.concatenate([each[tap] for each in found]), taps[level]) < PARITY
    if made.config.vision.class_token:
        assert relative(np.concatenate([each["class_tokens"] for each in found]), class_tokens[2]) < PARITY
    assert [len(each["tap_scene"]) for each in found] == patches
    assert sum(tiles) > len(SIZES) or made.config.tiling == "fixed"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_embeddings_and_visual_tokens(pair: Get, name: str, size: tuple[int, int]) -> None:
    made = pair(name)
    scene = packed(made.config, *size)
    for words in (0, 4) if made.config.augmentation is not None else (None,):
        queries = None if words is None else [query(made.eager, words)]
        (expected,), (found,) = made.eager.encode([scene], queries), made.onnx.encode([scene], queries)
        assert (found.num_tokens, found.cues) == (expected.num_tokens, expected.cues)
        if made.config.language is not None:
            assert relative(found.handle.tokens, expected.handle.tokens) < PARITY
        if made.config.alignment is not None:
            for level in ("object", "region", "scene"):
                assert relative(getattr(found.handle.embeddings, level), getattr(expected.handle.embeddings, level)) < PARITY, (
                    level
                )
    if made.config.augmentation is not None:
        assert len(found.cues) == 3 * min(made.config.augmentation.cues_per_level, 5)


@pytest.mark.parametrize("tiling", ["fixed", "dris", "anyres"])
def test_every_tiling_of_one_package(pair: Get, tiling: str) -> None:
    made = pair("full")
    scene = packed(made.config, 90, 130, tiling=tiling)
    (expected,), (found,) = made.eager.encode([scene]), made.onnx.encode([scene])
    assert relative(found.handle.tokens, expected.handle.tokens) < PARITY


def test_without_knowledge_and_query_augmentation_changes_nothing(pair: Get) -> None:
    made = pair("augmented")
    scene = packed(made.config, 90, 130)
    kept = made.eager.knowledge, made.onnx.knowledge
    made.eager.knowledge = made.onnx.knowledge = None
    try:
        (expected,), (found,) = made.eager.encode([scene]), made.onnx.encode([scene])
    finally:
        made.eager.knowledge, made.onnx.knowledge = kept
    assert found.cues == ()
    assert relative(found.handle.tokens, expected.handle.tokens) < PARITY


@pytest.mark.parametrize("name", GENERATIVE)
def test_prefill_decode_and_greedy_tokens(pair: Get, name: str) -> None:
    made = pair(name)
    scenes = [packed(made.config, *size) for size in SIZES]
    texts = [[5, 6, 7], [8], [9, 10]]
    expected = [prompt(each, text) for each, text in zip(made.eager.encode(scenes), texts, strict=True)]
    found = [prompt(each, text) for each, text in zip(made.onnx.encode(scenes), texts, strict=True)]
    assert len({len(each.token_ids) for each in found}) > 1  # rows are padded
    capacity = max(len(each.token_ids) for each in found) + 6
    eager_logits, eager_cache = made.eager.prefill(expected, capacity)
    logits, cache = made.onnx.prefill(found, capacity)
    assert relative(logits, eager_logits) < PARITY
    for step in range(5):
        if step == 2:  # a row leaves, the others change places, one is there twice
            eager_cache, cache = made.eager.keep(eager_cache, [2, 0, 2]), made.onnx.keep(cache, [2, 0, 2])
            eager_logits = eager_logits[[2, 0, 2]]
        chosen = eager_logits.argmax(axis=1).astype(np.int32)
        eager_logits, logits = made.eager.decode(eager_cache, chosen), made.onnx.decode(cache, chosen)
        assert relative(logits, eager_logits) < PARITY, step
    assert greedy(made.onnx, found, 8) == greedy(made.eager, expected, 8)


@pytest.mark.parametrize("name", ["llava", "full", "llava_next"])
def test_batches_equal_single_runs(pair: Get, name: str) -> None:
    made = pair(name)
    scenes = [packed(made.config, *size) for size in SIZES]
    together = made.onnx.encode(scenes)
    alone = [made.onnx.encode([scene])[0] for scene in scenes]
    for one, other in zip(together, alone, strict=True):
        assert relative(one.handle.tokens, other.handle.tokens) < PARITY
    prompts = [prompt(each, [4, 5]) for each in together]
    assert greedy(made.onnx, prompts, 8) == [greedy(made.onnx, [each], 8)[0] for each in prompts]


@pytest.mark.parametrize("name", ["full", "augmented", "retrieval", "clip_2021"])
def test_text_embeddings(pair: Get, name: str) -> None:
    made = pair(name)
    end = 69 if made.config.text_encoder is not None else 60
    ids = [np.array([*range(3, 3 + words), end], np.int32) for words in (1, 7, 3)]
    found = made.onnx.embed_text(ids)
    assert relative(found, made.eager.embed_text(ids)) < PARITY
    for row, each in enumerate(ids):
        assert relative(made.onnx.embed_text([each])[0], found[row]) < PARITY


def test_cue_search_graph_is_the_op(pair: Get) -> None:
    from rsvlm_infer.backends.onnx import open_session
    from rsvlm_infer.models.package import Package
    from rsvlm_infer.ops.cue_search import cue_search

    session = open_session(Package.open(pair("full").package), "cue_search")
    rng = np.random.default_rng(3)
    entries = rng.normal(size=(40, 24)).astype(np.float16)
    entries[11] = entries[30] = entries[2]  # ties
    visual = entries[2:4].astype(np.float32) + 0.01
    asked = rng.normal(size=24).astype(np.float32)
    for k, beta, words in ((6, 0.5, asked), (1, 0.0, asked), (60, 0.3, None)):
        inputs: dict[str, Any] = {"visual": visual, "query": np.zeros(24, np.float32) if words is None else words}
        scores, rows = session.run(
            ["scores", "rows"], inputs | {"entries": entries, "k": np.array(k), "beta": np.array(beta, np.float64)}
        )
        expected_scores, expected_rows = cue_search(visual, words, entries, k, beta)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(scores, expected_scores, atol=2e-6)


def test_every_expert_is_there_although_a_scene_uses_few(pair: Get) -> None:
    """Routing of two scenes differs; both are right, so no expert was fixed at export."""
    made = pair("affine")
    experts = made.eager.model.experts
    assert experts is not None
    kept = [level.router.weight.clone() for level in experts.levels]
    found = []
    for seed in (1, 2):
        scene = packed(made.config, 60, 60, seed=seed)
        (one,), (other,) = made.eager.encode([scene]), made.onnx.encode([scene])
        assert relative(other.handle.tokens, one.handle.tokens) < PARITY
        found.append(one.handle.tokens)
    assert all(torch.equal(level.router.weight, weight) for level, weight in zip(experts.levels, kept, strict=True))
