"""store: entries are found by level, come back from disk as they were, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rsvlm_infer.errors import CheckpointError, InputError
from rsvlm_infer.knowledge import store
from rsvlm_infer.knowledge.store import KnowledgeBase

TEXTS = ("a plane", "planes are parked", "an airport", "a ship", "a harbour", "boats at\u2028a pier")
LEVELS = np.array([0, 1, 2, 0, 2, 1])
EMBEDDINGS = np.array([[1, 0, 0], [1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)


@pytest.fixture
def base() -> KnowledgeBase:
    return KnowledgeBase(TEXTS, LEVELS, EMBEDDINGS)


def test_search_stays_in_its_level_and_gives_rows_of_the_base(base: KnowledgeBase) -> None:
    visual = np.array([[0, 1, 0]], np.float32)
    scores, ids, texts = base.search(0, visual, None, 5, 0.5)
    assert (ids.tolist(), texts) == ([3, 0], ("a ship", "a plane"))
    assert scores.tolist() == [1.0, 0.0]
    scores, ids, texts = base.search(2, visual, np.array([1, 0, 0], np.float32), 1, 2.0)
    assert (ids.tolist(), texts) == ([2], ("an airport",))  # 0.6 + 2 x 0.8 beats 1 + 2 x 0
    np.testing.assert_allclose(scores, [2.2], atol=2e-3)
    np.testing.assert_array_equal(base.embeddings[ids], EMBEDDINGS[[2]].astype(np.float16))
    assert ids.dtype == np.int64


def test_ties_by_id() -> None:
    same = np.tile(np.array([[0.6, 0.8]], np.float32), (6, 1))
    base = KnowledgeBase([f"text {index}" for index in range(6)], np.array([1, 0, 1, 0, 1, 1]), same)
    assert base.search(1, same[:1], None, 3, 0.5)[1].tolist() == [0, 2, 4]
    assert base.search(0, same[:1], same[0], 3, 0.5)[1].tolist() == [1, 3]


def test_empty_level() -> None:
    base = KnowledgeBase(["a"], np.array([0]), np.array([[1.0, 0.0]]))
    scores, ids, texts = base.search(2, np.array([[1, 0]], np.float32), None, 5, 0.5)
    assert (scores.shape, ids.shape, texts) == ((0,), (0,), ())


def test_save_and_load(base: KnowledgeBase, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "knowledge"
    base.save(folder)
    loaded = KnowledgeBase.load(folder)
    assert loaded.texts == TEXTS
    assert loaded.levels.tolist() == LEVELS.tolist()
    assert loaded.embeddings.dtype == np.float16
    assert loaded.embeddings.tobytes() == base.embeddings.tobytes()
    assert (len(loaded), loaded.embed_size) == (6, 3)
    first = json.loads((folder / "entries.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == {"level": "object", "text": "a plane"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["knowledge"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["entries.jsonl"] == modes["embeddings.safetensors"]


def test_the_embedder_is_kept_and_another_one_refused(base: KnowledgeBase, tmp_path: Path) -> None:
    stamped = KnowledgeBase(TEXTS, LEVELS, EMBEDDINGS, "a" * 64)
    stamped.save(tmp_path / "k")
    loaded = KnowledgeBase.load(tmp_path / "k")
    assert loaded.embedder == "a" * 64
    loaded.require_embedder("a" * 64)
    with pytest.raises(
        CheckpointError, match=r"embedded by checkpoint aaaaaaaaaaaa, .* with checkpoint bbbbbbbbbbbb; build it"
    ):
        loaded.require_embedder("b" * 64)
    base.save(tmp_path / "k")
    assert KnowledgeBase.load(tmp_path / "k").embedder is None
    base.require_embedder("b" * 64)  # nothing recorded, nothing checked


def test_save_replaces_whole_and_twice_the_same(base: KnowledgeBase, tmp_path: Path) -> None:
    base.save(tmp_path / "k")
    (tmp_path / "k" / "stale.txt").write_text("")
    before = (tmp_path / "k" / "embeddings.safetensors").read_bytes()
    base.save(tmp_path / "k")
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == ["embeddings.safetensors", "entries.jsonl"]
    assert (tmp_path / "k" / "embeddings.safetensors").read_bytes() == before


def test_save_that_fails_keeps_the_old_one(base: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base.save(tmp_path / "k")
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="Permission denied"):
        KnowledgeBase(TEXTS[:1], LEVELS[:1], EMBEDDINGS[:1]).save(tmp_path / "k")
    with pytest.raises(OSError, match="Permission denied"):
        base.save(tmp_path / "other")
    assert len(KnowledgeBase.load(tmp_path / "k")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": TEXTS[:5]}, r"must have one length, got 5, 6 and \[6, 3\]"),
        ({"embeddings": EMBEDDINGS[0]}, r"must have one length, got 6, 6 and \[3\]"),
        ({"levels": np.array([0, 1, 2, 3, -1, 1])}, r"levels must be in 0\.\.2 .* got \[-1, 3\]"),
        ({"texts": ("a", "b", " ", "d", "e", "f")}, r"texts must not be blank, got blank ones at \[2\]"),
        ({"embeddings": EMBEDDINGS * np.array([[1], [1], [1], [2], [1], [1]])}, "entry 3 has 2; L2-normalise"),
        ({"embeddings": np.full((6, 3), np.nan)}, "must have length 1"),
    ],
)
def test_contract(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"texts": TEXTS, "levels": LEVELS, "embeddings": EMBEDDINGS}
    with pytest.raises(InputError, match=message):
        KnowledgeBase(**{**arguments, **changes})


def test_unknown_level(base: KnowledgeBase) -> None:
    for level in (-1, 3):
        with pytest.raises(InputError, match=rf"level must be in 0\.\.2 .* got {level}"):
            base.search(level, EMBEDDINGS[:1], None, 1, 0.5)


def test_damaged_folders(base: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "k"
    with pytest.raises(CheckpointError, match=r"entries\.jsonl must be a readable part .*FileNotFoundError"):
        KnowledgeBase.load(folder)
    base.save(folder)
    entries, weights = folder / "entries.jsonl", folder / "embeddings.safetensors"
    good, whole = entries.read_text(encoding="utf-8"), weights.read_bytes()
    for content in ("{", "[1]\n", '{"text": "a"}\n', '{"text": "a", "level": "galaxy"}\n', '"a"\n', "[" * 100_000):
        entries.write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"entries\.jsonl must be a readable part") as caught:
            KnowledgeBase.load(folder)
        assert "\n" not in str(caught.value)
    entries.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"entries\.jsonl must be a readable part"):
        KnowledgeBase.load(folder)
    entries.write_text(good.split("\n", 1)[1], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"one length, got 5, 5 and \[6, 3\]"):
        KnowledgeBase.load(folder)
    entries.write_text(good, encoding="utf-8")
    for damaged in (b"", whole[:20], whole[:-1], b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"embeddings\.safetensors must be a readable part"):
            KnowledgeBase.load(folder)
    save_file({"other": EMBEDDINGS}, weights)
    with pytest.raises(CheckpointError, match="does not contain tensor embeddings"):
        KnowledgeBase.load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"embeddings\.safetensors must be a readable part"):
        KnowledgeBase.load(folder)
    monkeypatch.setattr(store, "MAX_ENTRIES_BYTES", 10)
    with pytest.raises(CheckpointError, match="larger than 0 MiB"):
        KnowledgeBase.load(folder)
