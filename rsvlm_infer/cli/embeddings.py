"""Owns the files that `rsvlm embed` writes. Knows arrays and numpy's formats, no model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.base import Embeddings
from ..errors import InputError


@dataclass
class EmbeddingRows:
    """Embeddings in the order of the arguments; None for an image that failed. text_vectors [M, De]."""

    texts: list[str]
    text_vectors: npt.NDArray[np.float32]
    sources: list[str] = field(default_factory=list)
    images: list[Embeddings | None] = field(default_factory=list)

    def add(self, source: str, embeddings: Embeddings | None) -> None:
        self.sources.append(source)
        self.images.append(embeddings)

    def scene(self) -> npt.NDArray[np.float32]:
        """[N, De]; the row of a failed image is NaN, so that rows stay in step with the arguments."""
        width = next(image.scene.size for image in self.images if image is not None)
        missing = np.full(width, np.nan, dtype=np.float32)
        return np.stack([missing if image is None else image.scene for image in self.images])

    def arrays(self) -> dict[str, Any]:
        """sources [N], scene [N, De], region [sum T, De] and object [sum T, k, De] with tile_offsets [N + 1]; texts likewise."""
        arrays: dict[str, Any] = {}
        if self.texts:
            arrays |= {"texts": np.array(self.texts), "text_embeddings": self.text_vectors}
        if self.sources:
            arrays |= {"sources": np.array(self.sources), "scene": self.scene()}
            present = [image for image in self.images if image is not None]
            for level in ("region", "object"):
                parts = [getattr(image, level) for image in present]
                if all(part.size for part in parts):
                    least = min(part.shape[-2] for part in parts)  # k may be less for an image of very short tiles
                    arrays[level] = np.concatenate([part[..., :least, :] if level == "object" else part for part in parts])
            counts = [0 if image is None else len(image.region) for image in self.images]
            arrays["tile_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return arrays


def check_output(output: Path | None, images: bool, texts: bool) -> None:
    """Refuses what could not be written, before any work.

    Raises:
        InputError: nothing to embed, an unknown suffix, no such folder, or images and texts for one .npy.
    """
    if not images and not texts:
        raise InputError("give at least one image or --text, got none; write rsvlm embed IMAGE... or --text WORDS")
    if output is None:
        return
    if output.suffix not in (".npy", ".npz"):
        raise InputError(f"--output must end in .npy or .npz, got {output.name!r}; rename it")
    if not output.parent.is_dir():
        raise InputError(f"--output folder {output.parent} does not exist; create it first")
    if output.suffix == ".npy" and images and texts:
        raise InputError("--output .npy holds images or texts, got both; use .npz")


def write_embeddings(output: Path, rows: EmbeddingRows) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                if output.suffix == ".npy":
                    np.save(file, rows.scene() if rows.sources else rows.text_vectors)
                else:
                    np.savez(file, **rows.arrays())
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # mkstemp is 0600; an output is as readable as any other file
            Path(name).replace(output)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}); choose another place") from None
