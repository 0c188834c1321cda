"""`python -m benchmarks.published`: the default checkpoint on data that training never saw, measure by measure.

RSICD's public test half and val split, EuroSAT's and RSSCN7's test folders, RSVQA-LR's val and test questions. Every number comes from
the same code as `rsvlm eval`; predictions are kept, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsvlm_infer import RSVLM
from rsvlm_infer.bench.evaluate import predict_set, require_images, score_predictions
from rsvlm_infer.bench.predict import PredictSettings
from rsvlm_infer.evaluation.sets import EvaluationSet, read_set
from rsvlm_infer.pipeline import default_checkpoint

from .rows import RESULTS, about, append_rows


@dataclass(frozen=True)
class Measure:
    """One number: where its set lies below the data folder, which metric of its scores it is, and what it should reach."""

    name: str
    task: Any
    source: str
    split: str | None
    metric: str
    at_least: float
    kinds: tuple[str, ...] = ()


MEASURES = (
    Measure("30-theme accuracy", "classify", "rsicd", "test", "class_accuracy", 0.90),
    Measure("EuroSAT accuracy", "classify", "eurosat/test", None, "class_accuracy", 0.95),
    Measure("RSSCN7 accuracy", "classify", "rsscn7/test", None, "class_accuracy", 0.85),
    Measure("CIDEr", "caption", "rsicd", "test", "cider", 1.03),
    Measure("BLEU-4", "caption", "rsicd", "test", "bleu_4", 0.368),
    Measure("mean recall", "retrieval", "rsicd", "val", "mean_recall", 0.20),
    Measure("presence and rural/urban", "vqa", "rsvqa", "val", "answer_accuracy", 0.75, ("presence", "rural_urban")),
    Measure("presence and rural/urban", "vqa", "rsvqa", "test", "answer_accuracy", 0.75, ("presence", "rural_urban")),
)


def main() -> None:
    """Predicts, scores, prints one table and appends its rows to published.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with rsicd, eurosat and rsscn7")
    parser.add_argument("--rsvqa", type=Path, help="folder of RSVQA-LR; default DATA/rsvqa, left out when absent")
    parser.add_argument("--predictions", type=Path, default=Path("bench-results/published"), help="where predictions are kept")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", nargs="*", help="names of measures; default all")
    chosen = parser.parse_args()
    chosen.predictions.mkdir(parents=True, exist_ok=True)
    model = RSVLM.from_pretrained(chosen.checkpoint, "auto", chosen.precision)
    found: dict[tuple[Any, ...], tuple[EvaluationSet, dict[str, float], float]] = {}
    rows = []
    for measure in MEASURES:
        source = (chosen.rsvqa or chosen.data / "rsvqa") if measure.source == "rsvqa" else chosen.data / measure.source
        if (chosen.only and measure.name not in chosen.only) or not source.exists():
            print(f"left out: {measure.name} ({source})", file=sys.stderr)
            continue
        key = (measure.task, measure.source, measure.split, measure.kinds)
        if key not in found:
            data = read_set(source, measure.task, split=measure.split)
            data, _ = require_images(data.of_kinds(list(measure.kinds)) if measure.kinds else data, skip_missing=True)
            started = time.monotonic()
            name = "-".join(str(part) for part in (measure.task, measure.source.replace("/", "-"), measure.split or "folder"))
            file = chosen.predictions / f"{name}.jsonl"
            predictions = predict_set(data, file, chosen.checkpoint, lambda: model, PredictSettings(), _progress(name))
            scores = score_predictions(data, predictions).scores["metrics"]
            found[key] = (data, scores, time.monotonic() - started)
        data, scores, seconds = found[key]
        rows.append(
            {
                **about(model, chosen.checkpoint),
                "measure": measure.name,
                "split": f"{measure.source} {measure.split or ''}".strip(),
                "items": len(data.items),
                "value": round(scores[measure.metric], 4),
                "at_least": measure.at_least,
                "seconds": round(seconds, 1),
            }
        )
    print("| measure | split | items | value | asked |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['measure']} | {row['split']} | {row['items']} | {row['value']:.4f} | {row['at_least']} |")
    append_rows(RESULTS / "published.csv", rows)


def _progress(name: str) -> Any:
    def start(total: int) -> Any:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done % 100 == 0 or done == total:
                print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)

        return advance

    return start


if __name__ == "__main__":
    main()
