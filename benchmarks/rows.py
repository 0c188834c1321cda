"""What every row of `benchmarks/results/` says about where it was measured, and how rows are kept."""

from __future__ import annotations

import csv
import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsvlm_infer import RSVLM
from rsvlm_infer.bench.evaluate import checkpoint_digest
from rsvlm_infer.hardware import probe

RESULTS = Path(__file__).with_name("results")


def about(model: RSVLM, checkpoint: Path) -> dict[str, Any]:
    """Date, machine, checkpoint and precision."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": probe().cpu,
        "checkpoint": checkpoint_digest(checkpoint),
        "precision": model.backend.precision,
    }


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows at the end of a CSV file, which gets its header, the first row's keys, when it is new."""
    if not rows:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
