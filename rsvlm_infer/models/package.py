"""The exported package as files: is it one, is it whole, does this version read it. Knows no runtime and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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
    graph_contracts,
)
from ..errors import ConfigError
from .checkpoint import sha256_of
from .native_package import AGAIN, is_native_package, problem, read_json


def is_package(path: str | Path) -> bool:
    """Whether a folder is an exported package of graphs, rather than a checkpoint or a package for the native backend."""
    return (Path(path) / MANIFEST).is_file() and not is_native_package(path)


@dataclass(frozen=True)
class Package:
    """A package whose manifest this version reads, and whose files all exist with the right number of bytes."""

    path: Path
    manifest: dict[str, Any]
    config: RsvlmConfig

    @classmethod
    def open(cls, path: str | Path) -> Package:
        """Checks everything but the content of the files; see `verify`.

        Raises:
            CheckpointError: no package, a foreign or newer one, or a file that is missing or cut.
        """
        folder = Path(path)
        values = read_json(folder / MANIFEST, "manifest")
        if values.get("format") != FORMAT:
            raise problem(
                folder, f"manifest format must be {FORMAT!r}, got {values.get('format')!r}", "pass an exported package"
            )
        version = values.get("version")
        if not isinstance(version, int) or version < 1:
            raise problem(folder, f"manifest version must be a number from 1, got {version!r}", AGAIN)
        if version > FORMAT_VERSION:
            raise problem(
                folder,
                f"it has format version {version}, this rsvlm_infer reads up to {FORMAT_VERSION}",
                "upgrade rsvlm_infer, or export it again with this version",
            )
        if values.get("architecture") != ARCHITECTURE or values.get("kind") not in KINDS:
            raise problem(
                folder,
                f"architecture and kind must be {ARCHITECTURE!r} and one of {list(KINDS)}, got {values.get('architecture')!r} and "
                f"{values.get('kind')!r}",
                "use the program that this package was made for, or export one with `rsvlm export`",
            )
        precisions = KIND_PRECISIONS[values["kind"]]
        if values.get("precision") not in precisions:
            raise problem(folder, f"precision must be one of {list(precisions)}, got {values.get('precision')!r}", AGAIN)
        _check_files(folder, values)
        try:
            config = RsvlmConfig.from_json(folder / CONFIG)
        except ConfigError as error:
            raise problem(folder, str(error), AGAIN) from None
        _check_graphs(folder, values, config)
        return cls(folder, values, config)

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
        found = []
        for name, expected in self.manifest["files"].items():
            digest = sha256_of(self.path / name)
            if digest != expected["sha256"]:
                found.append(f"{name} has sha256 {digest[:12]}, the manifest says {expected['sha256'][:12]}")
        return found

    def verify(self) -> None:
        """Reads every file.

        Raises:
            CheckpointError: names every file that differs.
        """
        found = self.damages()
        if found:
            raise problem(self.path, f"it is damaged: {'; '.join(found)}", AGAIN)


def _check_files(folder: Path, values: dict[str, Any]) -> None:
    files = values.get("files")
    if not isinstance(files, dict) or CONFIG not in files:
        raise problem(folder, f"manifest files must be an object that names {CONFIG}, got {type(files).__name__}", AGAIN)
    problems = []
    for name, entry in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name:
            problems.append(f"{name!r} lies outside of the package")
        elif not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
            problems.append(f"{name} has no bytes and sha256 in the manifest")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif (folder / name).stat().st_size != entry["bytes"]:
            problems.append(f"{name} must have {entry['bytes']} bytes, it has {(folder / name).stat().st_size}")
    if problems:
        raise problem(folder, "; ".join(problems), AGAIN)


def _check_graphs(folder: Path, values: dict[str, Any], config: RsvlmConfig) -> None:
    """The manifest's graphs are those that this version expects for the config, input by input."""
    context = values.get("context", 0)
    if not isinstance(context, int):
        raise problem(folder, f"manifest context must be a number of places, got {context!r}", AGAIN)
    contracts = graph_contracts(config, values["kind"], values["precision"], context)
    expected = {name: graph.to_dict() for name, graph in contracts.items()}
    found = values.get("graphs")
    if not isinstance(found, dict) or set(found) != set(expected):
        names = sorted(found) if isinstance(found, dict) else found
        raise problem(folder, f"graphs must be {sorted(expected)} for its config, got {names}", AGAIN)
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        raise problem(folder, f"inputs or outputs of the graphs {wrong} are not those of its config", AGAIN)
    unlisted = [entry["file"] for entry in expected.values() if entry["file"] not in values["files"]]
    if unlisted:
        raise problem(folder, f"manifest files must name {unlisted}", AGAIN)
