"""A packed training row gives every answer the loss that it has in a sequence of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rsvlm_infer.config import LanguageConfig
from rsvlm_infer.layers.language_model import LanguageModel
from training.projector import Sample, pack_row

CONFIG = LanguageConfig("llama", 50, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, False, True)

SAMPLES = [
    Sample(0, -1, [3, 4, 5, 6], [7], [([8, 20, 21, 2], 3, 0.75), ([8, 22, 2], 2, 0.25), ([9, 10, 23, 2], 2, 0.5)], asks=True),
    Sample(1, -1, [11, 12], [7], [([8, 24, 25, 26, 2], 4, 1.0)], asks=False),
]


def _plain_losses(model: LanguageModel) -> list[torch.Tensor]:
    losses = []
    for sample in SAMPLES:
        for place, (ids, answer, _) in enumerate(sample.branches):
            is_question = sample.asks and place == len(sample.branches) - 1
            sequence = torch.tensor([[*sample.prefix, *([] if is_question else sample.stem), *ids]])
            positions = torch.arange(sequence.shape[1])[None]
            logits = model.logits(model(model.embed_tokens(sequence), positions))[0]
            losses.append(F.cross_entropy(logits[-answer - 1 : -1], sequence[0, -answer:], reduction="none"))
    return losses


def test_packed_row_matches_separate_sequences() -> None:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    row = pack_row(SAMPLES, 48)
    hidden = model(model.embed_tokens(row.token_ids[None]), row.positions[None], None, row.mask[None])
    wanted = row.targets >= 0
    packed = F.cross_entropy(model.logits(hidden[0][wanted]), row.targets[wanted], reduction="none")
    torch.testing.assert_close(packed, torch.cat(_plain_losses(model)), atol=1e-5, rtol=1e-5)
    assert row.weights[wanted].tolist() == [0.75] * 3 + [0.25] * 2 + [0.5] * 2 + [1.0] * 4


def test_unused_places_learn_nothing_and_stay_finite() -> None:
    model = LanguageModel(CONFIG)
    row = pack_row(SAMPLES[1:], 32)
    used = SAMPLES[1].length
    hidden = model(model.embed_tokens(row.token_ids[None]), row.positions[None], None, row.mask[None])
    assert torch.isfinite(hidden).all()
    assert (row.targets[used:] == -100).all()
    assert float(row.weights[used:].sum()) == 0.0
