"""`rsvlm kb` in this process on the fake backend, whose embedding of a text is a colour named by its last letter; once for real."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer import cli
from rsvlm_infer.config import LEVELS
from rsvlm_infer.errors import CheckpointError
from rsvlm_infer.knowledge.mine import read_scenes
from rsvlm_infer.knowledge.store import KnowledgeBase
from rsvlm_infer.models.load import embedder_digest
from rsvlm_infer.pipeline import RSVLM
from tests.tasks.telling_model import TellingBackend, load_tokenizer, picture, telling_config

CAPTIONS = [
    ("airport", "train", ["some white planes are near a terminal .", "planes near a terminal"]),
    ("airport", "train", ["many white planes are near the terminal in an airport ."]),
    ("river", "train", ["green trees are in two sides of a river ."]),
    ("river", "val", ["a ferris wheel beside a ferris wheel near yellow tents ."]),
    ("river", "test", ["a ferris wheel beside a ferris wheel near yellow tents ."]),
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def write_captions(folder: Path, copies: int = 1) -> Path:
    """captions.json of RSICD's form."""
    folder.mkdir()
    values = [
        {"filename": f"{index}.jpg", "theme": theme, "split": split, "captions": captions}
        for index, (theme, split, captions) in enumerate(CAPTIONS * copies)
    ]
    (folder / "captions.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def rsicd(tmp_path: Path) -> str:
    return str(write_captions(tmp_path / "rsicd"))


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Texts that end in b, c and d: the fake backend embeds them as red, green and blue."""
    file = tmp_path / "own.jsonl"
    entries = [("object", "crab"), ("object", "zinc"), ("object", "bread"), ("region", "web"), ("scene", "seabed")]
    file.write_text("".join(json.dumps({"level": level, "text": text}) + "\n" for level, text in entries))
    return str(file)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The default checkpoint: a config, weights that nothing reads, and the fake backend in its place."""
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(RSVLM, "from_pretrained", lambda path, backend, precision: RSVLM(TellingBackend(), tokenizer))
    folder = tmp_path / "home" / "rsvlm-135m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(telling_config().to_dict()))
    (folder / "model.safetensors").write_bytes(b"abc")
    return str(folder)


@pytest.fixture
def small(capsys: pytest.CaptureFixture[str], fake: str, own: str, tmp_path: Path) -> str:
    """A base of the own entries alone."""
    vectors = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 2]]
    folder = tmp_path / "small"
    texts = ["crab", "zinc", "bread", "web", "seabed"]
    KnowledgeBase(texts, np.array([0, 0, 0, 1, 2]), vectors, embedder_digest(fake)).save(folder)
    return str(folder)


def test_build_mines_the_training_split_and_writes_beside_the_checkpoint(
    capsys: pytest.CaptureFixture[str], fake: str, rsicd: str, own: str
) -> None:
    before = sorted(Path(fake).rglob("*"))
    code, out, err = run(capsys, "kb", "build", "--rsicd", rsicd, "--min-images", "1", "--add", own, "--format", "json")
    facts = len(read_scenes())
    folder = Path(f"{fake}-knowledge")
    digest = hashlib.sha256(f"{{}}\n{hashlib.sha256(b'abc').hexdigest()}".encode()).hexdigest()
    assert (code, err) == (0, "")
    assert objects(out) == [
        {"folder": str(folder), "entries": facts + 15, "object": 7, "region": 5, "scene": facts + 3, "embedder": digest}
    ]
    assert sorted(Path(fake).rglob("*")) == before
    base = KnowledgeBase.load(folder)
    assert base.texts[:4] == ("planes", "terminal", "river", "trees")
    assert base.texts[4:8] == ("white planes", "green trees", "terminal in an airport", "two sides of a river")
    assert "airport with planes and terminal" in base.texts
    assert "ferris" not in " ".join(base.texts)  # a word of val and test alone
    colours = [(1 + ord(text[-1])) % 3 for text in base.texts]
    np.testing.assert_array_equal(base.embeddings.argmax(axis=1), colours)
    assert base.embedder == embedder_digest(fake) == digest


