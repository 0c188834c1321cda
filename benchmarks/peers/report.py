"""From seconds to rows, and from rows to a page: statistics, shares of the machine's limits, ratios, targets. Knows no process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import OURS, Entry
from benchmarks.peers.driver import Measured
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import InputError

BEGIN, END = "<!-- begin: written by python -m benchmarks.peers -->", "<!-- end -->"
NEAR = 0.999  # cosine from which encoders count as equally accurate: the gate of fp16 and bf16 certificates
PADDED = "mixed padded"
Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of one work."""

    median: float
    p20: float
    p80: float
    rounds: int


def spread(seconds: Sequence[float]) -> Spread | None:
    """Median and quantiles, between neighbours linearly; None without any."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Spread(statistics.median(ordered), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def operations(config: RsvlmConfig, grids: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, float]:
    """Multiplications and additions of each work that arithmetic bounds; `grids` names the tiles of the encoder's works."""
    language, vision = config.language, config.vision
    assert language is not None
    hidden, q, kv = language.hidden_size, language.num_heads * language.head_dim, language.num_kv_heads * language.head_dim
    layer = hidden * (2 * q + 2 * kv) + 3 * hidden * language.intermediate_size
    found = {}
    for tokens in (80, 320):
        pairs = tokens * (tokens + 1) / 2
        layers = language.num_layers * (2 * layer * tokens + 4 * pairs * q)
        found[f"prefill {tokens}"] = layers + 2.0 * language.vocab_size * hidden
    width, patch = vision.hidden_size, 3 * vision.patch_size**2
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    for name, tiles in grids.items():
        found[name] = sum(
            2.0 * n * patch * width + max(vision.taps) * (2 * (n + 1) * block + 4 * (n + 1) ** 2 * width)
            for n in (rows * columns for rows, columns in tiles)
        )
    return found


def same_beginning(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many first tokens are equal."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            return index
    return min(len(found), len(expected))


def make_rows(
    entries: Sequence[Entry],
    measured: Mapping[str, Measured],
    ready: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, str],
    limits: Mapping[str, float],
    work_operations: Mapping[str, float],
    expected: Mapping[str, Sequence[int]],
    about: Mapping[str, Any],
) -> list[Row]:
    """A row per library, precision and work; what was refused or failed is a row with the reason.

    ready: first answers of the workers. limits: see `prepare.measure_limits`. expected: tokens of eager float32 by name.
    """
    rows: list[Row] = []
    for entry in entries:
        blank = {**about, "peer": entry.library, "precision": entry.precision, "bits": entry.bits}
        if entry.name in refused:
            rows.append(_row(blank, "", None, note=refused[entry.name]))
            continue
        found, first = measured[entry.name], ready[entry.name]
        for work, seconds in found.seconds.items():
            facts = found.facts[work]
            operation = work_operations.get(work.replace(PADDED, "mixed tiles"), 0.0)
            kind, amount = entry.arithmetic, operation
            if "cosine" in facts:
                kind = first.get("tile_arithmetic") or kind
            if work == "decode":
                kind, amount = "read", float(first.get("weight_bytes", 0))
            rows.append(
                _row(
                    blank,
                    work,
                    spread(seconds),
                    limit=(kind, limits.get(kind, math.nan), amount),
                    agreement=_agreement(entry, work, facts, expected),
                    peak_rss_mb=round(facts.get("peak_rss_bytes", math.nan) / 1e6, 1),
                    load_s=round(float(first["load_s"]), 2),
                    note=_note(entry, work, found),
                )
            )
        rows += [_row(blank, work, None, note=reason) for work, reason in found.errors.items()]
    _compare(rows)
    return rows


def _row(blank: Row, work: str, times: Spread | None, **more: Any) -> Row:
    kind, limit, amount = more.pop("limit", ("", math.nan, 0.0))
    median = math.nan if times is None else times.median
    share = amount / median / limit if amount and times is not None else math.nan
    return {
        **blank,
        "work": work,
        "rounds": 0 if times is None else times.rounds,
        "median_ms": round(median * 1e3, 3),
        "p20_ms": math.nan if times is None else round(times.p20 * 1e3, 3),
        "p80_ms": math.nan if times is None else round(times.p80 * 1e3, 3),
        "per_second": math.nan if times is None else round(1 / median, 2),
        "share_of_limit": round(share, 3),
        "limit": f"{kind} {limit / 1e9:.1f} G/s" if amount and not math.isnan(limit) else "",
        "fastest_of_ours": "",
        "times_ours": math.nan,
        "agreement": more.get("agreement", ""),
        "peak_rss_mb": more.get("peak_rss_mb", math.nan),
        "load_s": more.get("load_s", math.nan),
        "note": more.get("note", ""),
    }


def _agreement(entry: Entry, work: str, facts: Mapping[str, Any], expected: Mapping[str, Sequence[int]]) -> str:
    if "cosine" in facts:
        return f"cosine {facts['cosine']:.5f}"
    if "tokens" not in facts:
        return ""
    ours = entry.library.startswith(OURS)
    name = "answer" if work in ("answer", "decode") else "caption" if ours else "caption_without_modules"
    return f"{same_beginning(facts['tokens'], expected[name])} of {len(expected[name])} tokens"


def _note(entry: Entry, work: str, found: Measured) -> str:
    counts = found.counts.get(work.removesuffix(", drafts"))
    if counts and work.endswith("drafts"):
        drafted, accepted = counts["drafted"], counts["accepted"]
        return f"{accepted:.0f} of {drafted:.0f} guesses came true" if drafted else "nothing was guessed"
    return entry.weights


