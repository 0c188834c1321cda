"""A packed training row gives every answer the loss that it has in a sequence of its own."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from rsvlm_infer.config import LanguageConfig
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.layers.language_model import LanguageModel
from training.samples import Branch, Sample, mosaic, pack_row

CONFIG = LanguageConfig("llama", 50, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, False, True)
SCENE = PackedScene.__new__(PackedScene)  # a row never looks at it

SAMPLES = [
    Sample(
        SCENE,
        "query",
        [3, 4, 5, 6],
        [7],
        [
            Branch([8, 20, 21, 2], 3, 0.75, after_stem=True),
            Branch([8, 22, 2], 2, 0.25, after_stem=True),
            Branch([9, 10, 23, 2], 2, 0.5),
        ],
    ),
    Sample(SCENE, "query", [11, 12], [7], [Branch([8, 24, 25, 26, 2], 4, 1.0, after_stem=True)]),
]


def _plain_losses(model: LanguageModel) -> list[torch.Tensor]:
    losses = []
    for sample in SAMPLES:
        for branch in sample.branches:
            sequence = torch.tensor([[*sample.prefix, *(sample.stem if branch.after_stem else []), *branch.ids]])
            positions = torch.arange(sequence.shape[1])[None]
            logits = model.logits(model(model.embed_tokens(sequence), positions))[0]
            last = branch.answer
            losses.append(F.cross_entropy(logits[-last - 1 : -1], sequence[0, -last:], reduction="none"))
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


def test_mosaic_shows_the_rows_it_names_and_leaves_half_of_it_uniform() -> None:
    pictures = {row: np.full((224, 224, 3), row, np.uint8) for row in range(1, 9)}
    of_theme = {"beach": [1, 2], "forest": [3, 4], "park": [5, 6], "port": [7, 8]}
    rows, picture = mosaic(np.random.default_rng(3), of_theme, pictures.__getitem__, (4, 6))
    cells = picture.reshape(picture.shape[0] // 224, 224, picture.shape[1] // 224, 224, 3).transpose(0, 2, 1, 3, 4)
    shown = [int(cell[0, 0, 0]) for line in cells for cell in line if int(cell[0, 0, 0]) <= 8]
    assert shown == rows
    assert 4 <= len(rows) <= 6
    assert len(rows) <= cells.shape[0] * cells.shape[1] / 2
    themes = {theme for theme, members in of_theme.items() if set(members) & set(rows)}
    assert len(themes) <= 2  # at most half of the themes, so that absence can be asked too
