"""The process that measures one row: `python -m rsvlm_infer.bench.worker JOB_FOLDER`. Knows files and pipes, nothing of models.

Reads job.json, writes result.json and logits.npy into the same folder; says "done total" on stdout as it goes. A refusal that
this package makes on purpose becomes result.json with an error; anything else is a traceback and a non-zero exit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from ..errors import RsvlmError
from .measure import measure, workload_from_dict
from .schema import Row


def main(argv: list[str] | None = None) -> int:
    """Measures the job in the folder named by the only argument."""
    (folder,) = (Path(each) for each in (sys.argv[1:] if argv is None else argv))
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    key = {name: job[name] for name in ("backend", "precision", "scenario")}
    token_ids: dict[str, list[int]] = {}
    try:
        measured = measure(workload_from_dict(job["workload"]), **key, progress=_report)
    except RsvlmError as error:
        row = Row(**key, error=str(error))
    else:
        row, token_ids = measured.row, measured.token_ids
        np.save(folder / "logits.npy", measured.logits, allow_pickle=False)
    result = {"row": dataclasses.asdict(row), "token_ids": token_ids}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def _report(done: int, total: int) -> None:
    sys.stdout.write(f"{done} {total}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