def test_build_without_captions_says_what_is_left(capsys: pytest.CaptureFixture[str], fake: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "base"
    code, out, err = run(capsys, "kb", "build", "-o", str(target))
    assert (code, out) == (0, f"{target}\t40 entries\t0 object\t0 region\t40 scene\n")
    assert err == "rsvlm: no --rsicd: only scene facts and your own entries, no mined objects and regions\n"
    assert sorted(path.name for path in target.iterdir()) == ["embeddings.safetensors", "entries.jsonl"]


def test_extend_keeps_entries_and_skips_known_ones(
    capsys: pytest.CaptureFixture[str], small: str, own: str, tmp_path: Path
) -> None:
    more = tmp_path / "more.csv"
    more.write_text("text,level\nCRAB,object\ncrab,region\nkelp bed,scene\nkelp bed,scene\n")
    target = tmp_path / "new"
    code, out, err = run(capsys, "kb", "build", "--extend", small, "-a", own, "-a", str(more), "-o", str(target))
    assert (code, out, err) == (0, f"{target}\t7 entries\t3 object\t2 region\t2 scene\n", "")
    base = KnowledgeBase.load(target)
    assert base.texts == ("crab", "zinc", "bread", "web", "seabed", "crab", "kelp bed")
    assert base.embeddings.argmax(axis=1).tolist() == [0, 1, 2, 0, 2, 0, 2]
    assert run(capsys, "kb", "build", "--extend", small, "-a", own, "-o", small)[1].startswith(f"{small}\t5 entries\t")


def test_show(capsys: pytest.CaptureFixture[str], small: str) -> None:
    code, out, err = run(capsys, "kb", "show", "-k", small)
    assert (code, out) == (0, "object\tcrab\nobject\tzinc\nobject\tbread\nregion\tweb\nscene\tseabed\n")
    assert err.startswith("rsvlm: 5 entries (3 object, 1 region, 1 scene), embedded by checkpoint ")
    code, out, err = run(capsys, "-q", "kb", "show", "-k", small, "--level", "scene", "--format", "json")
    assert (code, objects(out), err) == (0, [{"id": 4, "level": "scene", "text": "seabed"}], "")


def test_search_by_text(capsys: pytest.CaptureFixture[str], small: str) -> None:
    code, out, err = run(capsys, "kb", "search", "music", "-k", small, "--top", "2")
    assert (code, err) == (0, "")
    assert out == "object\t1.0000\tzinc\nobject\t0.0000\tcrab\nregion\t0.0000\tweb\nscene\t0.0000\tseabed\n"
    out = run(capsys, "kb", "search", "music", "-k", small, "-l", "object", "--top", "1", "-f", "json")[1]
    assert objects(out) == [{"level": "object", "score": 1.0, "id": 1, "text": "zinc"}]


def test_search_by_image_and_question(capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path) -> None:
    image = str(tmp_path / "blue.png")
    Image.fromarray(picture("blue")).save(image)
    search = ("kb", "search", "-k", small, "--level", "object", "--image", image)
    names = [line.split("\t")[2] for line in run(capsys, *search)[1].splitlines()]
    assert names[0] == "bread"
    found = objects(run(capsys, *search, "grab", "--query-weight", "9", "-f", "json")[1])
    assert [entry["text"] for entry in found] == ["crab", "bread", "zinc"]
    plain = objects(run(capsys, *search, "-f", "json")[1])
    default = objects(run(capsys, *search, "grab", "-f", "json")[1])
    by_name = {entry["text"]: entry["score"] for entry in plain}
    assert {entry["text"]: pytest.approx(entry["score"], abs=1e-5) for entry in default} == {
        "crab": by_name["crab"] + 0.5,
        "bread": by_name["bread"],
        "zinc": by_name["zinc"],
    }


def test_default_places(capsys: pytest.CaptureFixture[str], small: str, fake: str) -> None:
    code, out, err = run(capsys, "kb", "show")
    assert (code, out) == (2, "")
    assert f"no knowledge base in {fake}/knowledge or {fake}-knowledge; run `rsvlm kb build`" in err
    Path(small).rename(f"{fake}-knowledge")
    assert run(capsys, "kb", "show", "-l", "scene")[1] == "scene\tseabed\n"
    KnowledgeBase(["inside"], np.array([2]), np.eye(3)[:1]).save(Path(fake) / "knowledge")
    assert run(capsys, "kb", "show")[1] == "scene\tinside\n"


def test_another_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], small: str, fake: str, own: str, tmp_path: Path
) -> None:
    (Path(fake) / "model.safetensors").write_bytes(b"abcd")
    for arguments in (("search", "crab", "-k", small), ("build", "--extend", small, "-a", own, "-o", str(tmp_path / "new"))):
        code, out, err = run(capsys, "kb", *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "build it again with this checkpoint: rsvlm kb build" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search",), "give a TEXT or --image, got neither"),
        (("build", "--extend", "{small}", "--rsicd", "{rsicd}"), "got both"),
        (("build", "-o", "{rsicd}"), "it also holds ['captions.json']"),
        (("build", "-o", "{own}"), "must be a folder, it is a file"),
        (("build", "-a", "{rsicd}/captions.json"), "must end in .jsonl or .csv"),
        (("build", "--rsicd", "{small}"), "captions.json does not exist"),
        (("build", "--min-images", "0"), "min-images"),
        (("show", "--level", "galaxy"), "galaxy"),
        (("paint",), "paint"),
    ],
)
def test_wrong_usage_is_code_two(
    capsys: pytest.CaptureFixture[str], small: str, rsicd: str, own: str, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, "kb", *(part.format(small=small, rsicd=rsicd, own=own) for part in arguments))
    assert (code, out, message in err) == (2, "", True)
    assert "Traceback" not in err


