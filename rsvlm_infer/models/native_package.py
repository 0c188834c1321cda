"""The weights of a native package, where they lie in the mapped file. Owns that file's format, knows no runtime, writer or torch.

`weights.safetensors` holds every tensor as the kernels read it, so nothing is unpacked or copied: the system pages it in, and
processes share it. Manifest and files are `models.package`'s.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..contract import NATIVE_WEIGHTS
from ..errors import CheckpointError
from .package import AGAIN, MAX_JSON_BYTES, Package, problem, read_package

ALIGNMENT_BYTES = 64  # a cache line: the first tensor begins at a multiple, and matrices, which go first, are whole lines

# name -> (kind, rows, columns, bytes): a laid-out weight of kind fp32, bf16, int8 or int4; "" and "raw" for [rows] values of
# float32 and of two bytes
NativeWeights = dict[str, tuple[str, int, int, npt.NDArray[np.uint8]]]


@dataclass(frozen=True, eq=False)
class NativePackage(Package):
    """A native package that was checked. `weights` are views of the mapped file and must not be written."""

    weights: NativeWeights

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Checks and maps a package.

        Args:
            verify: also compare the sha256 of every file, which reads them all once (0.65 s per GB).

        Raises:
            CheckpointError: no native package, a foreign or newer one, or a file that is missing, cut or changed.
        """
        folder, manifest, config = read_package(Path(path))
        if manifest["kind"] != "native":
            raise problem(folder, f"manifest kind must be 'native', got {manifest['kind']!r}", "use the backend of this kind")
        if verify:
            Package(folder, manifest, config).verify()
        return cls(folder, manifest, config, map_weights(folder / NATIVE_WEIGHTS))

    @property
    def int8_inputs(self) -> list[str]:
        """Beginnings of the names of matrices whose int8 or int4 codes meet inputs rounded to int8, per row and 32 columns."""
        return list(self.manifest.get("int8_inputs", []))

    def values(self, name: str) -> npt.NDArray[np.float32] | None:
        """A float32 vector of the package, None when it has none of this name."""
        kind, _, _, content = self.weights.get(name, ("absent", 0, 0, None))
        return None if kind != "" or content is None else content.view(np.float32)


def map_weights(path: Path) -> NativeWeights:
    """The tensors of a weights file, read-only and without a copy.

    Raises:
        CheckpointError: a header that is damaged or does not fit the file.
    """
    try:
        with path.open("rb") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        length = int.from_bytes(memory[:8].tobytes(), "little")
        if length > min(MAX_JSON_BYTES, memory.size - 8):
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
