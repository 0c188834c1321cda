"""Answers about views of an archive from kept features against answers from the scenes' pixels.

    python -m benchmarks.index_answers IMAGE... --checkpoint PACKAGE --rounds 5 --csv index_answers.csv

Every image is one view of a temporary archive for each type of features. Interleaved in one process: the same question about the same
image from the pixels, from float32 and from float16 features, a new question each time; what the native backend keeps between
questions is dropped before each. Medians over images and rounds of the whole answer and of the time to its first token, ratios of
medians to the baseline `pixels`, and how many answers have its tokens. Greedy, at most `--max-new-tokens`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.rows import append_rows
from rsvlm_infer.hardware import probe
from rsvlm_infer.index.answers import answer_views, embedder_of
from rsvlm_infer.index.archive import Archive, FeatureType
from rsvlm_infer.index.encode import EncodeSettings, content_hash, opened
from rsvlm_infer.index.writer import ArchiveWriter
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.generation import GenerationSettings
from rsvlm_infer.tasks.result import Answer
from rsvlm_infer.tasks.retrieve import require_alignment
from rsvlm_infer.tasks.scene import SceneSettings

BASELINE = "pixels"
TYPES: tuple[FeatureType, ...] = ("float32", "float16")
WHOLE = 1 << 30  # window of an archive that cuts nothing
THINGS = ("ships", "houses", "trees", "cars", "fields", "roads", "ponds", "planes", "bridges", "tanks")


Way = Callable[[int, str], Answer]


def make_archive(folder: Path, model: RSVLM, images: list[Path], features: FeatureType) -> Archive:
    """One view of each image, in their order."""
    settings = EncodeSettings(SceneSettings(), WHOLE, 1, features)
    embedder = "0" * 64 if model.folder is None else embedder_of(model.folder)
    with ArchiveWriter(folder, embedder, require_alignment(model.config).embed_size, settings.encoding_by(model)) as writer:
        for image in images:
            with opened(image, content_hash(image), model, settings) as scene:
                writer.add(scene.record, scene.views())
    return Archive.open(folder)


def from_pixels(model: RSVLM, images: list[Path], generation: GenerationSettings) -> Way:
    """Reads, plans, encodes and answers."""
    return lambda index, question: model.ask(images[index], question, max_new_tokens=generation.max_new_tokens)


def from_features(model: RSVLM, archive: Archive, generation: GenerationSettings) -> Way:
    """Answers about the view of the image with this number."""
    views = list(archive.views())
    return lambda index, question: next(answer_views(model, archive, [views[index]], question, generation=generation))


def feature_bytes(archive: Archive) -> int:
    """Bytes of all kept taps."""
    kept = archive.manifest.features
    return 0 if kept is None else kept.patch_bytes * sum(segment.counts.patches for segment in archive.segments)


def main() -> None:
    """Measures and prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="what the images are, for the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    model = RSVLM.from_pretrained(options.checkpoint)
    generation = GenerationSettings(max_new_tokens=options.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        archives = {kept: make_archive(Path(folder) / kept, model, options.images, kept) for kept in TYPES}
        ways = {BASELINE: from_pixels(model, options.images, generation)}
        ways |= {f"features, {kept}": from_features(model, archive, generation) for kept, archive in archives.items()}
        measured = measure(model, ways, len(options.images), options.rounds)
        kept_bytes = {f"features, {kept}": feature_bytes(archive) for kept, archive in archives.items()}
    lines = []
    base, base_first = (statistics.median(values) for values in measured[BASELINE][:2])
    for name, (seconds, first_ms, same) in measured.items():
        median, first = statistics.median(seconds), statistics.median(first_ms)
        low, high = np.quantile(seconds, [0.2, 0.8]) * 1e3
        size = kept_bytes.get(name, 0) / len(options.images)
        lines.append(
            {
                "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
                "images": options.name,
                "way": name,
                "backend": model.backend.name,
                "precision": model.backend.precision,
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                "median_ms": round(median * 1e3, 1),
                "p20_ms": round(float(low), 1),
                "p80_ms": round(float(high), 1),
                "ratio": round(median / base, 3),
                "ttft_ms": round(first, 1),
                "ttft_ratio": round(first / base_first, 3),
                "same_answers": round(statistics.fmean(same), 4),
                "answers": len(same),
                "kept_mb_per_view": round(size / 1e6, 2),
                "cpu": probe().cpu,
            }
        )
        print(
            f"{name:20s} {median * 1e3:8.1f} ms  p20 {low:.1f} p80 {high:.1f}  {median / base:5.2f} x  first token {first:7.1f} ms "
            f"{first / base_first:5.2f} x  same {statistics.fmean(same):.3f} of {len(same)}  {size / 1e6:.2f} MB a view"
        )
    if options.csv is not None:
        append_rows(options.csv, lines)


def measure(
    model: RSVLM, ways: dict[str, Way], images: int, rounds: int
) -> dict[str, tuple[list[float], list[float], list[bool]]]:
    """Of each way: seconds of each answer, milliseconds to its first token, and whether it has the baseline's tokens."""
    forget = getattr(model.backend, "forget", lambda: None)
    found: dict[str, tuple[list[float], list[float], list[bool]]] = {name: ([], [], []) for name in ways}
    for round_number in range(rounds + 1):
        for index in range(images if round_number else 1):  # the first round warms
            question = f"How many {THINGS[round_number % len(THINGS)]} are in picture {index}?"  # each way embeds it anew
            truth: tuple[int, ...] = ()
            for name, way in ways.items():
                forget()
                started = time.perf_counter()
                answer = way(index, question)
                taken = time.perf_counter() - started
                if name == BASELINE:
                    truth = answer.token_ids
                if round_number:
                    found[name][0].append(taken)
                    found[name][1].append(answer.timings.ttft_ms)
                    found[name][2].append(answer.token_ids == truth)
    return found


if __name__ == "__main__":
    main()
