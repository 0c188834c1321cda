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
# reads one float beyond x
OVERRUN = """
import numpy as np
from rsvlm_infer import _C
print(_C.__file__, flush=True)
x, weight, out = np.ones(38, np.float32), np.ones(13, np.float32), np.ones(39, np.float32)
address = lambda array: array.ctypes.data
_C.rms_norm(x=address(x), weight=address(weight), out=address(out), rows=3, width=13, eps=1e-5, dtype="float32")
"""
LONGEST_S = 1200  # of one program: half a minute at most on an idle machine, so this is a deadlock


class CheckError(Exception):
    """A check that ended in red; the message is its last line."""


def missing_packages() -> list[str]:
    """Debian packages of the programs that are not there."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def run(command: Sequence[str | Path], place: Path = REPOSITORY, **more: str) -> tuple[int, str]:
    """Exit status and what it said; qemu's notes on features that no kernel uses are left out."""
    # threads that spin while they wait starve each other when there are more of them than cores
    variables = os.environ | {"OMP_WAIT_POLICY": "passive"} | more
    try:
        done = subprocess.run(
            command, cwd=place, env=variables, capture_output=True, text=True, errors="replace", timeout=LONGEST_S
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"not done after {LONGEST_S} s: {' '.join(map(str, command))}") from None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "TCG doesn't support requested feature" not in line]
    return done.returncode, "\n".join(lines)


def demand(command: Sequence[str | Path], place: Path = REPOSITORY, **more: str) -> str:
    """What a command said that had to succeed."""
    status, said = run(command, place, **more)
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


def compile_bindings(compiler: str, flags: Sequence[str], folder: Path) -> list[Path]:
    """Objects of what translates between Python and the core."""
    import pybind11

    # Python.h of this machine serves aarch64 too: both have 64-bit pointers and longs, and nothing is linked there
    python = Path(sysconfig.get_path("include"))
    foreign = Path(tempfile.mkdtemp(dir=folder.parent))
    own = python.parent / str(sysconfig.get_config_var("MULTIARCH")) / python.name
    if own.is_dir():  # Debian's pyconfig.h leads to a folder by architecture, and has none for others
        (foreign / "aarch64-linux-gnu").mkdir()
        (foreign / "aarch64-linux-gnu" / python.name).symlink_to(own)
    headers = [f"-I{place}" for place in (CSRC / "python", python, foreign, pybind11.get_include())]
    sources = sorted((CSRC / "python").glob("*.cpp"))
    return compile_all(compiler, [*flags, "-fvisibility=hidden", "-fPIC", *headers], sources, folder)


def build_runner(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """The program that runs recorded cases, from the same sources as the extension."""
    sources = sorted(source for part in ("ops", "cpu", "model", "checks") for source in (CSRC / part).glob("*.cpp"))
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
    program = build_runner("g++", [*SANITIZED, *SANITIZERS, "-fPIC"], folder / "sanitized")
    judge([program], cases, ops, [])
    for name, words in (
        ("overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("undefined", "not a valid value for type 'bool'"),
    ):
        status, said = run([program, cases / name])
        if status == 0 or words not in said:
            raise CheckError(f"{said}\nthe sanitizers did not see the case '{name}'")
    check_sanitized_extension(folder)


def check_sanitized_extension(folder: Path) -> None:
    """The native tests of tests/ops, with shapes that hypothesis draws, through the bindings."""
    tree, flags = folder / "tree", [*SANITIZED, "-O0", *SANITIZERS]  # bindings only translate: -O0 compiles in half the time
    shutil.copytree(REPOSITORY / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "pyproject.toml").symlink_to(REPOSITORY / "pyproject.toml")
    (tree / "rsvlm_infer").mkdir()
    for part in (REPOSITORY / "rsvlm_infer").iterdir():
        if part.suffix != ".so":
            (tree / "rsvlm_infer" / part.name).symlink_to(part)
    core = [path for path in (folder / "sanitized").glob("*.o") if not path.name.startswith("checks-")]
    extension = tree / "rsvlm_infer" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    bindings = compile_bindings("g++", flags, folder / "sanitized-bindings")
    demand(["g++", *flags, "-shared", *core, *bindings, "-o", extension])
    # the sanitizer must come before all else in a program that was not linked with it; exceptions need the C++ library there too
    preload = " ".join(demand(["g++", f"-print-file-name={name}.so"]) for name in ("libasan", "libstdc++"))
    # not of leaks: the interpreter keeps what it allocates
    with_sanitizer = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tree)}
    status, said = run([sys.executable, "-c", OVERRUN], tree, **with_sanitizer)
    if status == 0 or str(extension) not in said or "AddressSanitizer: heap-buffer-overflow" not in said:
        raise CheckError(f"{said}\nthe sanitizer did not see an overrun through the extension")
    # without the tests of equal bits, which run the same shapes twenty times
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native and not same_bits", "tests/ops"]
    print(demand(tests, tree, **with_sanitizer).splitlines()[-1], flush=True)


def check_aarch64(cases: Path, ops: set[str], folder: Path) -> None:
    """Every source compiles, the bindings too; the portable kernels give the right results."""
    compiler = "aarch64-linux-gnu-g++"
    program = build_runner(compiler, [*SHIPPED, "-static"], folder / "aarch64")  # static: qemu needs no foreign libraries
    judge(["qemu-aarch64", program], cases, ops, ["portable", "baseline"])
    bindings = compile_bindings(compiler, [*WARNINGS, "-fopenmp"], folder / "bindings")
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
