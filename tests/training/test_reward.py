"""Sampled captions: rewards as a reader would give them, advantages that sum to zero, answers that the model really says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.config import LanguageConfig
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.layers.language_model import LanguageModel
from training.reward import CaptionReward, advantages, packed, sample_answers
from training.samples import Branch, Sample

REFERENCES = [
    ["a church stands near a wide road .", "a church near a road ."],
    ["white waves beat the yellow sand .", "waves beat the sand ."],
    ["many planes are parked at the airport .", "planes are parked ."],
]


def test_reward_is_for_the_right_image_and_a_finished_sentence() -> None:
    reward = CaptionReward(REFERENCES, bleu_weight=0.0)
    whole = "A church near a road."
    right, wrong, cut = reward([0, 1, 0], [whole, whole, whole], [True, True, False])
    assert right > cut > wrong
    assert wrong == pytest.approx(0, abs=0.05)
    with_bleu = CaptionReward(REFERENCES, bleu_weight=1.0)([0], [whole], [True])[0]
    assert with_bleu == pytest.approx(right + 1, abs=1e-3)  # the caption is one of the references: BLEU-4 is 1


def test_reward_does_not_depend_on_the_company() -> None:
    reward = CaptionReward(REFERENCES, bleu_weight=1.0)
    alone = [reward([row], ["many planes beat the road"], [True])[0] for row in range(3)]
    np.testing.assert_allclose(reward([0, 1, 2], ["many planes beat the road"] * 3, [True] * 3), alone)


def test_advantage_is_what_a_sample_has_over_the_others() -> None:
    gains = advantages(np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
    np.testing.assert_allclose(gains, [[1.5, -1.5, 0.0], [0.0, 0.0, 0.0]])


def test_sampled_answers_are_greedy_when_the_model_is_sure() -> None:
    torch.manual_seed(3)
    model = LanguageModel(LanguageConfig("llama", 50, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, False, True)).eval()
    with torch.no_grad():
        model.norm.weight.fill_(400.0)  # logits so far apart that sampling has no choice
    prompts = torch.randn(6, 5, 32)
    expected = []
    for prompt in prompts:
        embeds, said = prompt[None], []
        for _ in range(7):
            token = int(model.logits(model(embeds, torch.arange(embeds.shape[1])[None]))[0, -1].argmax())
            said.append(token)
            embeds = torch.cat((embeds, model.embed_tokens(torch.tensor([[token]]))), dim=1)
        expected.append(said)
    end = expected[0][3]  # some answers end early, others go on
    expected = [said[: said.index(end) + 1] if end in said else said for said in expected]
    assert len({len(said) for said in expected}) > 1
    answers = sample_answers(model, prompts, 2, 7, end)
    assert answers == [said for said in expected for _ in range(2)]


def test_samples_keep_their_order_over_rows() -> None:
    scene = PackedScene.__new__(PackedScene)
    samples = [Sample(scene, "query", [1, 2, 3], [4], [Branch([5, token, 2], 2, -1.0, True)]) for token in range(10, 15)]
    rows = packed(samples, 16)
    assert [len(row.samples) for row in rows] == [2, 2, 1]
    assert [sample for row in rows for sample in row.samples] == samples
    assert float(torch.stack([row.weights for row in rows]).sum()) == -10.0
