"""The exported package as files: of which kind, is it whole, does this version read it. Knows no runtime and no torch.

Every kind has the same manifest and is refused by the same code, in one line: foreign, newer, incomplete or changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from ..config import RsvlmConfig
from ..contract import (
    ARCHITECTURE,
    CERTIFICATE,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    KIND_PRECISIONS,
    KINDS,
    KNOWLEDGE,
    MANIFEST,
    NATIVE_WEIGHTS,
    graph_contracts,
)
from ..errors import CheckpointError, ConfigError
from ..hardware import usable_cores

MAX_JSON_BYTES = 16 << 20
# Of a file, hashed in one call without Python's lock: parsing a tokenizer holds that lock as long as 128 MiB take, and between two calls
# a hash would wait for it. No more of a file is mapped at a time, so that hashing stays below the memory of a first answer.
HASHED_BYTES = 128 << 20
AGAIN = "export it again with `rsvlm export`, or copy the whole folder again"


def is_package(path: str | Path) -> bool:
    """Whether a folder is an exported package, of any kind and perhaps damaged, rather than a checkpoint."""
    return (Path(path) / MANIFEST).is_file()


def package_kind(path: str | Path) -> str | None:
    """Which kind of package a folder is; None for a checkpoint.

    Raises:
        CheckpointError: a package whose manifest this version does not read.
    """
    return str(read_manifest(Path(path))["kind"]) if is_package(path) else None


@dataclass(frozen=True, eq=False)
class Package:
    """A package whose manifest this version reads, and whose files all exist with the right number of bytes."""

    path: Path
    manifest: dict[str, Any]
    config: RsvlmConfig

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Checks everything but the content of the files; see `verify`.

        Raises:
            CheckpointError: no package, a foreign or newer one, or a file that is missing or cut.
        """
        return cls(*read_package(Path(path)))

    @property
    def kind(self) -> str:
        """One of `KINDS`, the name of the backend that reads it."""
        return str(self.manifest["kind"])

    @property
    def precision(self) -> str:
        return str(self.manifest["precision"])

    @property
    def embedder(self) -> str:
        """The digest of the checkpoint that this package embeds text like; see `models.load.embedder_digest`."""
        return str(self.manifest.get("model", {}).get("embedder", ""))

    @property
    def knowledge_folder(self) -> Path | None:
        folder = self.path / KNOWLEDGE
        return folder if folder.is_dir() else None

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What `rsvlm verify` wrote; None before it ran."""
        file = self.path / CERTIFICATE
        return read_json(file, "certificate") if file.is_file() else None

    def damages(self) -> list[str]:
        """Files whose content is not what the manifest says, a few words each."""
        with self._hashes() as hashes:
            return self._differences(hashes)

    def verify(self) -> None:
        """Reads every file.

        Raises:
            CheckpointError: names every file that differs.
        """
        with self.verifying():
            pass

    @contextlib.contextmanager
    def verifying(self) -> Iterator[None]:
        """Reads every file in other threads while the body runs, and ends when both have ended.

        Raises:
            CheckpointError: names every file that differs, in place of what the body may have raised because of them.
        """
        with self._hashes() as hashes:
            try:
                yield
            finally:
                found = self._differences(hashes)
                if found:
                    raise problem(self.path, f"it is damaged: {'; '.join(found)}", AGAIN)

    @contextlib.contextmanager
    def _hashes(self) -> Iterator[dict[str, Future[str]]]:
        """The sha256 of each file, one file per core at a time. The body begins when the largest file, the first, is being read."""
        files: Mapping[str, Any] = self.manifest["files"]
        largest_first = sorted(files, key=lambda name: files[name]["bytes"], reverse=True)
        begun = threading.Event()
        with ThreadPoolExecutor(usable_cores()) as pool:
            hashes = {name: pool.submit(mapped_sha256, self.path / name, begun) for name in largest_first[:1]}
            begun.wait()
            yield hashes | {name: pool.submit(mapped_sha256, self.path / name) for name in largest_first[1:]}

    def _differences(self, hashes: Mapping[str, Future[str]]) -> list[str]:
        found = []
        for name, expected in self.manifest["files"].items():
            digest = hashes[name].result()
            if digest != expected["sha256"]:
                found.append(f"{name} must have sha256 {expected['sha256'][:12]}, got {digest[:12]}")
        return found


def mapped_sha256(path: Path, begun: threading.Event | None = None) -> str:
    """Hex sha256 of a file, in calls so long that other threads can hold Python's lock meanwhile; `begun` is set before the first."""
    begun = begun or threading.Event()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            for start in range(0, length, HASHED_BYTES):
                with mmap.mmap(file.fileno(), min(HASHED_BYTES, length - start), access=mmap.ACCESS_READ, offset=start) as part:
                    if hasattr(mmap, "MADV_SEQUENTIAL"):
                        part.madvise(mmap.MADV_SEQUENTIAL)
                    begun.set()
                    digest.update(part)
    finally:
        begun.set()  # an empty file, or one that cannot be read, keeps nobody waiting
    return digest.hexdigest()


