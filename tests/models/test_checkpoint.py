"""The checkpoint folder: what is refused and how it says so, hashes, deltas, and writing at once or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rsvlm_infer.errors import CheckpointError
from rsvlm_infer.models import checkpoint
from rsvlm_infer.models.checkpoint import CheckpointFolder, read_headers, read_scalar, save_checkpoint, sha256_of
from rsvlm_infer.models.load import load_checkpoint, read_config
from tests.models.tiny import PLAIN, random_model, torch, write_safetensors

ONE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", PLAIN, random_model(PLAIN).state_dict())


# --- what may not be opened ---------------------------------------------------------------------------------------------


def test_missing_folder_and_file_instead_of_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*rsvlm pull"):
        CheckpointFolder.open(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must be a folder.*model\.safetensors"):
        CheckpointFolder.open(tmp_path / "model.safetensors")


class _Boom:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl", "last.ckpt"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rsvlm"}')
    (tmp_path / name).write_bytes(pickle.dumps(_Boom()))
    with pytest.raises(CheckpointError, match=rf"{name}.*never.*safetensors\.torch\.save_file"):
        load_checkpoint(tmp_path)


def test_a_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps(_Boom()))
    assert load_checkpoint(folder).layout == "rsvlm"


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(99), b"\x1f\x8b" + bytes(99), pickle.dumps({})], ids=["zip", "gzip", "pickle"]
)
def test_a_tokenizer_that_is_no_text(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is an archive or a pickle \(first bytes b'"):
        CheckpointFolder.open(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_huge_json(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(checkpoint.MAX_JSON_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match=rf"{name} must be at most {checkpoint.MAX_JSON_BYTES} bytes"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", '{"a":' * 100_000], ids=["cut", "list", "binary", "deep"])
def test_a_config_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|must hold a JSON object)"):
        read_config(folder)


def test_unknown_layout(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"unknown layout \(model_type 'bert'\); known are \['rsvlm', "):
        read_config(folder)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN.to_dict()))
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        load_checkpoint(tmp_path)


# --- damaged safetensors ------------------------------------------------------------------------------------------------

_DAMAGED: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None]] = {
    "empty header": (b"", b"", 0),
    "cut body": (ONE, b"\0\0", None),
    "offsets beyond the file": ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(4), None),
    "offsets of another size": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), None),
    "overlap": ({**ONE, "b": ONE["a"]}, bytes(4), None),
    "hole": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), None),
    "negative": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4), None),
    "overflowing shape": ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4), None),
    "huge header length": (b"{}", b"", 2**62),
    "header length beyond the file": (b"{}", b"", 1000),
    "header is no JSON": (b"\xff\xfe", b"", None),
    "deep header": (b'{"a":' * 20_000, b"", None),
    "trailing bytes": (ONE, bytes(99), None),
    "unknown dtype": ({"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), None),
}


@pytest.mark.parametrize("case", list(_DAMAGED))
def test_damaged_headers(folder: Path, case: str) -> None:
    header, body, length = _DAMAGED[case]
    write_safetensors(folder / "model.safetensors", header, body, length=length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*download it again"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(folder)


def test_headers_without_torch(folder: Path) -> None:
    headers = read_headers(folder / "model.safetensors")
    assert headers["language_model.norm.weight"].shape == (16,)
    assert headers["language_model.norm.weight"].dtype == "F32"


# --- shards -------------------------------------------------------------------------------------------------------------


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "model.bin",
    ],
)
def test_an_index_that_points_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    _index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="must name plain"):
        load_checkpoint(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    _index(folder, {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3 shards: \['model-2\.safetensors', 'model-3\.safetensors'\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(folder: Path, weight_map: object) -> None:
    _index(folder, weight_map)
    with pytest.raises(CheckpointError, match="must hold an object weight_map"):
        load_checkpoint(folder)


def test_shards_and_symlinks_load(folder: Path, tmp_path: Path) -> None:
    state = random_model(PLAIN).state_dict()
    names = list(state)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").symlink_to(folder / "config.json")
    weight_map = {}
    for index, part in enumerate((names[:5], names[5:])):
        save_file({name: state[name].numpy() for name in part}, tmp_path / f"blob{index}")
        (linked / f"part-{index}.safetensors").symlink_to(tmp_path / f"blob{index}")  # as a hub's cache does
        weight_map |= dict.fromkeys(part, f"part-{index}.safetensors")
    _index(linked, weight_map)
    loaded = load_checkpoint(linked)
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())
    assert set(loaded.files) == {"config.json", "part-0.safetensors", "part-1.safetensors"}


def test_one_name_in_two_files(folder: Path) -> None:
    save_file({"language_model.norm.weight": np.ones(16, np.float32)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"given twice: language_model\.norm\.weight"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"in both model\.safetensors and other\.safetensors"):
        _ = CheckpointFolder.open(folder).tensors


# --- scalars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [("F32", struct.pack("<f", 1.5)), ("F16", struct.pack("<e", 1.5)), ("F64", struct.pack("<d", 1.5)), ("BF16", b"\xc0\x3f")],
)
def test_a_scalar_of_any_float_type(tmp_path: Path, dtype: str, raw: bytes) -> None:
    header = {"x": {"dtype": dtype, "shape": [], "data_offsets": [0, len(raw)]}}
    assert read_scalar(write_safetensors(tmp_path / "a.safetensors", header, raw), "x") == 1.5


def test_a_scalar_must_be_one_float(tmp_path: Path) -> None:
    save_file({"two": np.zeros(2, np.float32), "whole": np.zeros((), np.int64)}, tmp_path / "a.safetensors")
    for name in ("two", "whole"):
        with pytest.raises(CheckpointError, match="must be one floating-point number"):
            read_scalar(tmp_path / "a.safetensors", name)


# --- delta --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def delta_folder(tmp_path: Path) -> Path:
    """A base of two files and a delta that replaces the projector and adapts one attention matrix."""
    state = {name: value.numpy() for name, value in random_model(PLAIN).state_dict().items()}
    generator = np.random.default_rng(0)
    base = {name: value for name, value in state.items() if not name.startswith("projector.")}
    changed = {name: generator.normal(size=value.shape).astype(np.float32) for name, value in state.items() if name not in base}
    changed["language_model.norm.weight"] = np.full(16, 7, np.float32)
    changed["language_model.layers.1.attention.q.lora_a"] = generator.normal(size=(3, 16)).astype(np.float32)
    changed["language_model.layers.1.attention.q.lora_b"] = generator.normal(size=(16, 3)).astype(np.float32)
    folder = tmp_path / "delta"
    parts = [{"part": "language", "source": "some.gguf", "sha256": "0" * 64, "file": "language.safetensors"}]
    save_checkpoint(folder, PLAIN, changed, base=parts)
    save_file({name: value for name, value in base.items() if name.startswith("vision")}, folder / "vision.safetensors")
    save_file({name: value for name, value in base.items() if name.startswith("language")}, folder / "language.safetensors")
    _edit_delta(folder, files={name: sha256_of(folder / name) for name in ("vision.safetensors", "language.safetensors")})
    return folder


def _edit_delta(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps({**values, **changes}))


def test_a_delta_overrides_its_base_and_merges_low_rank_pairs(delta_folder: Path) -> None:
    loaded = load_checkpoint(delta_folder)
    state = loaded.model.state_dict()
    base = random_model(PLAIN).state_dict()
    assert torch.equal(state["language_model.norm.weight"], torch.full((16,), 7.0))
    from safetensors.numpy import load_file

    changed = load_file(delta_folder / "delta.safetensors")
    name = "language_model.layers.1.attention.q"
    expected = base[f"{name}.weight"].numpy() + changed[f"{name}.lora_b"] @ changed[f"{name}.lora_a"]
    np.testing.assert_allclose(state[f"{name}.weight"].numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(state["projector.fc1.weight"].numpy(), changed["projector.fc1.weight"])
    assert torch.equal(state["language_model.layers.0.attention.q.weight"], base["language_model.layers.0.attention.q.weight"])
    assert set(loaded.files) == {"config.json", "vision.safetensors", "language.safetensors", "delta.safetensors"}
    assert loaded.files["delta.safetensors"] == hashlib.sha256((delta_folder / "delta.safetensors").read_bytes()).hexdigest()


def test_tampered_content_is_found_by_its_hash(delta_folder: Path) -> None:
    for name in ("vision.safetensors", "delta.safetensors"):
        raw = bytearray((delta_folder / name).read_bytes())
        raw[-1] ^= 1
        (delta_folder / name).write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"wrong sha256: vision\.safetensors \(expected .*; delta\.safetensors \(expected .*pull"
    ):
        load_checkpoint(delta_folder)


def test_a_delta_without_its_base(delta_folder: Path) -> None:
    (delta_folder / "vision.safetensors").unlink()
    (delta_folder / "language.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks its base files \['language\.safetensors', 'vision\.safetensors'\]; run `rsvlm pull`"
    ):
        load_checkpoint(delta_folder)


def test_a_delta_without_its_weights(delta_folder: Path) -> None:
    (delta_folder / "delta.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its delta weights delta\.safetensors"):
        load_checkpoint(delta_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"surprise": 1, "sha256": None}, r"unknown keys \['surprise'\].*sha256 must be a string, got None"),
        ({"weights": "../delta.safetensors"}, "must name plain"),
        ({"files": {"../vision.safetensors": "0"}}, "must name plain"),
        ({"base": [{"file": "/vision.safetensors"}]}, "must name plain"),
        ({"files": ["vision.safetensors"]}, "files must be an object"),
        ({"base": {}}, "base must be a list"),
    ],
)
def test_a_bad_delta_json(delta_folder: Path, changes: dict[str, object], message: str) -> None:
    _edit_delta(delta_folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(delta_folder)


@pytest.mark.parametrize("case", ["half a pair", "unknown module", "wrong rank", "wrong width"])
def test_low_rank_pairs_that_do_not_fit(delta_folder: Path, case: str) -> None:
    a, b = np.zeros((3, 16), np.float32), np.zeros((16, 3), np.float32)
    q = "language_model.layers.1.attention.q"
    changed, message = {
        "half a pair": ({f"{q}.lora_a": a}, rf"1 unexpected: {q}\.lora_a"),
        "unknown module": ({"nowhere.lora_a": a, "nowhere.lora_b": b}, r"2 unexpected: nowhere\.lora_a, nowhere\.lora_b"),
        "wrong rank": ({f"{q}.lora_a": a, f"{q}.lora_b": b[:, :2]}, r"1 mis-shaped: .*got \[3, 16\] and \[16, 2\]"),
        "wrong width": ({f"{q}.lora_a": a[:, :8], f"{q}.lora_b": b}, r"1 mis-shaped: .*of \[16, 16\], got \[3, 8\]"),
    }[case]
    state = {name: value.numpy() for name, value in random_model(PLAIN).state_dict().items() if name.startswith("projector.")}
    save_file({**state, **changed}, delta_folder / "delta.safetensors")
    _edit_delta(delta_folder, sha256=sha256_of(delta_folder / "delta.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(delta_folder)


# --- writing ------------------------------------------------------------------------------------------------------------


def test_save_copies_everything_that_belongs_to_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / "entries.jsonl").write_text("{}\n")
    state = random_model(PLAIN).state_dict()
    folder = save_checkpoint(
        tmp_path / "deep" / "m", PLAIN, state, tokenizer=tmp_path / "tok", knowledge=tmp_path / "kb", card="# Card\n"
    )
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["MODEL_CARD.md", "config.json", "knowledge", "model.safetensors", "tokenizer.json"]
    assert (folder / "MODEL_CARD.md").read_text() == "# Card\n"
    loaded = load_checkpoint(folder)
    assert loaded.config == PLAIN
    assert loaded.knowledge_folder == folder / "knowledge"
    assert load_checkpoint(save_checkpoint(tmp_path / "n", PLAIN, state)).knowledge_folder is None
    assert [path.name for path in folder.parent.iterdir()] == ["m"]  # no temporary folder is left
    readable = stat.S_IMODE((folder / "config.json").stat().st_mode)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == readable


def test_save_never_overwrites_unasked_and_replaces_whole_folders(folder: Path) -> None:
    other = random_model(PLAIN, seed=1).state_dict()
    (folder / "stale.txt").write_text("old")
    with pytest.raises(CheckpointError, match=r"exists and is not overwritten; .*overwrite=True"):
        save_checkpoint(folder, PLAIN, other)
    assert torch.equal(
        load_checkpoint(folder).model.state_dict()["projector.fc1.weight"], random_model(PLAIN).projector.fc1.weight
    )
    save_checkpoint(folder, PLAIN, other, overwrite=True)
    assert torch.equal(load_checkpoint(folder).model.state_dict()["projector.fc1.weight"], other["projector.fc1.weight"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_nothing(folder: Path) -> None:
    before = sha256_of(folder / "model.safetensors")
    with pytest.raises(AttributeError):
        save_checkpoint(folder, PLAIN, {"a": "no tensor"}, overwrite=True)
    assert sha256_of(folder / "model.safetensors") == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(FileNotFoundError):
        save_checkpoint(folder.parent / "new", PLAIN, {}, knowledge=folder / "absent")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_views_and_shared_memory_can_be_saved(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "t", PLAIN, {"a": shared, "b": shared.T, "c": shared})
    save_checkpoint(tmp_path / "n", PLAIN, {"a": shared.numpy(), "b": shared.numpy().T, "c": shared.numpy()})
    for name in ("t", "n"):
        headers = read_headers(tmp_path / name / "model.safetensors")
        assert {key: header.shape for key, header in headers.items()} == {"a": (3, 4), "b": (4, 3), "c": (3, 4)}
