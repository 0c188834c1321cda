"""Which rows a run has, and what a package folder is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rsvlm_infer.bench.measure import Workload
from rsvlm_infer.bench.plan import ModelChoice, RowPlan, choose_models, package_choice, plan_rows
from rsvlm_infer.errors import InputError


def _titles(plans: list[RowPlan]) -> list[str]:
    return [plan.row().title for plan in plans]


def test_the_baseline_is_always_first_and_each_model_there_once() -> None:
    models = choose_models("here", ["eager"], ["bfloat16", "float32"], [])
    assert [(model.backend, model.precision) for model in models] == [("eager", "float32"), ("eager", "bfloat16")]
    assert _titles(plan_rows(models, ["Offline", "Offline"])) == ["eager float32 Offline", "eager bfloat16 Offline"]
    assert len(plan_rows(models, ["SingleStream", "Offline"])) == 4
    with pytest.raises(InputError, match="Server"):
        plan_rows(models, ["Server"])


def test_packages_are_named_only_where_backend_and_precision_do_not_tell_them_apart() -> None:
    packages = [ModelChoice("native", "int4", f"/{place}") for place in ("a/one", "a/two", "b/two", "a/one")]
    models = choose_models("here", [], [], [*packages, ModelChoice("onnx", "int4", "/three")])
    assert [model.label for model in models] == [None, "one", "/a/two", "/b/two", None]
    assert [model.folder for model in models] == ["here", "/a/one", "/a/two", "/b/two", "/three"]
    assert not choose_models("/p", [], [], [packages[0]], baseline=False)[0].label


def test_axes_vary_only_when_they_have_several_values(work: Workload) -> None:
    model = ModelChoice("native", "int4", "/p", "mine")
    assert _titles(plan_rows([model], ["SingleStream", "Offline"], batches=[8])) == [
        "native int4 SingleStream mine",
        "native int4 Offline mine",
    ]
    plans = plan_rows([model], ["SingleStream", "Offline"], budgets=[64, 256], batches=[1, 8])
    assert _titles(plans) == [
        "native int4 SingleStream mine budget 64",
        "native int4 SingleStream mine budget 256",
        "native int4 Offline mine budget 64 batch 1",
        "native int4 Offline mine budget 64 batch 8",
        "native int4 Offline mine budget 256 batch 1",
        "native int4 Offline mine budget 256 batch 8",
    ]
    done = plans[-1].workload(work)
    assert (done.checkpoint, done.offline_batch, done.max_visual_tokens) == ("/p", 8, 256)
    assert done.scene_options == {"max_visual_tokens": 256}
    assert plans[0].workload(work).offline_batch == work.offline_batch
    assert dataclasses.replace(work, tiling="dris").scene_options == {"tiling": "dris"}


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--package must name an exported package.*rsvlm export"):
        package_choice(tmp_path)