def test_no_checkpoint(capsys: pytest.CaptureFixture[str], small: str) -> None:
    code, out, err = run(capsys, "kb", "search", "crab", "-k", small, "-c", "absent")
    assert (code, out, "run `rsvlm pull`" in err) == (1, "", True)


@pytest.mark.wheels
@pytest.mark.data
def test_the_default_checkpoint_finds_what_it_sees(
    capsys: pytest.CaptureFixture[str], default_checkpoint: Path, data_root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the eager backend needs torch")
    before = {path: path.stat().st_mtime_ns for path in default_checkpoint.rglob("*")}
    target = str(tmp_path / "base")
    source = str(write_captions(tmp_path / "captions", copies=5))
    assert run(capsys, "kb", "build", "--rsicd", source, "-o", target)[1].startswith(
        f"{target}\t50 entries\t4 object\t4 region\t"
    )
    assert {path: path.stat().st_mtime_ns for path in default_checkpoint.rglob("*")} == before
    found = objects(run(capsys, "kb", "search", "airplanes on the ground", "-k", target, "--top", "1", "-f", "json")[1])
    assert [entry["level"] for entry in found] == list(LEVELS)
    assert found[0]["text"] == "planes"
    assert found[2]["text"].startswith("airport")
    if not (data_root / "eurosat" / "test").is_dir():
        pytest.skip("the data folder has no eurosat/test")
    image = str(sorted((data_root / "eurosat" / "test" / "Forest").iterdir())[0])
    found = objects(run(capsys, "kb", "search", "-i", image, "-k", target, "-l", "scene", "--top", "3", "-f", "json")[1])
    assert any(entry["text"].startswith("forest: ") for entry in found)


def test_a_checkpoint_with_the_base_of_another_is_not_loaded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the eager backend needs torch")
    from rsvlm_infer.backends.eager import EagerBackend
    from rsvlm_infer.models.checkpoint import save_checkpoint
    from rsvlm_infer.models.rsvlm import RsvlmModel

    torch.manual_seed(0)
    config = telling_config()
    folder = save_checkpoint(tmp_path / "model", config, RsvlmModel(config).state_dict())
    for embedder in (None, embedder_digest(folder)):
        KnowledgeBase(["a"], np.array([0]), np.eye(3)[:1], embedder).save(folder / "knowledge")
        knowledge = EagerBackend.load(folder, "float32").knowledge
        assert knowledge is not None
        assert knowledge.texts == ("a",)
    KnowledgeBase(["a"], np.array([0]), np.eye(3)[:1], "0" * 64).save(folder / "knowledge")
    with pytest.raises(CheckpointError, match="embedded by checkpoint 000000000000"):
        EagerBackend.load(folder, "float32")
