"""RSVLM on the real model with random weights: what a fake backend cannot show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.backends.base import Prompt
from rsvlm_infer.config import (
    AlignmentConfig,
    AugmentationConfig,
    DrisConfig,
    ExpertsConfig,
    LanguageConfig,
    ProjectorConfig,
    RsvlmConfig,
)
from rsvlm_infer.engine.sampling import log_softmax
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.classify import choice_prompt
from rsvlm_infer.tasks.generation import prompt_ids
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene
from tests.tasks.telling_model import END, IMAGE, VOCAB, byte_ids, load_tokenizer, telling_config, write_tokenizer

torch = pytest.importorskip("torch", reason="the eager backend needs torch")


def small_config(**changes: object) -> RsvlmConfig:
    vision = dataclasses.replace(telling_config().vision, hidden_size=16, num_heads=2, num_layers=3, taps=(1, 2, 3))
    return telling_config(
        vision=vision,
        language=LanguageConfig("llama", VOCAB, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 768, False, True),
        projector=ProjectorConfig(hidden_size=24),
        alignment=AlignmentConfig(embed_size=12, weights=(0.5, 0.3, 0.2), salient_patches=2),
        augmentation=AugmentationConfig(num_heads=2),
        experts=ExpertsConfig(num_experts=6, top_k=1, intermediate_size=8),
        image_token_id=IMAGE,
        eos_token_ids=(END,),
        tiling="dris",
        dris=DrisConfig(leaf_grids=(2, 4), leaf_thresholds=(0.2,), max_tiles=12, max_visual_tokens=256),
        **changes,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RSVLM:
    from rsvlm_infer.backends.eager import EagerBackend
    from rsvlm_infer.knowledge.store import KnowledgeBase
    from rsvlm_infer.models.rsvlm import RsvlmModel

    torch.manual_seed(0)
    network = RsvlmModel(small_config())
    with torch.no_grad():
        for parameter in network.parameters():  # larger than any init, gates open: every part must matter to the answer
            parameter.normal_(0, 0.25)
    vectors = np.random.default_rng(0).normal(size=(9, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    knowledge = KnowledgeBase([f"fact {index}" for index in range(9)], np.arange(9) % 3, vectors)
    return RSVLM(EagerBackend(network, knowledge=knowledge), load_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = [(28, 28), (90, 40), (224, 224), (61, 113)]
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def test_images_of_mixed_sizes_get_the_tokens_that_they_get_alone(model: RSVLM, images: list[np.ndarray]) -> None:
    together = list(model.caption_many(images, batch_size=4, max_new_tokens=12))
    alone = [model.caption(image, max_new_tokens=12) for image in images]
    assert len({answer.tokens.visual for answer in alone}) >= 3
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({answer.token_ids for answer in alone}) > 1  # the image matters


def test_sampling_is_the_same_alone_and_in_a_batch(model: RSVLM, images: list[np.ndarray]) -> None:
    options = {"max_new_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    together = list(model.ask_many(images, "What?", batch_size=3, **options))  # type: ignore[arg-type]
    assert together[2].token_ids == model.ask(images[2], "What?", **options).token_ids  # type: ignore[arg-type]
    other = model.ask(images[2], "What?", **(options | {"seed": 12}))  # type: ignore[arg-type]
    assert other.token_ids != together[2].token_ids


def test_streaming_equals_the_whole(model: RSVLM, images: list[np.ndarray]) -> None:
    stream = model.caption(images[1], stream=True, max_new_tokens=20)
    assert "".join(stream) == model.caption(images[1], max_new_tokens=20).text


def test_choice_scores_equal_teacher_forcing_by_whole_prefills(model: RSVLM, images: list[np.ndarray]) -> None:
    labels = ["forest", "for", "sea", "seaside"]
    result = model.classify(images[2], labels, method="language")
    packed = prepare_scene(images[2], model.config, SceneSettings()).packed
    features = model.backend.encode([packed])[0]
    prompt = prompt_ids(model.tokenizer, model.config, choice_prompt(labels), features.num_tokens)
    for label in labels:
        ids, total = byte_ids(label), 0.0
        for place, token_id in enumerate(ids):
            sequence = np.concatenate([prompt, np.array(ids[:place], dtype=np.int32)])
            logits, _ = model.backend.prefill([Prompt(sequence, (features,))], len(sequence))
            total += log_softmax(logits)[0, token_id]
        assert result.raw_scores[label] == pytest.approx(total / len(ids), abs=1e-4)


def test_alignment_scores_are_those_of_the_embeddings(model: RSVLM, images: list[np.ndarray]) -> None:
    texts = ["a harbour", "a forest"]
    levels = model.embed_levels(images[2])
    vectors = model.embed_text(texts)
    tiles = len(model.plan(images[2]).plan.tiles)
    assert levels.scene.shape == (12,)
    assert levels.region.shape == (tiles, 12)
    assert levels.object.shape == (tiles, 2, 12)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    objects = np.sort(levels.object.reshape(-1, 12) @ vectors.T, axis=0)[-2:].mean(axis=0)
    expected = 0.5 * vectors @ levels.scene + 0.3 * (levels.region @ vectors.T).max(axis=0) + 0.2 * objects
    np.testing.assert_allclose(model.score(images[2], texts), expected, atol=1e-5)
    result = model.classify(images[2], texts, template="{label}")
    assert result.label == texts[int(expected.argmax())]


def test_the_question_changes_what_augmentation_adds(model: RSVLM, images: list[np.ndarray]) -> None:
    answers = [model.ask(images[2], question, max_new_tokens=12) for question in ("abc", "xyz")]
    assert all(cue.startswith("fact ") for answer in answers for cue in answer.cues)
    assert len(answers[0].cues) == 9  # five cues are asked for per level, three are there
    assert answers[0].timings.augment_ms > 0
    assert answers[0].token_ids != answers[1].token_ids


def test_without_knowledge_and_query_augmentation_adds_nothing(model: RSVLM, images: list[np.ndarray]) -> None:
    from rsvlm_infer.backends.eager import EagerBackend

    bare = RSVLM(EagerBackend(model.backend.model), model.tokenizer)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(bare.embed_image(images[1]), model.embed_image(images[1]))


def test_a_saved_checkpoint_gives_the_same_answers(model: RSVLM, images: list[np.ndarray], tmp_path: Path) -> None:
    from rsvlm_infer.models.checkpoint import save_checkpoint

    folder = tmp_path / "checkpoint"
    model.backend.knowledge.save(tmp_path / "knowledge")  # type: ignore[attr-defined]
    state = model.backend.model.state_dict()  # type: ignore[attr-defined]
    save_checkpoint(
        folder, model.config, state, tokenizer=write_tokenizer(tmp_path / "words"), knowledge=tmp_path / "knowledge"
    )
    loaded = RSVLM.from_pretrained(folder)
    assert loaded.backend.name == "eager"
    assert loaded.caption(images[0], max_new_tokens=8).token_ids == model.caption(images[0], max_new_tokens=8).token_ids
