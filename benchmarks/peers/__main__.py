"""Ours against what users would pick instead, in one interleaved run: the same weights, pixels and tokens, as many threads.

    python -m benchmarks.peers.environments FOLDER                              # once; needs the network and a C++ compiler
    python -m benchmarks.peers --folder FOLDER --packages PKG ... --image IMAGE  # offline

Conversions run when they are missing. Each library at each precision is a process that stays loaded; a round asks all of them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from pathlib import Path

from benchmarks.peers import contestants, driver, prepare, report
from benchmarks.peers.environments import default_folder, python_of
from benchmarks.rows import RESULTS, append_rows
from rsvlm_infer.errors import InputError, RsvlmError
from rsvlm_infer.hardware import probe
from rsvlm_infer.models.load import read_config
from rsvlm_infer.models.package import Package, is_package
from rsvlm_infer.pipeline import default_checkpoint


def our_entries(packages: list[Path]) -> list[contestants.Entry]:
    """What the packages' manifests say they are.

    Raises:
        InputError: a folder that is no package.
    """
    entries = []
    for package in packages:
        if not is_package(package):
            raise InputError(
                f"--packages must name exported packages, got {package}; write one with `rsvlm export CHECKPOINT -o PKG`"
            )
        opened = Package.open(package.resolve())
        entries.append(contestants.our_entry(opened.path, opened.kind, opened.precision))
    return entries


def start(entry: contestants.Entry, options: argparse.Namespace, logs: Path) -> driver.Worker:
    """The worker of one entry, loaded or with an error in its first answer."""
    python = str(python_of(options.folder, entry.environment)) if entry.environment else sys.executable
    model = entry.model if entry.model.is_absolute() else options.folder / entry.model
    precision = f"{entry.precision} compiled" if entry.library.endswith("compiled") else entry.precision
    command = [python, "-m", f"{contestants.WORKERS}.{entry.worker}", "--inputs", str(options.folder / "inputs")]
    command += ["--model", str(model), "--precision", precision, "--threads", str(options.threads)]
    environment = driver.worker_environment(options.threads, prepare.ROOT, not entry.environment) | prepare.OFFLINE
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(options.folder / "inductor")}
    print(f"loading {entry.name} ...", file=sys.stderr, flush=True)
    return driver.Worker(command, prepare.ROOT, environment, logs / f"{entry.name.replace(' ', '-')}.log")


def measure(options: argparse.Namespace) -> list[report.Row]:
    """Prepares, runs the rounds, and makes the rows."""
    config = read_config(options.checkpoint)
    prepare.prepare_handout(options.checkpoint, options.image, options.folder)
    prepare.write_caption_list(options.captions, options.image, options.folder)
    program = prepare.build_limits(options.folder)
    entries = [*our_entries(options.packages), *(peer for peer in contestants.PEERS if options.compiled or not peer.asked_for)]
    entries = [entry for entry in entries if options.only is None or any(word in entry.name for word in options.only)]
    refused = {entry.name: reason for entry in entries if (reason := prepare.why_not(entry, options.folder)) is not None}
    for name, reason in refused.items():
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    if options.prepare:
        return []
    logs = options.folder / "logs"
    logs.mkdir(exist_ok=True)
    limits: dict[str, float] = {}

    def between() -> None:
        for name, value in prepare.measure_limits(program, options.threads).items():
            limits[name] = max(limits.get(name, 0.0), value)  # a limit is what the machine can do when nothing disturbs it

    workers: dict[str, driver.Worker] = {}
    try:
        for entry in entries:
            if entry.name not in refused:
                workers[entry.name] = start(entry, options, logs)
                if "error" in workers[entry.name].ready:
                    refused[entry.name] = f"could not be loaded: {workers[entry.name].ready['error']}"
                    workers.pop(entry.name).close()
        measured = driver.run_rounds(workers, options.rounds, options.minutes, between)
        ready = {name: worker.ready for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    inputs = options.folder / "inputs"
    tiles = json.loads((inputs / "tiles.json").read_text(encoding="utf-8"))
    every = [tuple(tiles["uniform"])] * len(tiles["mixed"])
    grids = {"tile x1": every[:1], f"tile x{len(every)}": every, "mixed tiles": [tuple(grid) for grid in tiles["mixed"]]}
    machine = probe()
    about = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": f"{machine.cpu}, {machine.cores} cores",
        "threads": options.threads,
        "load": round(os.getloadavg()[0], 1),
    }
    expected = json.loads((inputs / "caption.json").read_text(encoding="utf-8"))["expected"]
    return report.make_rows(entries, measured, ready, refused, limits, report.operations(config, grids), expected, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--packages", nargs="+", type=Path, required=True, help="exported packages of that checkpoint")
    parser.add_argument(
        "--image", type=Path, required=True, help="picture of 224 x 224 px to caption; tiles are its folder's first 32"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        help="RSICD folder whose test images show what guesses are worth; default: the pictures beside IMAGE",
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="of environments and converted models; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="no new round that would end later; loading comes before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="entries whose name holds one of these words")
    parser.add_argument("--compiled", action="store_true", help="also transformers under torch.compile: minutes more")
    parser.add_argument("--prepare", action="store_true", help="only convert what is missing, and say what cannot take part")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv", help="appended to; default %(default)s")
    parser.add_argument("--page", type=Path, help="markdown file whose marked part is replaced, for example docs/peers.md")
    options = parser.parse_args()
    options.folder = options.folder.expanduser().resolve()
    try:
        rows = measure(options)
    except RsvlmError as error:
        parser.exit(1, f"{error}\n")
    if options.prepare:
        return
    append_rows(options.csv, rows)
    machine = f"{rows[0]['machine']}, {rows[0]['threads']} threads, {rows[0]['date']}, load average {rows[0]['load']}"
    text = report.page(rows, f"{machine}.\n")
    print(text)
    if options.page is not None:
        report.write_page(options.page, text)


if __name__ == "__main__":
    main()
