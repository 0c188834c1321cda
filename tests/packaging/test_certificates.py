"""The committed certificates: what their names say, gates that follow from their numbers, and the table that quotes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_export.compare import GraphError
from rsvlm_export.verify import FORMAT, VERSION, Verdict, gates

CERTIFICATES = sorted((REPOSITORY / "docs" / "certificates").glob("*.json"))
PAGE = (REPOSITORY / "docs" / "packages.md").read_text(encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def test_every_native_precision_has_one() -> None:
    names = {file.stem for file in CERTIFICATES}
    assert {"native-fp32", "native-bf16", "native-int8", "native-int4"} <= names
    models = {_read(file)["model_sha256"] for file in CERTIFICATES}
    assert len(models) == 1  # all of one checkpoint


@pytest.mark.parametrize("file", CERTIFICATES, ids=lambda file: file.stem)
def test_a_certificate_follows_from_its_numbers(file: Path) -> None:
    values = _read(file)
    assert (values["format"], values["version"]) == (FORMAT, VERSION)
    assert f"{values['kind']}-{values['precision']}" == file.stem
    assert file.stat().st_size < 20_000
    assert not any(word in file.read_text() for word in ("/root", "/home", "/tmp", "/work"))
    assert values["sample"]["images"] >= 200
    graphs = {
        name: GraphError(error["cases"], error["max_abs"], error["relative"], error["cosine"], error["worst_case"])
        for name, error in values["graphs"].items()
    }
    metrics = {name: (metric["checkpoint"], metric["package"]) for name, metric in values["metrics"].items()}
    verdict = Verdict(values["precision"], graphs, values["greedy"], metrics, values["sample"])
    assert [(gate.name, gate.passed) for gate in gates(verdict)] == [(gate["name"], gate["passed"]) for gate in values["gates"]]
    assert values["passed"] == all(gate["passed"] for gate in values["gates"])
    assert values["forced"] == (not values["passed"])
    assert len(values["failures"]) == sum(not gate["passed"] for gate in values["gates"])


@pytest.mark.parametrize("file", CERTIFICATES, ids=lambda file: file.stem)
def test_the_page_quotes_it(file: Path) -> None:
    values = _read(file)
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| [{file.stem}](certificates/{file.name}) |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    metrics = [f"{metric['package']:.3f} ({0.0 - metric['loss_points']:+.2f})" for metric in values["metrics"].values()]
    same = f"{values['greedy']['same']} of {values['greedy']['images']}"
    assert cells[1:] == ["passed" if values["passed"] else "failed", same, *metrics]
