"""The eager backend: batches equal single runs, chunks equal one pass, refusals are clear."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rsvlm_infer.backends import Prompt, load_backend, why_not
from rsvlm_infer.backends import eager as eager_module
from rsvlm_infer.backends.base import Query, StagedBackend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import (
    AlignmentConfig,
    AugmentationConfig,
    ExpertsConfig,
    LanguageConfig,
    PreprocessConfig,
    ProjectorConfig,
    RsvlmConfig,
    VisionConfig,
)
from rsvlm_infer.errors import BackendError, InputError
from rsvlm_infer.imagery.pack import PackedScene, pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.source import open_scene
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.rsvlm import RsvlmModel

IMAGE = -200
VISION = VisionConfig("dinov2", 24, 48, 3, 2, 4, 5, (1, 2, 3), "gelu", "bicubic", 1e-6, True, False, True, True)
LANGUAGE = LanguageConfig("llama", 60, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 512, False, True)
CONFIG = RsvlmConfig(
    vision=VISION,
    preprocess=PreprocessConfig(tile_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    language=LANGUAGE,
    projector=ProjectorConfig(40, pixel_shuffle=2, input_norm=True, box_embedding=True),
    alignment=AlignmentConfig(16, salient_patches=3),
    tiling="dris",
)


def _backend(config: RsvlmConfig = CONFIG) -> EagerBackend:
    torch.manual_seed(0)
    model = RsvlmModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return EagerBackend(model.requires_grad_(False))


def _scene(config: RsvlmConfig, height: int, width: int, seed: int = 0) -> PackedScene:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with open_scene(pixels) as scene:
        return pack_scene(scene, plan_scene(height, width, config), config)


def _prompt(backend: EagerBackend, scene: PackedScene, text: list[int]) -> Prompt:
    image = backend.encode([scene])[0]
    return Prompt(np.array([1, *[IMAGE] * image.num_tokens, *text], np.int32), (image,))


def test_batch_gives_each_row_its_own_logits() -> None:
    backend = _backend()
    scenes = [_scene(CONFIG, 40, 90, 1), _scene(CONFIG, 30, 30, 2), _scene(CONFIG, 200, 64, 3)]
    assert len({scene.num_tokens for scene in scenes}) == 3
    prompts = [_prompt(backend, scene, text) for scene, text in zip(scenes, ([5, 6, 7], [8], [9, 10]), strict=True)]
    logits, cache = backend.prefill(prompts, 600)
    steps = [logits, backend.decode(cache, np.array([11, 12, 13], np.int32))]
    cache = backend.keep(cache, [2, 0])
    steps.append(backend.decode(cache, np.array([14, 15], np.int32)))
    for row, prompt in enumerate(prompts):
        alone, own = backend.prefill([prompt], 600)
        np.testing.assert_allclose(steps[0][row], alone[0], atol=1e-4)
        next_logits = backend.decode(own, np.array([11 + row], np.int32))
        np.testing.assert_allclose(steps[1][row], next_logits[0], atol=1e-4)
        if row != 1:
            kept = [2, 0].index(row)
            np.testing.assert_allclose(steps[2][kept], backend.decode(own, np.array([14 + kept], np.int32))[0], atol=1e-4)


def test_scenes_encoded_together_equal_scenes_alone() -> None:
    backend = _backend()
    scenes = [_scene(CONFIG, 100, 60, 1), _scene(CONFIG, 33, 32, 2)]
    for scene, together in zip(scenes, backend.encode(scenes), strict=True):
        alone = backend.encode([scene])[0]
        assert together.num_tokens == alone.num_tokens == scene.num_tokens
        torch.testing.assert_close(together.handle.tokens, alone.handle.tokens, atol=1e-5, rtol=1e-5)
        for name in ("object", "region", "scene"):
            np.testing.assert_allclose(
                getattr(backend.embed_image(together), name), getattr(backend.embed_image(alone), name), atol=1e-5
            )


def test_chunks_of_tiles_equal_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, scene = _backend(), _scene(CONFIG, 150, 130)
    assert len(scene.grids) > 4
    whole = backend.encode([scene])[0]
    monkeypatch.setattr(eager_module, "CHUNK_PATCHES", 70)
    chunked = backend.encode([scene])[0]
    torch.testing.assert_close(chunked.handle.tokens, whole.handle.tokens, atol=1e-5, rtol=1e-5)


def test_box_embedding_is_for_dris_only() -> None:
    backend = _backend()
    fixed = dataclasses.replace(CONFIG, tiling="fixed")
    scene, as_fixed = _scene(CONFIG, 32, 32), _scene(fixed, 32, 32)
    assert len(scene.grids) == 1
    offset = backend.encode([scene])[0].handle.tokens - backend.encode([as_fixed])[0].handle.tokens
    assert backend.model.projector is not None
    assert backend.model.projector.box is not None
    expected = backend.model.projector.box(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(offset, expected.expand_as(offset), atol=1e-5, rtol=1e-5)


def test_modules_with_closed_gates_change_nothing() -> None:
    plain = _backend()
    config = dataclasses.replace(
        CONFIG,
        augmentation=AugmentationConfig(num_heads=2),
        experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=16),
    )
    full = _backend(config)
    full.model.load_state_dict(plain.model.state_dict(), strict=False)
    assert full.model.augmentation is not None
    assert full.model.experts is not None
    for level in (*full.model.augmentation.levels, *full.model.experts.levels):
        torch.nn.init.zeros_(level.gate)
    scene = _scene(CONFIG, 64, 48)
    torch.testing.assert_close(
        full.encode([scene])[0].handle.tokens, plain.encode([scene])[0].handle.tokens, atol=1e-6, rtol=1e-6
    )


FULL = dataclasses.replace(
    CONFIG,
    augmentation=AugmentationConfig(num_heads=2),
    experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=16),
)


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        CONFIG,
        dataclasses.replace(CONFIG, alignment=None),
        dataclasses.replace(CONFIG, language=None, projector=None, alignment=None),
        dataclasses.replace(CONFIG, alignment=AlignmentConfig(16, pooling="class", levels=("scene",))),
    ],
    ids=["full", "plain", "without alignment", "without projector", "class token"],
)
@pytest.mark.parametrize("asked", [True, False])
def test_stages_one_by_one_are_encode(config: RsvlmConfig, asked: bool) -> None:
    """The same bits; what comes after the vision encoder needs no patches."""
    backend = _backend(config)
    assert isinstance(backend, StagedBackend)
    if config.augmentation is not None:
        vectors = np.random.default_rng(0).normal(size=(9, 16))
        entries = [f"fact {index}" for index in range(9)]
        backend.knowledge = KnowledgeBase(entries, np.arange(9) % 3, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    scene = _scene(config, 70, 45)
    query = Query(np.array([3, 4, 5], np.int32), np.full(16, 0.25, np.float32)) if asked else None
    (expected,) = backend.encode([scene], [query])
    (taps,) = backend.encode_tiles([scene])
    bare = dataclasses.replace(scene, patches=scene.patches[:0])
    embeddings = backend.align(taps, bare)
    if config.alignment is None:
        assert embeddings is None
    else:
        assert embeddings is not None
        for level in ("object", "region", "scene"):
            np.testing.assert_array_equal(getattr(embeddings, level), getattr(backend.embed_image(expected), level))
    cues, texts = backend.find_cues(embeddings, query)
    assert texts == expected.cues
    assert bool(texts) == (config.augmentation is not None)
    tokens = backend.bridge(taps, bare, cues)
    if config.projector is None:
        assert tokens is None
        return
    assert tokens is not None
    np.testing.assert_array_equal(tokens, expected.handle.tokens.numpy())
    found = backend.features_of(tokens)
    assert found.num_tokens == expected.num_tokens
    torch.testing.assert_close(found.handle.tokens, expected.handle.tokens, rtol=0, atol=0)


def test_texts_of_different_lengths_equal_texts_alone() -> None:
    backend = _backend()
    texts = [np.array([3, 4, 5, 6], np.int32), np.array([7], np.int32)]
    together = backend.embed_text(texts)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(together[row], backend.embed_text([text])[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)


def test_refusals_name_what_is_wrong() -> None:
    backend, scene = _backend(), _scene(CONFIG, 32, 32)
    prompt = _prompt(backend, scene, [5])
    with pytest.raises(InputError, match="one image placeholder"):
        backend.prefill([Prompt(np.array([1, 2], np.int32), prompt.images)], 50)
    with pytest.raises(InputError, match="capacity must be at least"):
        backend.prefill([prompt], 3)
    _, cache = backend.prefill([prompt], len(prompt.token_ids))
    with pytest.raises(InputError, match="is full"):
        backend.decode(cache, np.array([1], np.int32))
    with pytest.raises(InputError, match="at least one token per text"):
        backend.embed_text([np.array([], np.int32)])
    assert backend.encode([]) == []


def test_absent_parts_are_refused_by_name() -> None:
    blind = _backend(dataclasses.replace(CONFIG, alignment=None))
    with pytest.raises(BackendError, match="no alignment heads, so it cannot embed images"):
        blind.embed_image(blind.encode([_scene(CONFIG, 32, 32)])[0])
    with pytest.raises(BackendError, match="no alignment heads, so it cannot embed text"):
        blind.embed_text([np.array([1], np.int32)])
    anyres = dataclasses.replace(CONFIG, tiling="anyres", grid_pinpoints=((32, 64), (64, 32)))
    with pytest.raises(BackendError, match="needs a checkpoint with image_newline"):
        _backend().encode([_scene(anyres, 40, 90)])
    silent = _backend(dataclasses.replace(CONFIG, language=None, projector=None, alignment=None))
    assert silent.encode([_scene(CONFIG, 32, 32)])[0].num_tokens == 0
    with pytest.raises(BackendError, match="no language model"):
        silent.prefill([Prompt(np.array([1], np.int32))], 5)


def test_unknown_backend_and_precision_are_refused(tmp_path: Path) -> None:
    assert why_not("eager") is None
    with pytest.raises(BackendError, match="backend must be"):
        load_backend(tmp_path, "abacus")
    with pytest.raises(BackendError, match="precision of backend 'eager' must be"):
        load_backend(tmp_path, "eager", "int3")
