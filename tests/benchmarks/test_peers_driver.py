"""The protocol between driver and workers, with a worker that stands for a library; and the works that all workers share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import driver
from benchmarks.peers.prepare import ROOT, write_caption_list
from benchmarks.peers.workers import texts
from benchmarks.peers.workers.tiles import Tiles, cosine, tile_works

FAKE = """
import os, sys
from benchmarks.peers.workers.protocol import Contestant, serve

def load(job):
    print("a library that prints")
    if job.precision == "broken":
        raise ValueError("no such precision")
    def refuse(round_index):
        raise RuntimeError("not here")
    works = {"echo": lambda index: {"seconds": {"echo": float(index)}, "tokens": [job.threads]}, "refuse": refuse}
    return Contestant(works | {"die": lambda index: os._exit(3)}, 5.0)

serve(load)
"""


def start(tmp_path: Path, precision: str) -> driver.Worker:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    command = [sys.executable, str(script), "--inputs", "i", "--model", "m", "--precision", precision, "--threads", "2"]
    return driver.Worker(command, ROOT, driver.worker_environment(2, ROOT, False), tmp_path / "log")


def test_rounds_keep_times_but_the_first_and_leave_out_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "REST_S", 0.0)
    worker = start(tmp_path, "fp32")
    assert worker.works == ["echo", "refuse", "die"]
    assert worker.ready["weight_bytes"] == 5.0
    worker.ready["works"] = ["echo", "refuse"]
    calls: list[int] = []
    measured = driver.run_rounds({"fake": worker}, 3, 5.0, lambda: calls.append(1))["fake"]
    worker.close()
    assert measured.seconds == {"echo": [1.0, 2.0, 3.0]}
    assert measured.facts["echo"]["tokens"] == [2]
    assert measured.facts["echo"]["peak_rss_bytes"] > 1e6
    assert measured.errors == {"refuse": "RuntimeError: not here"}
    assert len(calls) == 3
    assert worker.process.returncode == 0
    assert "a library that prints" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_or_cannot_load_is_an_error_not_a_hang(tmp_path: Path) -> None:
    worker = start(tmp_path, "fp32")
    assert "ended with status 3" in worker.ask("die", 0)["error"]
    assert "ended with status 3" in worker.ask("echo", 0)["error"]
    worker.close()
    broken = start(tmp_path, "broken")
    assert broken.ready == {"error": "ValueError: no such precision"}
    assert broken.works == []
    broken.close()


def test_no_round_begins_that_would_end_too_late(capsys: pytest.CaptureFixture[str]) -> None:
    measured = driver.run_rounds({}, 5, -1.0)
    assert measured == {}
    assert "stopping after 1 rounds" in capsys.readouterr().err


def test_prompts_begin_differently_in_every_work_and_round(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps(list(range(1000, 1330))))
    lengths = (*texts.PREFILLS, texts.PROMPT)
    prompts = [texts.prompt_tokens(tmp_path, tokens, index) for tokens in lengths for index in range(9)]
    assert [len(prompt) for prompt in prompts] == [tokens for tokens in lengths for _ in range(9)]
    assert len({prompt[0] for prompt in prompts}) == len(prompts)
    assert texts.prompt_tokens(tmp_path, 400, 0)[:70] == texts.prompt_tokens(tmp_path, 400, 0)[330:]


def test_an_answer_is_the_first_token_and_the_rest(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps(list(range(330))))
    seen: list[Any] = []

    def prefill(ids: list[int]) -> int:
        seen.append(ids)
        return 7

    def decode(token: int, count: int) -> list[int]:
        return [token + 1] * count

    works = texts.text_works(tmp_path, prefill, decode)
    assert set(works["prefill 320"](0)["seconds"]) == {"prefill 320"}
    answer = works["answer"](0)
    assert answer["tokens"] == [7] + [8] * (texts.NEW_TOKENS - 1)
    assert answer["seconds"]["answer"] >= answer["seconds"]["decode"] >= 0
    assert [len(ids) for ids in seen] == [320, texts.PROMPT]


def test_tiles_come_back_in_their_own_order_from_buckets_and_padding(tmp_path: Path) -> None:
    sides = [2, 1, 2, 3]
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((sum(side**2 for side in sides), 5), dtype=np.float32)
    positions = {side: rng.standard_normal((side**2, 5), dtype=np.float32) for side in (1, 2, 3)}
    expected = patches + np.concatenate([positions[side] for side in sides])
    uniform = rng.standard_normal((4, 4, 5), dtype=np.float32)
    arrays = {"mixed": patches, "uniform": uniform, "expected_mixed": expected, "expected_uniform": uniform + positions[2]}
    for name, values in (arrays | {f"positions_{side}x{side}": own for side, own in positions.items()}).items():
        np.save(tmp_path / f"{name}.npy", values)
    (tmp_path / "tiles.json").write_text(json.dumps({"uniform": [2, 2], "mixed": [[side, side] for side in sides]}))
    tiles = Tiles(tmp_path)
    sizes: list[tuple[int, ...]] = []

    def encode(part: Any, place: Any) -> Any:
        sizes.append(part.shape[:2])
        return part + place

    def padded(part: Any, place: Any, lengths: Any) -> Any:
        assert lengths.tolist() == [4, 1, 4, 9]
        return part + place

    works = tile_works(tiles, encode, padded)
    assert set(works) == {"tile x1", "tile x4", "mixed tiles", "mixed padded"}
    for name, work in works.items():
        answer = work(1)
        assert list(answer["seconds"]) == [name]
        assert answer["cosine"] == pytest.approx(1.0)
    assert sizes == [(1, 4), (4, 4), (2, 4), (1, 1), (1, 9)]
    assert cosine(np.array([1.0, 0.0], np.float32), np.array([1.0, 1.0], np.float32)) == pytest.approx(0.5**0.5)


def test_captions_are_of_the_test_split_or_of_the_pictures_beside_the_image(tmp_path: Path) -> None:
    rsicd = tmp_path / "rsicd"
    (rsicd / "images").mkdir(parents=True)
    (tmp_path / "inputs").mkdir()
    entries = [
        {"filename": f"{name}.jpg", "split": split, "theme": "port", "captions": ["a port"]}
        for name, split in [("b", "test"), ("a", "test"), ("c", "train")]
    ]
    (rsicd / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
    for name in ("a.jpg", "b.jpg", "c.jpg", "notes.txt"):
        (rsicd / "images" / name).touch()

    def listed(captions: Path | None) -> list[str]:
        write_caption_list(captions, rsicd / "images" / "c.jpg", tmp_path)
        return [Path(name).name for name in json.loads((tmp_path / "inputs" / "captions.json").read_text(encoding="utf-8"))]

    assert sorted(listed(rsicd)) == ["a.jpg", "b.jpg"]
    assert sorted(listed(None)) == ["a.jpg", "b.jpg", "c.jpg"]
    assert listed(None) == listed(None), "every run and every package meets the same pictures"