def _compare(rows: list[Row]) -> None:
    """Fills in the fastest of ours for the same work, and how many times longer a row takes."""
    for row in rows:
        same = "mixed tiles" if row["work"] == PADDED else row["work"]
        best = fastest(rows, same, ours=True)
        if best is not None and row["rounds"]:
            row["fastest_of_ours"] = f"{best['peer']} {best['precision']}"
            row["times_ours"] = round(row["median_ms"] / best["median_ms"], 2)


def fastest(rows: Sequence[Row], work: str, *, ours: bool, bits: int | None = None, near: bool = False) -> Row | None:
    """The fastest measured row of a work among ours or among peers; `near`: of encoders with a cosine of at least `NEAR`."""
    found = [
        row
        for row in rows
        if row["work"] == work
        and row["rounds"]
        and row["peer"].startswith(OURS) == ours
        and bits in (None, row["bits"])
        and (not near or float(row["agreement"].split()[1]) >= NEAR)
    ]
    return min(found, key=lambda row: float(row["median_ms"]), default=None)


def target_lines(rows: Sequence[Row]) -> list[str]:
    """What was aimed at and what was reached, as rows of a table."""
    lines = ["| work | ours | best peer | times faster | aim |", "|---|---|---|---:|---:|"]

    def compare(name: str, ours: Row | None, peer: Row | None, aim: float) -> None:
        if ours is None or peer is None:
            lines.append(f"| {name} | {_short(ours)} | {_short(peer)} | not measured | {aim:g} |")
            return
        lines.append(f"| {name} | {_short(ours)} | {_short(peer)} | {peer['median_ms'] / ours['median_ms']:.2f} | {aim:g} |")

    eager = [row for row in rows if row["peer"] == "transformers" and row["precision"] == "bf16"]
    compare("caption, against transformers bf16", fastest(rows, "caption", ours=True), fastest(eager, "caption", ours=False), 4)
    best4 = fastest(rows, "decode", ours=False, bits=4)
    own4 = fastest(rows, "decode", ours=True, bits=4)
    compare("decode, 4 bit", own4, best4, 1.4)
    compare("decode of captions with guesses, 4 bit", fastest(rows, "captions decode, drafts", ours=True, bits=4), best4, 2)
    for work in ("prefill 80", "prefill 320"):
        compare(work, fastest(rows, work, ours=True), fastest(rows, work, ours=False), 1.25)
    uniform = sorted(
        {row["work"] for row in rows if row["work"].startswith("tile x")}, key=lambda work: int(work.split("x")[1])
    )
    for work, aim in [*((work, 1.1) for work in uniform), ("mixed tiles", 1.3)]:
        ours, peer = (fastest(rows, work, ours=own, near=True) for own in (True, False))
        compare(f"{work}, cosine at least {NEAR:g}", ours, peer, aim)
    padded = fastest(rows, PADDED, ours=False, near=True)
    compare("mixed tiles, against a padded batch", fastest(rows, "mixed tiles", ours=True, near=True), padded, 5)
    if own4 is not None:
        lines.append(f"| share of the read limit, decode, 4 bit | {own4['share_of_limit']:.0%} | | | 70 % |")
    caption4 = fastest(rows, "caption", ours=True, bits=4)
    if caption4 is not None:
        lines.append(f"| peak RSS of a 4-bit caption | {caption4['peak_rss_mb']:.0f} MB | | | 300 MB |")
        lines.append(f"| load of the 4-bit package | {caption4['load_s']} s | | | 0.3 s |")
    return lines


def _short(row: Row | None) -> str:
    return "none" if row is None else f"{row['peer']} {row['precision']}, {_milliseconds(row)}"


def _milliseconds(row: Row) -> str:
    median = float(row["median_ms"])
    return f"{median:.1f} ms" if median < 100 else f"{median:.0f} ms"


def page(rows: Sequence[Row], heading: str) -> str:
    """Markdown: targets, then a table per work, fastest first, then who could not take part."""
    parts = [heading, *target_lines(rows)]
    for work in dict.fromkeys(row["work"] for row in rows if row["rounds"]):
        same = sorted((row for row in rows if row["work"] == work and row["rounds"]), key=lambda row: float(row["median_ms"]))
        limit = "share of limit" if any(row["limit"] for row in same) else ""
        parts += [
            "",
            f"### {work}",
            "",
            f"| who | median | p20 to p80, ms | times ours | {limit} | agreement | peak RSS | note |",
        ]
        parts.append("|---|---:|---:|---:|---:|---|---:|---|")
        for row in same:
            share = "" if math.isnan(row["share_of_limit"]) else f"{row['share_of_limit']:.0%} of {row['limit']}"
            who = f"{row['peer']} {row['precision']}"
            who = f"**{who}**" if row["peer"].startswith(OURS) else who
            ratio = "" if math.isnan(row["times_ours"]) else f"{row['times_ours']:.2f}"
            parts.append(
                f"| {who} | {_milliseconds(row)} | {row['p20_ms']:.1f} to {row['p80_ms']:.1f} | {ratio} | {share} | "
                f"{row['agreement']} | {row['peak_rss_mb']:.0f} MB | {row['note']} |"
            )
    absent = [f"- {row['peer']} {row['precision']} {row['work']}: {row['note']}" for row in rows if not row["rounds"]]
    return "\n".join([*parts, *(["", "### Not measured", "", *absent] if absent else []), ""])


def write_page(file: Path, text: str) -> None:
    """Puts `text` between the file's two marks.

    Raises:
        InputError: the file has not both marks.
    """
    old = file.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise InputError(f"{file} must hold the lines {BEGIN!r} and {END!r}, it does not; restore them")
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    waiting = file.with_suffix(".new")
    waiting.write_text(f"{before}{BEGIN}\n\n{text}\n{after}", encoding="utf-8")
    waiting.rename(file)
