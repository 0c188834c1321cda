"""From seconds to rows and pages, by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import prepare, report
from benchmarks.peers.contestants import PEERS, Entry, our_entry
from benchmarks.peers.driver import Measured
from benchmarks.peers.environments import REQUIREMENTS, last_error
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import InputError

ABOUT = {"date": "2026-11-21", "machine": "test", "threads": 2, "load": 0.1}
LIMITS = {"fp32": 100e9, "bf16": 200e9, "int8": 400e9, "read": 40e9}
OURS = our_entry(Path("package"), "native", "int4")
PEER = next(entry for entry in PEERS if entry.name == "llama.cpp Q4_0")
ABSENT = next(entry for entry in PEERS if entry.name == "OpenVINO int8")


def measured(**seconds: list[float]) -> Measured:
    found = Measured()
    for name, values in seconds.items():
        work = name.replace("_", " ")
        found.record(work, {"seconds": {work: 99.0}, "tokens": [1, 2, 3, 9], "peak_rss_bytes": 250e6}, warming=True)
        for value in values:
            found.record(work, {"seconds": {work: value}, "tokens": [0], "peak_rss_bytes": 9e9}, warming=False)
    return found


def rows_of(ours: Measured, peer: Measured) -> list[report.Row]:
    ready = {entry.name: {"load_s": 0.25, "weight_bytes": 80e6} for entry in (OURS, PEER)}
    expected = {"answer": [1, 2, 3, 4], "caption": [1, 2, 3, 9], "caption_without_modules": [7]}
    taking_part = {OURS.name: ours, PEER.name: peer}
    refused = {ABSENT.name: "could not be installed: no wheel"}
    return report.make_rows((OURS, PEER, ABSENT), taking_part, ready, refused, LIMITS, {"prefill 80": 10e9}, expected, ABOUT)


def test_spread_is_median_and_quantiles_between_neighbours() -> None:
    found = report.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == report.Spread(3.0, 1.8, pytest.approx(4.2), 5)
    assert report.spread([]) is None
    assert report.spread([2.0]) == report.Spread(2.0, 2.0, 2.0, 1)


def test_equal_tokens_count_from_the_first() -> None:
    assert report.same_beginning([1, 2, 3], [1, 2, 4]) == 2
    assert report.same_beginning([2], [1]) == 0
    assert report.same_beginning([1, 2], [1, 2, 3]) == 2


def test_rows_hold_ratios_shares_and_reasons() -> None:
    ours = measured(decode=[0.003, 0.004, 0.005], prefill_80=[0.05])
    peer = measured(decode=[0.008], prefill_80=[0.1])
    peer.record("tile x1", {"error": "RuntimeError: no"}, warming=True)
    rows = {(row["peer"], row["work"]): row for row in rows_of(ours, peer)}
    own, other = rows["rsvlm native", "decode"], rows["llama.cpp", "decode"]
    assert (own["median_ms"], own["rounds"], own["times_ours"]) == (4.0, 3, 1.0)
    assert (other["times_ours"], other["fastest_of_ours"]) == (2.0, "rsvlm native int4")
    assert own["share_of_limit"] == 0.5  # 80 MB in 4 ms = 20 of 40 GB/s
    assert rows["llama.cpp", "prefill 80"]["share_of_limit"] == 0.25  # 10 Gop in 0.1 s = 100 of 400 Gop/s
    assert own["agreement"] == "3 of 4 tokens"  # of the warming round: later prompts have no reference
    assert own["peak_rss_mb"] == 250  # when the work first ran, not after others
    assert rows["llama.cpp", "tile x1"]["note"] == "RuntimeError: no"
    assert rows["OpenVINO", ""]["note"] == "could not be installed: no wheel"
    assert math.isnan(rows["OpenVINO", ""]["median_ms"])
    assert len({tuple(row) for row in rows.values()}) == 1  # one header fits all


def test_an_encoder_finer_than_its_decoder_has_its_own_limit() -> None:
    found = Measured()
    for warming in (True, False):
        found.record("tile x1", {"seconds": {"tile x1": 0.1}, "cosine": 0.9999}, warming=warming)
    shares = {}
    for kind in ("bf16", None):
        ready = {OURS.name: {"load_s": 0.2, "tile_arithmetic": kind}}
        (row,) = report.make_rows([OURS], {OURS.name: found}, ready, {}, LIMITS, {"tile x1": 10e9}, {}, ABOUT)
        shares[kind] = (row["share_of_limit"], row["agreement"])
    assert shares == {"bf16": (0.5, "cosine 0.99990"), None: (0.25, "cosine 0.99990")}


def test_guesses_are_counted_over_the_rounds_that_count() -> None:
    found = Measured()
    answer = {"seconds": {"captions decode": 0.004, "captions decode, drafts": 0.003}, "drafted": 10, "accepted": 4}
    found.record("captions decode", answer, warming=True)
    for _ in range(2):
        found.record("captions decode", answer, warming=False)
    rows = {row["work"]: row for row in rows_of(found, measured())}
    assert rows["captions decode, drafts"]["note"] == "8 of 20 guesses came true"
    assert rows["captions decode"]["note"] == ""


def test_targets_compare_with_the_best_peer_of_the_same_bits() -> None:
    rows = rows_of(measured(decode=[0.004], prefill_80=[0.05]), measured(decode=[0.008], prefill_80=[0.06]))
    lines = report.target_lines(rows)
    assert "| decode, 4 bit | rsvlm native int4, 4.0 ms | llama.cpp Q4_0, 8.0 ms | 2.00 | 1.4 |" in lines
    assert any(line.startswith("| prefill 80 |") and "| 1.20 |" in line for line in lines)
    assert any(line.startswith("| prefill 320 |") and "not measured" in line for line in lines)
    assert "| share of the read limit, decode, 4 bit | 50% | | | 70 % |" in lines


def test_a_less_accurate_encoder_is_no_rival() -> None:
    def tile(peer: str, milliseconds: float, cosine: float) -> report.Row:
        found = {"peer": peer, "precision": "x", "bits": 8, "work": "tile x1", "rounds": 1, "median_ms": milliseconds}
        return found | {"agreement": f"cosine {cosine:.5f}"}

    rows = [tile("quick", 1.0, 0.99), tile("near", 2.0, 0.9995), tile("rsvlm native", 0.5, 0.9999)]
    found = report.fastest(rows, "tile x1", ours=False, near=True)
    assert found is not None
    assert found["peer"] == "near"


def test_operations_are_those_that_torch_counts() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from rsvlm_infer.layers.vision_encoder import VisionEncoder

    packaged = Path(report.__file__).parents[2] / "rsvlm_infer" / "checkpoints" / "rsvlm-135m" / "config.json"
    config = RsvlmConfig.from_dict(json.loads(packaged.read_text(encoding="utf-8")))
    vision = dataclasses.replace(config.vision, hidden_size=48, intermediate_size=96, num_heads=2, num_layers=3, taps=(1, 2, 3))
    config = dataclasses.replace(config, vision=vision)
    grids = [(2, 2), (4, 2)]
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    encoder = VisionEncoder(vision)
    # the counter knows products of matrices, not the fused attention of the CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        encoder(torch.zeros(12, 588), bounds, torch.tensor(grids))
    assert report.operations(config, {"mixed tiles": grids})["mixed tiles"] == counted.get_total_flops()


def test_page_lists_everybody_and_replaces_only_its_part(tmp_path: Path) -> None:
    text = report.page(rows_of(measured(decode=[0.004]), measured(decode=[0.008])), "A machine.")
    assert "| **rsvlm native int4** | 4.0 ms | 4.0 to 4.0 | 1.00 | 50% of read 40.0 G/s | 3 of 4 tokens | 250 MB |" in text
    assert "- OpenVINO int8 : could not be installed: no wheel" in text
    page = tmp_path / "peers.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write_page(page, text)
    report.write_page(page, text)
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert written.count("llama.cpp Q4_0") == text.count("llama.cpp Q4_0")
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="restore them"):
        report.write_page(page, text)


def test_every_peer_has_an_environment_with_exact_versions() -> None:
    assert {entry.environment for entry in PEERS} == set(REQUIREMENTS)
    assert all("==" in requirement for requirements in REQUIREMENTS.values() for requirement in requirements)
    assert len({entry.name for entry in PEERS}) == len(PEERS)


def test_who_cannot_take_part_says_why(tmp_path: Path) -> None:
    entry: Entry = dataclasses.replace(PEER, convert=("json.tool", "{out}/nothing"))
    assert "was never installed" in str(prepare.why_not(entry, tmp_path))
    home = tmp_path / "environments" / entry.environment
    (home / "bin").mkdir(parents=True)
    status: dict[str, Any] = {"requirements": [], "error": "ERROR: no wheel"}
    (home / "installed.json").write_text(json.dumps(status))
    assert prepare.why_not(entry, tmp_path) == "could not be installed: ERROR: no wheel"
    (home / "installed.json").write_text(json.dumps(status | {"error": None}))
    (home / "bin" / "python").symlink_to(__import__("sys").executable)
    reason = prepare.why_not(entry, tmp_path)
    assert reason is not None
    assert reason.startswith("could not be converted:")
    (tmp_path / entry.model).mkdir(parents=True)
    assert prepare.why_not(entry, tmp_path) is None


def test_the_line_that_names_an_error_is_kept() -> None:
    assert last_error("Collecting x\nERROR: No matching distribution found for x\n\nnotice\n").startswith("ERROR: No matching")
    assert last_error("first\nlast\n") == "last"
    assert last_error("") == "pip said nothing"


def test_limits_are_read_by_name() -> None:
    assert prepare.parse_limits(["fp32 100", "read 5"]) == {"fp32": 100.0, "read": 5.0}
    assert np.isfinite(list(LIMITS.values())).all()
