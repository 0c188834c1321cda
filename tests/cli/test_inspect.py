"""What plan, info and doctor say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rsvlm_infer.cli import inspect as cli_inspect
from rsvlm_infer.config import AugmentationConfig, ExpertsConfig, TextEncoderConfig
from tests.cli.running import objects, run
from tests.tasks.telling_model import picture, telling_config


def test_plan_needs_only_a_config(capsys: pytest.CaptureFixture[str], files: dict[str, str], checkpoint: str) -> None:
    code, out, _ = run(capsys, "plan", files["red"], "-c", checkpoint)
    assert code == 0
    assert out.splitlines() == [
        "28 x 28 px (height x width)\tfixed\t1 tiles\t4 patches\t4 visual tokens",
        "tile\trow_off\tcol_off\theight\twidth\tgrid\tdepth\tcomplexity",
        "0\t0\t0\t28\t28\t2x2\t0\t1.000",
    ]
    code, out, _ = run(capsys, "plan", files["red"], files["bad"], "-c", checkpoint)
    assert (code, out) == (3, f"{files['red']}\t28 x 28 px (height x width)\tfixed\t1 tiles\t4 patches\t4 visual tokens\n")
    code, out, _ = run(capsys, "plan", files["red"], files["bad"], "-c", checkpoint, "-f", "json")
    good, bad = objects(out)
    assert (good["num_tokens"], good["plan"]["tiling"]) == (4, "fixed")
    assert bad["source"] == files["bad"]


def test_plan_of_a_georeferenced_scene_shows_its_distances(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: str
) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    file = str(tmp_path / "scene.tif")
    profile = {"driver": "GTiff", "height": 56, "width": 56, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(file, "w", **profile, transform=rasterio.transform.from_origin(5e5, 4e6, 10, 10)) as target:
        target.write(picture("red", 56, 56).transpose(2, 0, 1))
    code, out, err = run(capsys, "plan", file, "-c", checkpoint)
    assert code == 0
    assert out.splitlines()[1] == "gsd native 10 m\teffective 20 m"
    assert "ground sampling distance 20 m, native 10 m; use tiling" in err


def test_plan_without_a_pulled_checkpoint_uses_the_packaged_config(
    capsys: pytest.CaptureFixture[str], files: dict[str, str], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = Path(checkpoint).parent / "packaged"
    packaged.mkdir()
    Path(checkpoint).rename(packaged / "rsvlm-135m")
    monkeypatch.setattr(cli_inspect, "PACKAGED_CHECKPOINTS", packaged)
    assert run(capsys, "plan", files["red"])[0] == 0
    monkeypatch.setattr(cli_inspect, "PACKAGED_CHECKPOINTS", packaged / "nowhere")
    code, _, err = run(capsys, "plan", files["red"])
    assert (code, err.count("\n")) == (1, 1)


def test_info_lists_modules_files_and_hashes(capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    code, out, _ = run(capsys, "info", checkpoint)
    assert code == 0
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert f"  {abc}         3 B  model.safetensors" in out
    assert "  experts       off" in out
    assert "  vision        clip, 2 layers, width 8, 14-px patches, taps [1, 1, 2]" in out
    code, out, _ = run(capsys, "info", checkpoint, "--format", "json")
    (values,) = objects(out)
    assert values["modules"]["augmentation"] is None
    assert values["files"][1] == {"file": "model.safetensors", "bytes": 3, "sha256": abc}
    assert values["config"]["vision"]["hidden_size"] == 8


def test_info_says_which_files_are_damaged(capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    folder = Path(checkpoint)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    weights = folder / "delta.safetensors"
    weights.write_bytes(b"abc")
    delta = {"format": 1, "base": [], "weights": weights.name, "sha256": abc.upper(), "files": {"model.safetensors": abc}}
    (folder / "delta.json").write_text(json.dumps(delta))
    code, out, err = run(capsys, "info", checkpoint, "-f", "json")
    assert (code, objects(out)[0]["damaged"], err) == (0, [], "")

    weights.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    damage = f"delta.safetensors has sha256 {empty}, delta.json says {abc.upper()}"
    code, out, err = run(capsys, "info", checkpoint)
    assert (code, out.splitlines()[-1]) == (1, f"damaged: {damage}")
    assert err == f"rsvlm: checkpoint {checkpoint} is damaged: {damage}; run `rsvlm pull` again or restore the files\n"

    weights.unlink()
    (folder / "delta.json").write_text(json.dumps(delta | {"base": [{"part": "vision", "file": "vision.safetensors"}]}))
    code, out, _ = run(capsys, "info", checkpoint, "-f", "json")
    assert (code, objects(out)[0]["damaged"]) == (
        1,
        [f"{name}.safetensors is missing, delta.json names it" for name in ("delta", "vision")],
    )

    (folder / "delta.json").write_text(json.dumps({"format": 2}))
    code, out, _ = run(capsys, "info", checkpoint)
    assert (code, "format must be 1, got 2" in out.splitlines()[-1]) == (1, True)


def test_every_module_has_its_line() -> None:
    config = telling_config(
        text_encoder=TextEncoderConfig(300, 8, 16, 1, 2, 5, "quick_gelu", 1e-5, 2),
        augmentation=AugmentationConfig(num_heads=2),
        experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=4),
    )
    assert cli_inspect.modules(config) == {
        "vision": "clip, 2 layers, width 8, 14-px patches, taps [1, 1, 2]",
        "projector": "width 8, pixel shuffle 1",
        "language": "llama, 1 layers, width 8, context 512",
        "text_encoder": "1 layers, width 8",
        "alignment": "object, region, scene, width 3, text from language",
        "augmentation": "5 cues per level",
        "experts": "6 experts, top 2, glu_silu",
    }
    bare = cli_inspect.modules(telling_config(language=None, projector=None, alignment=None))
    assert [name for name, text in bare.items() if text is None] == [
        "projector",
        "language",
        "text_encoder",
        "alignment",
        "augmentation",
        "experts",
    ]


def test_info_of_nothing_says_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info")
    assert (code, out) == (1, "")
    assert "rsvlm pull" in err


def test_doctor_names_machine_backends_and_next_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "  eager          can run: float32" in out
    assert "no default checkpoint: rsvlm pull" in out
    monkeypatch.setattr(cli_inspect.backends, "why_not", lambda name: "torch is not installed; run pip install torch")
    code, out, _ = run(capsys, "doctor", "-f", "json")
    (values,) = objects(out)
    assert values["backends"]["eager"]["can_run"] is False
    assert values["next_steps"][0] == "backend eager: torch is not installed; run pip install torch"
    assert values["checkpoint"] == {"path": str(tmp_path / "home" / "rsvlm-135m"), "present": False}
    assert values["hardware"]["libraries"]["numpy"]
    bare = dataclasses.replace(
        cli_inspect.hardware.probe(), native_why_not="no compiler", memory_bytes=3 << 30, libraries={"rasterio": None}
    )
    monkeypatch.setattr(cli_inspect.hardware, "probe", lambda: bare)
    out = run(capsys, "doctor")[1]
    assert "slower preprocessing: no compiler" in out
    assert 'pip install "rsvlm-infer[geo]"' in out
    assert "3.0 GiB memory" in out
    assert "  rasterio       not installed" in out
