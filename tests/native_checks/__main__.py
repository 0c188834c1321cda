"""Proves csrc beyond the CPU at hand, on x86-64: emulated CPUs, sanitizers, another architecture. Knows compilers and no op.

    python -m tests.native_checks                    all three
    python -m tests.native_checks emulated           AVX2 and portable kernels under qemu-user, as dispatch chooses them there
    python -m tests.native_checks sanitized          AddressSanitizer and UndefinedBehaviorSanitizer, every instruction set of this CPU
    python -m tests.native_checks aarch64            everything compiles for aarch64, the kernels run under qemu-user
    python -m tests.native_checks --missing          Debian packages that are still to be installed; needs no package itself

Each part ends in red when a compiler fails, a result is off, dispatch chose something else, or the judge takes a wrong result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CSRC = REPOSITORY / "csrc"
# program -> the Debian package that has it
PROGRAMS = {
    "g++": "g++",
    "qemu-x86_64": "qemu-user",
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
WARNINGS = ["-Wall", "-Wextra"]
SHIPPED = ["-O3", "-ffp-contract=off", "-fopenmp", *WARNINGS]  # as setup.py has them: the proof is of that code
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-fopenmp", *WARNINGS]
# conversions of floats that no integer holds are undefined too, but not in gcc's "undefined"
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
# CPU of qemu -> kernels and compiler-made loops that dispatch must choose there. Neither has AVX-512, nor does qemu.
EMULATED = {"Haswell": ("avx2", "avx2"), "Nehalem": ("portable", "baseline")}
LONGEST_S = 1200  # of one program: half a minute at most on an idle machine, so this is a deadlock


class CheckError(Exception):
    """A check that ended in red; the message is its last line."""


def missing_packages() -> list[str]:
    """Debian packages of the programs that are not there."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def run(command: Sequence[str | Path]) -> tuple[int, str]:
    """Exit status and what it said; qemu's notes on features that no kernel uses are left out."""
    # threads that spin while they wait starve each other when there are more of them than cores
    variables = os.environ | {"OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, errors="replace", timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"not done after {LONGEST_S} s: {' '.join(map(str, command))}") from None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "TCG doesn't support requested feature" not in line]
    return done.returncode, "\n".join(lines)


def demand(command: Sequence[str | Path]) -> str:
    """What a command said that had to succeed."""
    status, said = run(command)
    if status != 0:
        raise CheckError(f"{said}\nexit status {status} of: {' '.join(map(str, command))}")
    return said


def compile_all(compiler: str, flags: Sequence[str], sources: Sequence[Path], folder: Path) -> list[Path]:
    """Objects of all sources, a job per core; compiler warnings are printed."""
    assert sources
    folder.mkdir()

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        if warnings := demand([compiler, "-std=c++17", f"-I{CSRC / 'include'}", *flags, "-c", source, "-o", target]):
            print(warnings)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build_runner(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """The program that runs recorded cases, from the same sources as the extension."""
    sources = sorted(source for part in ("ops", "cpu", "checks") for source in (CSRC / part).glob("*.cpp"))
    program = folder / "run_cases"
    demand([compiler, *flags, *compile_all(compiler, flags, sources, folder), "-o", program])
    return program


def record_cases(folder: Path) -> set[str]:
    """Right and wrong cases in `folder`; gives the ops. Imports torch, which no other part needs."""
    from .cases import record, record_overrun, record_undefined, record_wrong

    print(f"{record(folder / 'right')} cases recorded from the eager definitions", flush=True)
    record_overrun(folder / "overrun")
    record_undefined(folder / "undefined")
    return record_wrong(folder / "wrong")


def judge(runner: Sequence[str | Path], cases: Path, ops: set[str], isa: Sequence[str]) -> None:
    """Right cases must pass; the judge must see a wrong result of every op."""
    print(demand([*runner, cases / "right", *isa]), flush=True)
    status, said = run([*runner, cases / "wrong", *isa])
    seen = {line.split()[1] for line in said.splitlines() if line.startswith("FAILED ") and " expected " in line}
    if status != 1 or seen != ops:
        raise CheckError(f"{said}\nwrong results of {sorted(ops - seen)} were taken as right")


def check_emulated(cases: Path, ops: set[str], folder: Path) -> None:
    """The kernels of CPUs that this one may not be, and the extension's own dispatch."""
    program = build_runner("g++", SHIPPED, folder / "emulated")
    interpreter = Path(sys.executable).resolve()  # qemu follows no scripts and no wrappers
    ask = "from rsvlm_infer._C import build_info; print(build_info()['kernel_isa'], build_info()['isa'])"
    for cpu, chosen in EMULATED.items():
        qemu = ["qemu-x86_64", "-cpu", cpu]
        judge([*qemu, program], cases, ops, chosen)
        status, said = run([*qemu, program, cases / "right", "avx512", "avx512"])
        if status != 1 or "FAILED dispatch chose" not in said:
            raise CheckError(f"{said}\na wrong instruction set was taken as right on {cpu}")
        installed = demand([*qemu, interpreter, "-S", "-c", ask]).split()
        if installed != list(chosen):
            raise CheckError(f"rsvlm_infer._C chose {installed} on {cpu}, expected {list(chosen)}")


def check_sanitized(cases: Path, ops: set[str], folder: Path) -> None:
    """No access out of bounds and no undefined behaviour, with every instruction set that this CPU has."""
    program = build_runner("g++", [*SANITIZED, *SANITIZERS], folder / "sanitized")
    judge([program], cases, ops, [])
    for name, words in (
        ("overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("undefined", "not a valid value for type 'bool'"),
    ):
        status, said = run([program, cases / name])
        if status == 0 or words not in said:
            raise CheckError(f"{said}\nthe sanitizers did not see the case '{name}'")


def check_aarch64(cases: Path, ops: set[str], folder: Path) -> None:
    """Every source compiles, the bindings too; the portable kernels give the right results."""
    import pybind11

    compiler = "aarch64-linux-gnu-g++"
    program = build_runner(compiler, [*SHIPPED, "-static"], folder / "aarch64")  # static: qemu needs no foreign libraries
    judge(["qemu-aarch64", program], cases, ops, ["portable", "baseline"])
    # Python.h of this machine serves: both have 64-bit pointers and longs, and nothing is linked
    headers = [f"-I{place}" for place in (CSRC / "python", sysconfig.get_path("include"), pybind11.get_include())]
    bindings = sorted((CSRC / "python").glob("*.cpp"))
    compile_all(compiler, [*WARNINGS, "-fvisibility=hidden", "-fPIC", "-fopenmp", *headers], bindings, folder / "bindings")
    print(f"aarch64: {len(bindings)} sources of bindings compiled", flush=True)


CHECKS = {"emulated": check_emulated, "sanitized": check_sanitized, "aarch64": check_aarch64}


def main() -> int:
    """Exit status 1 when a check ended in red, 2 when a program is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)}; all when none is named")
    parser.add_argument("--missing", action="store_true", help="print the Debian packages that are still to be installed")
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"CHECK must be one of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}")
    missing = missing_packages()
    if options.missing:
        print(*missing)
        return 0
    if missing:
        print(f"programs are missing; install them: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ops = record_cases(folder)
        for check in options.checks or CHECKS:
            began = time.monotonic()
            try:
                CHECKS[check](folder, ops, folder)
            except CheckError as error:
                print(f"{error}\nnative check '{check}' FAILED", file=sys.stderr)
                return 1
            print(f"native check '{check}' passed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
