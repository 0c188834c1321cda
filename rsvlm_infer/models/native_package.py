"""The package that the native backend reads: is it one, is it whole, and its weights where they lie in the mapped file.

Owns the file format, knows no runtime, no writer and no torch. `weights.safetensors` holds every tensor as the kernels read it,
so nothing is unpacked or copied: the system pages it in, and processes share it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig
from ..errors import CheckpointError, ConfigError
from .checkpoint import sha256_of

FORMAT = "rsvlm-package"
FORMAT_VERSION = 1  # goes up when an older reader would read a package wrongly
ARCHITECTURE = "rsvlm"
KIND = "native"
PRECISIONS = ("fp32", "bf16", "int8", "int4")

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
KNOWLEDGE = "knowledge"
ALIGNMENT_BYTES = 64  # a cache line: the first tensor begins at a multiple, and matrices, which go first, are whole lines
MAX_MANIFEST_BYTES = 16 << 20
AGAIN = "export it again with `rsvlm export`, or copy the whole folder again"

# name -> (kind, rows, columns, bytes): a laid-out weight of kind fp32, bf16, int8 or int4; "" and "raw" for [rows] values of
# float32 and of two bytes
NativeWeights = dict[str, tuple[str, int, int, npt.NDArray[np.uint8]]]


def is_native_package(path: str | Path) -> bool:
    """Whether a folder says of itself that it is a package for the native backend; it may still be damaged."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        return False
    try:
        return read_json(file, "manifest").get("kind") == KIND
    except CheckpointError:
        return (Path(path) / WEIGHTS).is_file()  # so that the message about the manifest comes, and not one about a checkpoint


@dataclass(frozen=True, eq=False)
class NativePackage:
    """A package that was checked. `weights` are views of the mapped file and must not be written."""

    path: Path
    manifest: dict[str, Any]
    config: RsvlmConfig
    weights: NativeWeights

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> NativePackage:
        """Checks and maps a package.

        Args:
            verify: also compare the sha256 of every file, which reads them all once (0.65 s per GB).

        Raises:
            CheckpointError: a foreign or newer package, or a file that is missing, cut or changed.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        damages = [_damage(folder, name, entry, verify) for name, entry in manifest["files"].items()]
        if any(damages):
            raise problem(folder, "; ".join(damage for damage in damages if damage), AGAIN)
        try:
            config = RsvlmConfig.from_json(folder / "config.json")
        except ConfigError as error:
            raise problem(folder, str(error), AGAIN) from None
        return cls(folder, manifest, config, map_weights(folder / WEIGHTS))

    @property
    def precision(self) -> str:
        return str(self.manifest["precision"])

    @property
    def int8_inputs(self) -> list[str]:
        """Beginnings of the names of matrices whose int8 or int4 codes meet inputs rounded to int8, per row and 32 columns."""
        return list(self.manifest.get("int8_inputs", []))

    @property
    def embedder(self) -> str:
        """The digest of the checkpoint that this package embeds text like."""
        return package_embedder(self.manifest)

    @property
    def knowledge_folder(self) -> Path | None:
        folder = self.path / KNOWLEDGE
        return folder if folder.is_dir() else None

    def values(self, name: str) -> npt.NDArray[np.float32] | None:
        """A float32 vector of the package, None when it has none of this name."""
        kind, _, _, content = self.weights.get(name, ("absent", 0, 0, None))
        return None if kind != "" or content is None else content.view(np.float32)


def package_embedder(manifest: Mapping[str, Any]) -> str:
    """See `NativePackage.embedder`."""
    return str(manifest.get("model", {}).get("embedder", ""))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, when this version can read such a package; the files themselves are not looked at.

    Raises:
        CheckpointError: no package, or a foreign or newer one.
    """
    values = read_json(folder / MANIFEST, "manifest")
    for name, expected in (("format", FORMAT), ("architecture", ARCHITECTURE), ("kind", KIND)):
        if values.get(name) != expected:
            raise problem(
                folder,
                f"manifest {name} must be {expected!r}, got {values.get(name)!r}",
                "use the program that it was made for",
            )
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise problem(folder, f"manifest version must be a number from 1, got {version!r}", AGAIN)
    if version > FORMAT_VERSION:
        raise problem(
            folder,
            f"manifest version must be at most {FORMAT_VERSION}, got {version}",
            "upgrade rsvlm-infer, or export it again",
        )
    if values.get("precision") not in PRECISIONS:
        raise problem(folder, f"manifest precision must be one of {list(PRECISIONS)}, got {values.get('precision')!r}", AGAIN)
    inputs = values.get("int8_inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(name, str) and name for name in inputs):
        raise problem(folder, f"manifest int8_inputs must be a list of beginnings of names, got {inputs!r}", AGAIN)
    files = values.get("files")
    needed = {"config.json", "tokenizer.json", WEIGHTS}
    if not isinstance(files, dict) or not needed <= set(files):
        raise problem(folder, f"manifest files must name {sorted(needed)}, got {sorted(files or ())}", AGAIN)
    return values


def map_weights(path: Path) -> NativeWeights:
    """The tensors of a weights file, read-only and without a copy.

    Raises:
        CheckpointError: a header that is damaged or does not fit the file.
    """
    try:
        with path.open("rb") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        length = int.from_bytes(memory[:8].tobytes(), "little")
        if length > min(MAX_MANIFEST_BYTES, memory.size - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(memory[8 : 8 + length].tobytes())
        shapes = header.pop("__metadata__")
        weights: NativeWeights = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            kind, rows, columns = shapes[name].split(" ")
            content = memory[8 + length + start : 8 + length + stop]
            if not 0 <= start <= stop or content.size != stop - start:
                raise ValueError(f"{name} lies outside of the file")
            weights[name] = ("" if kind == "vector" else kind, int(rows), int(columns), content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"weights file {path} must be one of a native package, it is not ({reason}); {AGAIN}") from None
    return weights


def write_weights(path: Path, weights: Mapping[str, tuple[str, int, int, npt.NDArray[Any]]]) -> None:
    """Writes what `map_weights` reads: safetensors of bytes, whose metadata say kind and shape, one after another."""
    header: dict[str, Any] = {
        "__metadata__": {name: f"{kind or 'vector'} {rows} {columns}" for name, (kind, rows, columns, _) in weights.items()}
    }
    offset = 0
    parts: list[npt.NDArray[np.uint8]] = []
    for name, (_, _, _, values) in weights.items():
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        header[name] = {"dtype": "U8", "shape": [content.size], "data_offsets": [offset, offset + content.size]}
        parts.append(content)
        offset += content.size
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for content in parts:
            file.write(content.data)


def _damage(folder: Path, name: str, entry: Any, verify: bool) -> str | None:
    """What is wrong with one file of the manifest, in a few words."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name:
        return f"{name!r} must lie inside of the package"
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
        return f"{name} must have bytes and sha256 in the manifest, got {entry!r}"
    file = folder / name
    if not file.is_file():
        return f"{name} must exist, it is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{name} must have {entry['bytes']} bytes, got {file.stat().st_size}"
    found = sha256_of(file) if verify else entry["sha256"]
    return None if found == entry["sha256"] else f"{name} must have sha256 {entry['sha256'][:12]}, got {found[:12]}"


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A small JSON object of a package; `what` it is goes into messages.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES >> 20} MiB")
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
