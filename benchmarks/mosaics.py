"""`python -m benchmarks.mosaics`: what and where in large scenes, DRIS against fixed and anyres at equal budgets of visual tokens.

A mosaic holds 16 to 64 images of RSICD's val split in the cells of a uniform square of 1,344 to 2,688 pixels, so what it shows is
known and most of its ground is empty. Three tasks: is a kind of place there (yes or no, from the language model), is it there by the
alignment score (area under the ROC curve over all kinds), and which kinds are there (a list, scored by F1).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsvlm_infer import RSVLM
from rsvlm_infer.evaluation.datasets import RSICD_THEMES, read_rsicd
from rsvlm_infer.imagery.source import open_scene
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.tasks.classify import LABEL_TEMPLATE
from training.samples import MOSAIC_QUESTION, PRESENCE_QUESTION, mosaic

from .rows import RESULTS, about, append_rows

# (name, tiling, budget of visual tokens, anyres grid, query-aware plan)
SETTINGS: tuple[tuple[str, str, int, int, bool], ...] = (
    ("fixed", "fixed", 64, 0, False),
    ("anyres 2x2", "anyres", 1024, 2, False),
    ("anyres 3x3", "anyres", 1024, 3, False),
    ("dris", "dris", 64, 0, False),
    ("dris", "dris", 128, 0, False),
    ("dris", "dris", 256, 0, False),
    ("dris", "dris", 1024, 0, False),
    ("dris query-aware", "dris", 256, 0, True),
)


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """A picture, the words of what it shows, and (word, present) questions, as many present as absent."""

    picture: npt.NDArray[np.uint8]
    present: tuple[str, ...]
    questions: tuple[tuple[str, bool], ...]


def make_mosaics(rsicd: Path, count: int, questions: int, seed: int) -> list[Mosaic]:
    """`count` mosaics of the val split, the same for every setting."""
    records = read_rsicd(rsicd, "val")
    of_theme = {theme: [row for row, record in enumerate(records) if record.theme == theme] for theme in RSICD_THEMES}
    rng = np.random.default_rng(seed)
    words = list(RSICD_THEMES.values())

    def pixels(row: int) -> npt.NDArray[np.uint8]:
        with open_scene(records[row].path) as scene:
            return scene.read(0, 0, scene.height, scene.width)[0]

    out = []
    for place in range(count):
        images = (16, 32, 64)[place % 3]
        rows, picture = mosaic(rng, {theme: part for theme, part in of_theme.items() if part}, pixels, (images, images))
        present = tuple(dict.fromkeys(RSICD_THEMES[records[row].theme] for row in rows))
        absent = [word for word in words if word not in present]
        half = min(questions // 2, len(present))
        asked = [(str(word), True) for word in rng.choice(present, half, replace=False)]
        asked += [(str(word), False) for word in rng.choice(absent, half, replace=False)]
        out.append(Mosaic(picture, present, tuple(asked)))
    return out


def measure(model: RSVLM, mosaics: list[Mosaic], tiling: str, budget: int) -> dict[str, float]:
    """All three tasks of one setting."""
    words = list(RSICD_THEMES.values())
    labels = model.embed_text([LABEL_TEMPLATE.replace("{label}", word) for word in words])
    hits, areas, scores, seconds, tokens, tiles = [], [], [], [], [], []
    options: dict[str, Any] = {"tiling": tiling} | ({"max_visual_tokens": budget} if tiling == "dris" else {})
    for each in mosaics:
        for word, present in each.questions:
            started = time.perf_counter()
            answer = model.ask(each.picture, PRESENCE_QUESTION.format(theme=word), choices=["yes", "no"], **options)
            seconds.append(time.perf_counter() - started)
            hits.append((answer.text == "yes") == present)
        plan = model.plan(each.picture, **options)
        tokens.append(plan.num_tokens)
        tiles.append(len(plan.plan.tiles))
        found = model.embed_levels(each.picture, **options)
        # a kind of place is there when one tile shows it: the best tile at region and at object level
        region = (found.region @ labels.T).max(axis=0)
        objects = (found.object @ labels.T).mean(axis=1).max(axis=0)
        areas.append(roc_area(region + objects, np.array([word in each.present for word in words])))
        text = model.ask(each.picture, MOSAIC_QUESTION, max_new_tokens=64, **options).text
        named = {part.strip(" .").lower() for part in text.split(",")} & set(words)
        scores.append(2 * len(named & set(each.present)) / max(1, len(named) + len(each.present)))
    return {
        "questions": len(hits),
        "tokens": round(float(np.mean(tokens)), 1),
        "tiles": round(float(np.mean(tiles)), 1),
        "presence": round(float(np.mean(hits)), 4),
        "presence_auc": round(float(np.mean(areas)), 4),
        "list_f1": round(float(np.mean(scores)), 4),
        "answer_seconds": round(float(np.median(seconds)), 3),
    }


def roc_area(scores: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_]) -> float:
    """How often a present kind scores above an absent one; ties count half."""
    above = scores[truth][:, None] - scores[~truth][None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against tokens and against time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "mosaics"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharey="row", layout="constrained")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[str(row["tiling"]).split(" ")[0] if "query" not in str(row["tiling"]) else "dris query-aware"].append(row)
    marks = {"fixed": "s", "anyres": "^", "dris": "o", "dris query-aware": "*"}
    for line, (metric, title) in enumerate((("presence", "yes/no accuracy"), ("presence_auc", "alignment: area under ROC"))):
        for column, (axis, label) in enumerate((("tokens", "visual tokens"), ("answer_seconds", "seconds per answer"))):
            for name, part in groups.items():
                part = sorted(part, key=lambda row: row[axis])
                axes[line][column].plot([r[axis] for r in part], [r[metric] for r in part], marker=marks[name], label=name)
            axes[line][column].set_xlabel(label)
            axes[line][column].grid(alpha=0.3)
        axes[line][0].set_ylabel(title)
    axes[0][0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measures all settings on the same mosaics, prints the table, appends rows to mosaics.csv and draws the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mosaics", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with rsicd")
    parser.add_argument("--mosaics", type=int, default=24)
    parser.add_argument("--questions", type=int, default=8, help="per mosaic, half of them yes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/mosaics.svg"))
    chosen = parser.parse_args()
    mosaics = make_mosaics(chosen.data / "rsicd", chosen.mosaics, chosen.questions, chosen.seed)
    model = RSVLM.from_pretrained(chosen.checkpoint, "auto", chosen.precision)
    config = model.backend.config
    rows = []
    print("| tiling | tokens | tiles | yes/no | ROC area | list F1 | seconds |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, tiling, budget, grid, query_aware in SETTINGS:
        side = grid * config.preprocess.tile_px
        model.backend.config = dataclasses.replace(
            config,
            grid_pinpoints=((side, side),) if grid else config.grid_pinpoints,
            dris=dataclasses.replace(config.dris, query_aware=query_aware),
        )
        row = {
            **about(model, chosen.checkpoint),
            "tiling": name,
            "budget": budget,
            "mosaics": len(mosaics),
            **measure(model, mosaics, tiling, budget),
        }
        rows.append(row)
        values = [row[key] for key in ("tokens", "tiles", "presence", "presence_auc", "list_f1", "answer_seconds")]
        print(f"| {name} | " + " | ".join(str(value) for value in values) + " |", flush=True)
    append_rows(RESULTS / "mosaics.csv", rows)
    plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
