"""The process that measures one row: `python -m rsvlm_infer.bench.worker JOB_FOLDER`. Knows files and pipes, nothing of models.

Reads job.json, writes result.json and logits.npy into the same folder; says "done total" on stdout as it goes. A refusal that
this package makes on purpose becomes result.json with an error; anything else is a traceback and a non-zero exit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RsvlmError
from .measure import measure, workload_from_dict
from .schema import row_from_dict


def main(argv: list[str] | None = None) -> int:
    """Measures the job in the folder named by the only argument."""
    (folder,) = (Path(each) for each in (sys.argv[1:] if argv is None else argv))
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    row = row_from_dict(job["row"])
    values: dict[str, Any] = {"token_ids": {}, "passes": []}
    try:
        measured = measure(workload_from_dict(job["workload"]), row, _report, repeats=job["repeats"], judged=job["judged"])
    except RsvlmError as error:
        row = dataclasses.replace(row, error=str(error))
    else:
        row = measured.row
        values = {"token_ids": measured.token_ids, "passes": [dataclasses.asdict(each) for each in measured.passes]}
        np.save(folder / "logits.npy", measured.logits, allow_pickle=False)
    (folder / "result.json").write_text(json.dumps({"row": dataclasses.asdict(row), **values}), encoding="utf-8")
    return 0


def _report(done: int, total: int) -> None:
    sys.stdout.write(f"{done} {total}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
