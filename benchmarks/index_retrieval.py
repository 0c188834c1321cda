"""Retrieval scores through an archive beside those of the evaluator: the same images, the same texts, one encoded by `rsvlm index`.

    rsvlm eval retrieval RSICD --split val --predictions val.jsonl
    rsvlm index RSICD/images/... -o archive
    python -m benchmarks.index_retrieval RSICD --split val --archive archive --predictions val.jsonl

`--make` indexes the split's images that the archive lacks first. Without `--predictions` only the archive's scores are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rsvlm_infer import RSVLM
from rsvlm_infer.errors import InputError
from rsvlm_infer.evaluation.predictions import read_predictions
from rsvlm_infer.evaluation.retrieval import RetrievalScores, retrieval_scores, retrieval_texts
from rsvlm_infer.evaluation.scoring import candidate_texts
from rsvlm_infer.evaluation.sets import EvaluationSet, read_set
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.index.encode import EncodeSettings, content_hash, opened
from rsvlm_infer.index.search import ArchiveQuery, row_scores
from rsvlm_infer.index.writer import ArchiveWriter
from rsvlm_infer.models.load import embedder_digest
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.tasks.retrieve import require_alignment
from rsvlm_infer.tasks.scene import SceneSettings


def make_archive(folder: Path, images: Sequence[Path], model: RSVLM, embedder: str) -> None:
    """Indexes what the archive lacks."""
    settings = EncodeSettings(SceneSettings())
    with ArchiveWriter(folder, embedder, require_alignment(model.config).embed_size, settings.encoding) as writer:
        for image in images:
            content = content_hash(image)
            if writer.source_of(content) is None:
                with opened(image, content, model, settings) as scene:
                    writer.add(scene.record, scene.views())


def archive_similarity(archive: Archive, images: Sequence[Path], model: RSVLM, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[N images, M texts] by the level "all".

    Raises:
        InputError: an image that the archive lacks.
    """
    alignment = require_alignment(model.config)
    unique = list(dict.fromkeys(texts))
    columns = np.array([unique.index(text) for text in texts])
    queries = model.embed_text(unique)
    scored = np.stack(
        [
            np.concatenate(
                [
                    row_scores(
                        segment, ArchiveQuery("all", query, weights=alignment.weights, salient=alignment.salient_patches)
                    )
                    for segment in archive.segments
                ]
            )
            for query in queries
        ],
        axis=1,
    )  # [views, unique texts]
    rows = {}
    first = 0
    for segment in archive.segments:
        scenes = segment.all_scenes()
        for offset, view in enumerate(segment.views):
            rows[scenes[int(view["scene"])].content_hash] = first + offset
        first += segment.counts.views
    missing = [str(image) for image in images if content_hash(image) not in rows]
    if missing:
        raise InputError(f"archive lacks {len(missing)} images, first {missing[0]}; index them")
    chosen = np.array([rows[content_hash(image)] for image in images])
    return np.asarray(scored[chosen][:, columns], dtype=np.float32)


def scores_through(archive: Archive, data: EvaluationSet, model: RSVLM) -> tuple[RetrievalScores, npt.NDArray[np.float32]]:
    """Recalls, and the similarity that they come from."""
    texts, positives = retrieval_texts({item.key: item.truths for item in data.items})
    similarity = archive_similarity(archive, _images(data), model, texts)
    return retrieval_scores(similarity, positives), similarity


def _images(data: EvaluationSet) -> list[Path]:
    return [item.image for item in data.items if item.image is not None]


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--predictions", type=Path)
    options = parser.parse_args()
    data = read_set(options.set, "retrieval", split=options.split)
    model = RSVLM.from_pretrained()
    images = _images(data)
    if options.make:
        make_archive(options.archive, images, model, embedder_digest(default_checkpoint()))
    found, similarity = scores_through(Archive.open(options.archive), data, model)
    print("archive  ", found.to_dict())
    if options.predictions is None:
        return
    texts, positives = retrieval_texts({item.key: item.truths for item in data.items})
    column = {text: index for index, text in enumerate(candidate_texts(data))}
    values = read_predictions(options.predictions).values
    own = np.array([values[item.key] for item in data.items], np.float32)[:, [column[text] for text in texts]]
    print("evaluator", retrieval_scores(own, positives).to_dict())
    print("largest difference of a score", float(np.abs(own - similarity).max()))


if __name__ == "__main__":
    main()
