"""Retrieval through an archive gives the numbers of the evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.index_retrieval import make_archive, scores_through
from rsvlm_infer.bench.predict import PredictSettings, predict
from rsvlm_infer.evaluation.retrieval import retrieval_texts
from rsvlm_infer.evaluation.scoring import candidate_texts, score_set
from rsvlm_infer.evaluation.sets import read_set
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.pipeline import RSVLM

IMAGES = 8


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.wheels
def test_a_sample_of_rsicd_has_the_same_scores(data_root: Path, default_checkpoint: Path, tmp_path: Path) -> None:
    data = read_set(data_root / "rsicd", "retrieval", split="val").limited(IMAGES)
    model = RSVLM.from_pretrained(default_checkpoint)
    predictions = {item.key: found for item, found in predict(model, data, data.items, PredictSettings())}
    truth = score_set(data, predictions)["metrics"]
    make_archive(tmp_path / "archive", [item.image for item in data.items if item.image], model, "e" * 64)
    found, similarity = scores_through(Archive.open(tmp_path / "archive"), data, model)
    assert found.to_dict() == truth
    assert truth["mean_recall"] > 0
    columns = {text: column for column, text in enumerate(candidate_texts(data))}
    texts, _ = retrieval_texts({item.key: item.truths for item in data.items})
    own = np.array([predictions[item.key] for item in data.items], np.float32)[:, [columns[text] for text in texts]]
    # float32 sums of 256 products of unit vectors, in another order; batches of four images instead of single ones
    np.testing.assert_allclose(similarity, own, rtol=0, atol=2e-6)
