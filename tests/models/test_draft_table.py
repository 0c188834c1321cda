"""The table of likely next tokens: what is counted, what is looked up, and files that are not to be believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsvlm_infer.contract import DRAFTS
from rsvlm_infer.errors import CheckpointError, InputError
from rsvlm_infer.models.draft_table import START, DraftTable
from tests.native import needs_native

ANSWERS = [(5, 6, 7, 0), (5, 6, 8, 0), (5, 6, 7, 0), (9, 6, 8, 0)]


def test_counts_what_follows_and_the_longest_context_decides() -> None:
    table = DraftTable.from_answers(ANSWERS, 3)
    follow = table.follow
    assert follow([START, 5]) == (6, pytest.approx(3 / 4, abs=0.01))  # three times, and one more sight of something else
    assert follow([1, 2, 6]) == (7, pytest.approx(2 / 5, abs=0.01))  # 7 and 8 as often: the lower id
    assert follow([START, 5, 6]) == (7, pytest.approx(2 / 4, abs=0.01))
    assert follow([START, 9, 6]) == (8, pytest.approx(1 / 2, abs=0.01))
    assert follow([START, 5, 6, 7]) == (0, pytest.approx(2 / 3, abs=0.01))
    assert follow([START]) is None  # the first token comes from the prompt
    assert follow([4]) is None
    assert table.longest == 3
    assert DraftTable({}).follow([START, 1]) is None


@pytest.mark.parametrize("longest", [0, 9])
def test_a_length_out_of_range_is_refused(longest: int) -> None:
    with pytest.raises(InputError, match=r"longest must be in 1\.\.8"):
        DraftTable.from_answers(ANSWERS, longest)


def test_a_file_gives_the_same_table_and_the_same_bytes(tmp_path: Path) -> None:
    table = DraftTable.from_answers(ANSWERS, 4)
    table.save(tmp_path / "one")
    loaded = DraftTable.load(tmp_path / "one", 10)
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(loaded) == len(table)
    for answer in ANSWERS:
        for place in range(len(answer)):
            assert loaded.follow([START, *answer[:place]]) == table.follow([START, *answer[:place]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_no_table_of_this_vocabulary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "drafts.safetensors"
    DraftTable.from_answers(ANSWERS, 2).save(file)
    with pytest.raises(CheckpointError, match=r"tokens must be in 0\.\.7, got 0\.\.8"):
        DraftTable.load(file, 8)
    arrays = load_file(file)
    save_file({name: array for name, array in arrays.items() if name != "token.2"}, file)
    with pytest.raises(CheckpointError, match=r"must hold context\.n, token\.n and chance\.n"):
        DraftTable.load(file, 10)
    save_file({**arrays, "chance.1": arrays["chance.1"].astype(np.float32)}, file)
    with pytest.raises(CheckpointError, match="must be int32, int32 and uint8"):
        DraftTable.load(file, 10)
    save_file({**arrays, "token.1": arrays["token.1"][1:]}, file)
    with pytest.raises(CheckpointError, match="remove it: answers stay the same"):
        DraftTable.load(file, 10)
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DraftTable.load(file, 10)


@needs_native
def test_the_table_travels_into_packages_and_is_used(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="packages are made with torch")
    from rsvlm_infer import RSVLM
    from tests.backends.native_packages import CONFIG, export_native, write_package

    checkpoint, plain = write_package(tmp_path, CONFIG)
    assert RSVLM.from_pretrained(plain).engine.draft_table is None
    DraftTable.from_answers(ANSWERS, 3).save(checkpoint / DRAFTS)
    package = export_native(checkpoint, tmp_path / "with", "fp32")
    assert DRAFTS in json.loads((package / "manifest.json").read_text())["files"]
    table = RSVLM.from_pretrained(package).engine.draft_table
    assert table is not None
    assert table.follow([START, 5]) == DraftTable.load(checkpoint / DRAFTS, 300).follow([START, 5])
    assert RSVLM.from_pretrained(checkpoint, "eager").engine.draft_table is None  # it checks no guesses
    content = bytearray((package / DRAFTS).read_bytes())
    content[-1] ^= 1
    (package / DRAFTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{DRAFTS} must have sha256"):
        RSVLM.from_pretrained(package)
