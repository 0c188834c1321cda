"""Alignment scores and relevance maps against hand values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rsvlm_infer.backends.base import Embeddings
from rsvlm_infer.config import AlignmentConfig, TextEncoderConfig
from rsvlm_infer.errors import CheckpointError, InputError
from rsvlm_infer.tasks.retrieve import alignment_scores, relevance_map, require_alignment, softmax_scores, text_ids
from rsvlm_infer.text.tokenizer import Tokenizer
from tests.tasks.telling_model import byte_ids, load_tokenizer, telling_config

TEXTS = np.eye(3, dtype=np.float32)[:2]
IMAGE = Embeddings(
    object=np.array([[[1, 0, 0], [0, 1, 0]], [[0.6, 0.8, 0], [0, 0, 1]]], dtype=np.float32),
    region=np.array([[0, 1, 0], [0.6, 0, 0.8]], dtype=np.float32),
    scene=np.array([0.8, 0.6, 0], dtype=np.float32),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("weights", "salient", "expected"),
    [
        ((1.0, 0.0, 0.0), 2, [0.8, 0.6]),
        ((0.0, 1.0, 0.0), 2, [0.6, 1.0]),
        ((0.0, 0.0, 1.0), 2, [0.8, 0.9]),  # the two best object cosines: 1, 0.6 and 1, 0.8
        ((0.0, 0.0, 1.0), 3, [1.6 / 3, 1.8 / 3]),
        ((0.0, 0.0, 1.0), 9, [0.4, 0.45]),  # more than there are: all four
        ((0.5, 0.25, 0.25), 2, [0.4 + 0.15 + 0.2, 0.3 + 0.25 + 0.225]),
    ],
)
def test_score_weighs_three_levels(weights: tuple[float, float, float], salient: int, expected: list[float]) -> None:
    config = AlignmentConfig(embed_size=3, weights=weights, salient_patches=salient)
    np.testing.assert_allclose(alignment_scores(IMAGE, TEXTS, config), expected, atol=1e-6)


def test_a_weight_without_its_head_is_an_error_and_no_weight_needs_no_head() -> None:
    bare = dataclasses.replace(IMAGE, region=np.zeros(0, np.float32), object=np.zeros(0, np.float32))
    np.testing.assert_allclose(alignment_scores(bare, TEXTS, AlignmentConfig(embed_size=3)), [0.8, 0.6], atol=1e-6)
    with pytest.raises(CheckpointError, match="no region head"):
        alignment_scores(bare, TEXTS, AlignmentConfig(embed_size=3, weights=(1.0, 0.5, 0.0)))


def test_softmax_scores() -> None:
    np.testing.assert_allclose(softmax_scores(np.log(np.array([1.0, 3.0])) / 2, 2.0), [0.25, 0.75])


def test_small_tiles_lie_over_large_ones() -> None:
    boxes = np.array([[0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]], dtype=np.float32)
    relevance = relevance_map(boxes, np.array([0.2, 0.6, -0.2], dtype=np.float32), 100, 200)
    assert relevance.shape == (32, 64)
    np.testing.assert_allclose(relevance[:16, :32], 1.0, atol=1e-6)
    np.testing.assert_allclose(relevance[16:, 32:], 0.0, atol=1e-6)
    np.testing.assert_allclose(relevance[:16, 32:], 0.5, atol=1e-6)
    np.testing.assert_allclose(relevance[16:, :32], 0.5, atol=1e-6)


def test_equal_scores_change_no_plan() -> None:
    boxes = np.array([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1]], dtype=np.float32)
    assert relevance_map(boxes, np.array([0.3, 0.3], dtype=np.float32), 10, 5).tolist() == np.ones((64, 32)).tolist()


def test_a_thin_scene_keeps_one_cell() -> None:
    boxes = np.array([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1]], dtype=np.float32)
    relevance = relevance_map(boxes, np.array([0.0, 1.0], dtype=np.float32), 1, 1000)
    assert relevance.shape == (1, 64)
    assert relevance[0].tolist() == [1.0] * 32 + [0.0] * 32


def test_text_ids_of_a_language_model_are_bare(tokenizer: Tokenizer) -> None:
    ids = text_ids(tokenizer, telling_config(), " ab ")
    assert (ids.tolist(), ids.dtype) == (byte_ids("ab"), np.int32)


def test_text_ids_fill_the_checkpoints_template(tokenizer: Tokenizer) -> None:
    config = telling_config(alignment=AlignmentConfig(embed_size=3, text_template="<{}>"))
    assert text_ids(tokenizer, config, " ab ").tolist() == byte_ids("<ab>")


def test_text_ids_are_checked(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="text must not be blank"):
        text_ids(tokenizer, telling_config(), "  ")
    with pytest.raises(InputError, match="at most 512 tokens, got 600"):
        text_ids(tokenizer, telling_config(), "a" * 600)


def test_text_ids_of_a_text_encoder_stay_within_its_positions(tokenizer: Tokenizer) -> None:
    encoder = TextEncoderConfig(300, 8, 16, 1, 2, 5, "quick_gelu", 1e-5, 2)
    config = telling_config(text_encoder=encoder, alignment=AlignmentConfig(embed_size=3, text_source="text_encoder"))
    assert text_ids(tokenizer, config, "abcde").tolist() == byte_ids("abcde")
    with pytest.raises(InputError, match="at most 5 tokens, got 6"):
        text_ids(tokenizer, config, "abcdef")


def test_a_checkpoint_without_heads_cannot_score() -> None:
    with pytest.raises(InputError, match="no alignment heads"):
        require_alignment(telling_config(alignment=None))
