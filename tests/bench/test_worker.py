"""The measuring process, run inside this one: what it reads, writes and says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.bench.measure import Workload, workload_to_dict
from rsvlm_infer.bench.schema import Row, row_from_dict
from rsvlm_infer.bench.worker import main


def _job(folder: Path, work: Workload, precision: str) -> list[str]:
    row = dataclasses.asdict(Row("eager", precision, "Offline", package="twin"))
    job = {"row": row, "workload": workload_to_dict(work), "repeats": [0, 1], "judged": True}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return [str(folder)]


def test_a_measured_job_leaves_row_tokens_and_logits(
    work: Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_job(tmp_path, work, "bfloat16")) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    row = row_from_dict(result["row"])
    assert row.key == ("eager", "bfloat16", "Offline", "twin")
    assert [each["images"] for each in result["passes"]] == [4, 4]
    assert row.ok
    assert result["token_ids"]["forest-odd.jpg"] == [0, 1, 2, 3, 4, 6]
    assert np.load(tmp_path / "logits.npy").shape == (2, 7)
    assert capsys.readouterr().out.splitlines()[-1] == "15 15"


def test_a_refusal_is_a_result_and_no_traceback(work: Workload, tmp_path: Path) -> None:
    assert main(_job(tmp_path, work, "float16")) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["row"]["error"] == "precision float16 is not for this fake; use float32"
    assert result["token_ids"] == {}
    assert not (tmp_path / "logits.npy").exists()
