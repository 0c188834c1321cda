"""Compiles every Triton kernel at its shipped configurations for every chip, without a GPU, and holds the result to a table.

    python -m benchmarks.compile_gates            compile, compare with docs/kernels-compiled.csv, fail on any difference
    python -m benchmarks.compile_gates --write    compile and write the table
    python -m benchmarks.compile_gates --chips 90 --kernels attention    a part of it, compared with the same part
    python -m benchmarks.compile_gates --table-only    compile nothing: limits hold in the table, and it has every shipped kernel

It fails on spilled registers and on shared memory beyond the chip's limit, whatever the table says. Registers and bytes are compared
only under the triton version that wrote the table, since another compiler may rightly choose otherwise.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .kernel_specs import Spec, specs

TABLE = Path(__file__).resolve().parent.parent / "docs" / "kernels-compiled.csv"
CHIPS = (80, 87, 89, 90, 100, 120)
# shared memory that one block may ask for, in bytes (CUDA C++ programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 163 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS_PER_BLOCK = 65536
COLUMNS = (
    "kernel", "variant", "dtype", "chip", "block_m", "block_n", "block_k", "warps", "stages",
    "registers", "spill_bytes", "shared_bytes", "shared_limit_bytes", "triton",
)  # fmt: skip
MEASURED = ("registers", "spill_bytes", "shared_bytes")
Row = dict[str, str]


def compile_one(spec: Spec) -> Row:
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(spec.kernel, spec.signature(), spec.constants, spec.attributes())
    options = {"num_warps": spec.config.warps, "num_stages": spec.config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", spec.chip, 32), options=options)
    registers, spilled = _resources(compiled.asm["ptx"], spec.chip)
    return {
        **described(spec),
        "registers": str(registers),
        "spill_bytes": str(spilled),
        "shared_bytes": str(compiled.metadata.shared),
        "shared_limit_bytes": str(SHARED_LIMIT[spec.chip]),
        "triton": triton.__version__,
    }


def described(spec: Spec) -> Row:
    """The columns that are known before compiling."""
    return {
        "kernel": spec.name,
        "variant": spec.variant,
        "dtype": spec.dtype,
        "chip": f"sm_{spec.chip}",
        "block_m": str(spec.config.block_m),
        "block_n": str(spec.config.block_n),
        "block_k": str(spec.config.block_k),
        "warps": str(spec.config.warps),
        "stages": str(spec.config.stages),
    }


def _resources(ptx: str, chip: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores plus loads, as the assembler of triton's wheel reports them."""
    import triton

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = binaries / ("ptxas-blackwell" if chip >= 100 else "ptxas")
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command: list[str | Path] = [assembler, "-v", f"-arch={target[1]}", source, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert used is not None, report
    assert spills is not None, report
    return int(used[1]), int(spills[1]) + int(spills[2])


def limits_broken(row: Row) -> Iterator[str]:
    """What no table can excuse."""
    if int(row["spill_bytes"]) > 0:
        yield f"{_name(row)}: {row['spill_bytes']} bytes of spilled registers"
    if int(row["shared_bytes"]) > int(row["shared_limit_bytes"]):
        yield f"{_name(row)}: {row['shared_bytes']} bytes of shared memory, the chip has {row['shared_limit_bytes']}"
    if int(row["registers"]) * int(row["warps"]) * 32 > REGISTERS_PER_BLOCK:
        yield f"{_name(row)}: {row['registers']} registers x {row['warps']} warps exceed the register file"


def differences(rows: list[Row], table: list[Row], whole: bool) -> Iterator[str]:
    """How freshly compiled rows differ from the committed ones; `whole` = rows that are only in the table count too."""
    committed = {_key(row): row for row in table}
    for row in rows:
        known = committed.pop(_key(row), None)
        if known is None:
            yield f"{_name(row)}: not in the table"
        elif known["triton"] == row["triton"]:
            for column in MEASURED:
                if known[column] != row[column]:
                    yield f"{_name(row)}: {column} {row[column]}, the table says {known[column]}"
    if whole:
        yield from (f"{_name(row)}: in the table, but no longer shipped" for row in committed.values())


def read_table(path: Path = TABLE) -> list[Row]:
    """The committed rows; none when there is no table yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in COLUMNS if column not in (*MEASURED, "shared_limit_bytes", "triton"))


def _name(row: Row) -> str:
    blocks = f"{row['block_m']}x{row['block_n']}x{row['block_k']}"
    return f"{row['kernel']} {row['variant']} {row['dtype']} {row['chip']} {blocks} {row['warps']} warps".replace("  ", " ")


def _compile_at(place: tuple[int, tuple[int, ...], str]) -> Row:
    index, chips, kernels = place  # a spec holds a kernel, which cannot be pickled
    return compile_one(_chosen(chips, kernels)[index])


def _chosen(chips: tuple[int, ...], kernels: str) -> list[Spec]:
    return [spec for spec in specs(chips) if kernels in spec.name]


def _check_table() -> int:
    table = read_table()
    problems = [problem for row in table for problem in limits_broken(row)]
    shipped = {_key(described(spec)): _name(described(spec)) for spec in specs(CHIPS)}
    written = {_key(row): _name(row) for row in table}
    problems += [f"{shipped[key]}: not in the table" for key in shipped.keys() - written.keys()]
    problems += [f"{written[key]}: in the table, but no longer shipped" for key in written.keys() - shipped.keys()]
    print(
        "\n".join(problems) if problems else f"{len(table)} rows: every shipped kernel, no spills, shared memory within limits"
    )
    return 1 if problems else 0


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when a limit is broken or the table is not what was compiled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument(
        "--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS), help="compute capabilities, 90 = sm_90"
    )
    parser.add_argument("--kernels", default="", help="only kernels whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--table-only", action="store_true", help="check the table itself, compile nothing")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it", file=sys.stderr)
        return 2
    whole = not options.kernels and tuple(options.chips) == CHIPS
    if options.write and not whole:
        print("--write needs all chips and all kernels: leave --chips and --kernels out", file=sys.stderr)
        return 2
    if options.table_only:
        return _check_table()
    chips: Any = tuple(options.chips)
    places = [(index, chips, options.kernels) for index in range(len(_chosen(chips, options.kernels)))]
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            rows = pool.map(_compile_at, places, chunksize=8)
    else:
        rows = [compile_one(spec) for spec in _chosen(chips, options.kernels)]
    problems = [problem for row in rows for problem in limits_broken(row)]
    if options.write:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        problems += differences(rows, read_table(), whole)
    print("\n".join(problems) if problems else f"{len(rows)} compilations, no spills, shared memory within every limit")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