def read_package(folder: Path) -> tuple[Path, dict[str, Any], RsvlmConfig]:
    """What `Package` holds: folder, checked manifest, config."""
    values = read_manifest(folder)
    problems = [damage for name, entry in values["files"].items() if (damage := _damage(folder, name, entry)) is not None]
    if problems:
        raise problem(folder, "; ".join(problems), AGAIN)
    try:
        config = RsvlmConfig.from_json(folder / CONFIG)
    except ConfigError as error:
        raise problem(folder, str(error), AGAIN) from None
    if values["kind"] != "native":
        _check_graphs(folder, values, config)
    return folder, values, config


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, when this version can read such a package; the files themselves are not looked at.

    Raises:
        CheckpointError: no package, or a foreign or newer one.
    """
    values = read_json(folder / MANIFEST, "manifest")
    foreign = "use the program that it was made for, or export one with `rsvlm export`"
    for name, expected in (("format", FORMAT), ("architecture", ARCHITECTURE)):
        if values.get(name) != expected:
            raise problem(folder, f"manifest {name} must be {expected!r}, got {values.get(name)!r}", foreign)
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise problem(folder, f"manifest version must be a number from 1, got {version!r}", AGAIN)
    if version > FORMAT_VERSION:
        raise problem(
            folder,
            f"manifest version must be at most {FORMAT_VERSION}, got {version}",
            "upgrade rsvlm-infer, or export it again with this version",
        )
    kind, precision, files = values.get("kind"), values.get("precision"), values.get("files")
    if kind not in KINDS:
        raise problem(folder, f"manifest kind must be one of {list(KINDS)}, got {kind!r}", foreign)
    if precision not in KIND_PRECISIONS[kind]:
        raise problem(folder, f"manifest precision must be one of {list(KIND_PRECISIONS[kind])}, got {precision!r}", AGAIN)
    needed = {CONFIG, NATIVE_WEIGHTS} if kind == "native" else {CONFIG}
    if not isinstance(files, dict) or not needed <= set(files):
        raise problem(folder, f"manifest files must be an object that names {sorted(needed)}, got {_named(files)}", AGAIN)
    inputs = values.get("int8_inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(name, str) and name for name in inputs):
        raise problem(folder, f"manifest int8_inputs must be a list of beginnings of names, got {inputs!r}", AGAIN)
    return values


def _named(files: Any) -> Any:
    return sorted(files) if isinstance(files, dict) else type(files).__name__


def _damage(folder: Path, name: str, entry: Any) -> str | None:
    """What is wrong with one file of the manifest, its content aside, in a few words."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name:
        return f"{name!r} must lie inside of the package"
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
        return f"{name} must have bytes and sha256 in the manifest, got {entry!r}"
    file = folder / name
    if not file.is_file():
        return f"{name} must exist, it is missing"
    found = file.stat().st_size
    return None if found == entry["bytes"] else f"{name} must have {entry['bytes']} bytes, got {found}"


def _check_graphs(folder: Path, values: Mapping[str, Any], config: RsvlmConfig) -> None:
    """The manifest's graphs are those that this version expects for the config, input by input."""
    context = values.get("context", 0)
    if not isinstance(context, int):
        raise problem(folder, f"manifest context must be a number of places, got {context!r}", AGAIN)
    contracts = graph_contracts(config, values["kind"], values["precision"], context)
    expected = {name: graph.to_dict() for name, graph in contracts.items()}
    found = values.get("graphs")
    if not isinstance(found, dict) or set(found) != set(expected):
        raise problem(folder, f"graphs must be {sorted(expected)} for its config, got {_named(found)}", AGAIN)
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        raise problem(folder, f"inputs or outputs of the graphs {wrong} are not those of its config", AGAIN)
    unlisted = [entry["file"] for entry in expected.values() if entry["file"] not in values["files"]]
    if unlisted:
        raise problem(folder, f"manifest files must name {unlisted}", AGAIN)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A small JSON object of a package; `what` it is goes into messages.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what} {file} must be a JSON object, it cannot be read ({reason}); {AGAIN}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{what} {file} must be a JSON object, got {type(values).__name__}; {AGAIN}")
    return values


def problem(folder: Path, reason: str, step: str) -> CheckpointError:
    """The error that says what is wrong with a package and what to do."""
    return CheckpointError(f"package {folder}: {reason}; {step}")
