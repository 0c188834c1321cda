"""The checkpoint folder as files: what is safe to open, what is in it, its hashes, and writing one. Knows no torch and no layout.

A folder holds `config.json`, `*.safetensors`, and beside them `tokenizer.json`, `preprocessor_config.json`, `knowledge/`,
`MODEL_CARD.md`. With a `delta.json`, one safetensors file is a *delta*: it is read last and overrides its base parts.
Nothing here ever unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import RsvlmConfig
from ..contract import CERTIFICATE, DRAFTS
from ..errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # a shard index of a 70B model is 0.1 MiB, the largest public tokenizer.json about 35 MiB
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")
DELTA_FILE = "delta.json"
DELTA_FORMAT = 1
_DELTA_KEYS = {"format", "base", "weights", "sha256", "files"}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor; `dtype` in safetensors' words (F32, BF16, I64, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """The parsed `delta.json`. `base` names the sources of the base parts; `files` the sha256 of the files beside it."""

    weights: Path
    sha256: str
    base: tuple[dict[str, Any], ...] = ()
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder that passed the checks which need no weights. Make one with `open`."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> CheckpointFolder:
        """Checks that the folder exists, holds no unsafe tokenizer, and no pickle in place of weights.

        Raises:
            CheckpointError: with the reason and the next step.
        """
        folder = Path(path)
        if not folder.exists():
            raise CheckpointError(f"checkpoint folder {folder} does not exist; pass an existing folder or run `rsvlm pull`")
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint must be a folder with config.json and *.safetensors, got the file {folder}; pass its folder"
            )
        for name in TOKENIZER_FILES:
            _check_tokenizer_file(folder / name)
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLE_SUFFIXES)
        if pickles and not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"checkpoint {folder} holds pickle files {pickles[:5]} and no *.safetensors; a pickle can run code, so it is never "
                "opened: on a machine you can lose, convert it with safetensors.torch.save_file(torch.load(file, weights_only=True), "
                '"model.safetensors"), and copy the result here'
            )
        return cls(folder)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The raw `config.json`; None when there is none."""
        return self.read_json("config.json")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object from this folder; None when the file does not exist."""
        path = self.path / name
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} must be at most {MAX_JSON_BYTES} bytes, got {path.stat().st_size}; restore it from its source"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({error}); restore it from its source") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}; restore it from its source")
        return values

    @cached_property
    def delta(self) -> Delta | None:
        """The parsed `delta.json`; None when this is no delta checkpoint."""
        values = self.read_json(DELTA_FILE)
        return None if values is None else _parse_delta(self.path, values)

    @cached_property
    def base_files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the base weights: the shards of an index, else all except delta and draft table."""
        index = self.read_json("model.safetensors.index.json")
        if index is not None:
            return self._shards(index)
        found = sorted(path for path in self.path.glob("*.safetensors") if path.name != DRAFTS)
        if self.delta is not None:
            found = [item for item in found if item.name != self.delta.weights.name]
            self._require_base()
        elif (self.path / "model.safetensors") in found and (self.config or {}).get("model_type") != "rsvlm":
            found = [self.path / "model.safetensors"]  # hubs keep the same weights twice under two names
        if not found and self.delta is None:
            raise CheckpointError(f"checkpoint {self.path} holds no *.safetensors; copy the weights there or run `rsvlm pull`")
        return tuple(found)

    def _require_base(self) -> None:
        assert self.delta is not None  # called from base_files only
        named = [*self.delta.files, *(part["file"] for part in self.delta.base if "file" in part)]
        missing = sorted({name for name in named if not (self.path / name).is_file()})
        if missing:
            raise CheckpointError(f"checkpoint {self.path} is a delta and lacks its base files {missing}; run `rsvlm pull`")

    def _shards(self, index: dict[str, Any]) -> tuple[Path, ...]:
        where = f"{self.path / 'model.safetensors.index.json'}"
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{where} must hold an object weight_map, got {weight_map!r}; restore it from its source")
        names = sorted({str(name) for name in weight_map.values()})
        paths = [_inside(self.path, name, where) for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"checkpoint {self.path} lacks {len(missing)} of {len(paths)} shards: {missing[:20]}; download them again"
            )
        return tuple(paths)

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Headers of all base tensors by name, checked by safetensors: sizes, offsets, overlaps.

        Raises:
            CheckpointError: a damaged file, or one name in two files.
        """
        found: dict[str, TensorHeader] = {}
        for path in self.base_files:
            for name, header in read_headers(path).items():
                if name in found:
                    raise CheckpointError(
                        f"checkpoint {self.path} holds {name!r} in both {found[name].file.name} and {path.name}; remove one of the files"
                    )
                found[name] = header
        return found

    @cached_property
    def delta_tensors(self) -> dict[str, TensorHeader]:
        """Headers of the delta's tensors by name; empty without a delta."""
        return {} if self.delta is None else read_headers(self.delta.weights)

    def verify(self) -> dict[str, str]:
        """Compares the sha256 of every file that `delta.json` names.

        Returns:
            File name -> sha256 of the files that were read.

        Raises:
            CheckpointError: names every file that differs.
        """
        if self.delta is None:
            return {}
        self._require_base()
        expected = {**self.delta.files, self.delta.weights.name: self.delta.sha256}
        found = {name: sha256_of(self.path / name) for name in expected}
        wrong = [f"{name} (expected {expected[name]}, got {found[name]})" for name in expected if found[name] != expected[name]]
        if wrong:
            raise CheckpointError(
                f"checkpoint {self.path} holds files with a wrong sha256: {'; '.join(wrong)}; run `rsvlm pull` again or restore them"
            )
        return found


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Hex sha256 of all files of a checkpoint or package that make up the model: config, weights, tokenizer, knowledge.

    A package's manifest names its graphs by their sha256; its certificate changes no prediction.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors") and path.name != CERTIFICATE
    )
    lines = (f"{path.relative_to(folder).as_posix()} {sha256_of(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file by name, without their content.

    Raises:
        CheckpointError: the file is truncated, or its header is damaged or lies.
    """
    with open_weights(path, "numpy") as file:
        names = list(file.keys())
        slices = ((name, file.get_slice(name)) for name in names)
        return {name: TensorHeader(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices}


def read_scalar(path: Path, name: str) -> float:
    """The value of a tensor of one element; numpy alone, which has no bfloat16.

    Raises:
        CheckpointError: it is no single floating-point number.
    """
    header = read_headers(path)[name]
    formats = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<H"}
    if math.prod(header.shape) != 1 or header.dtype not in formats:
        raise CheckpointError(
            f"{name!r} in {path} must be one floating-point number, got {header.dtype} {list(header.shape)}; restore it from its source"
        )
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        raw = file.read(stop - start)
    if header.dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(formats[header.dtype], raw)[0])


@contextlib.contextmanager
def open_weights(path: Path, framework: str) -> Iterator[Any]:
    """safetensors' own reader ("numpy" or "pt"), with our errors."""
    try:
        with safe_open(str(path), framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights file {path} cannot be read ({error}); it is damaged or incomplete, download it again"
        ) from None


def _inside(folder: Path, name: str, where: str) -> Path:
    """`folder / name` for a plain file name; anything that could leave the folder is refused."""
    plain = PurePosixPath(name).name == name and PureWindowsPath(name).name == name and name not in ("", ".", "..")
    if not plain or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{where} must name plain *.safetensors files of its own folder, got {name!r}; restore it from its source"
        )
    return folder / name


def _check_tokenizer_file(path: Path) -> None:
    if not path.is_file():
        return
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} must be at most {MAX_JSON_BYTES} bytes, got {size}; restore it from its source")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x1f\x8b") or start[:1] == b"\x80":
        raise CheckpointError(f"{path} is an archive or a pickle (first bytes {start!r}); restore it from its source")


def _parse_delta(folder: Path, values: dict[str, Any]) -> Delta:
    where = f"{folder / DELTA_FILE}"
    problems = []
    unknown = sorted(set(values) - _DELTA_KEYS)
    if unknown:
        problems.append(f"unknown keys {unknown}, known are {sorted(_DELTA_KEYS)}")
    if values.get("format") != DELTA_FORMAT:
        problems.append(f"format must be {DELTA_FORMAT}, got {values.get('format')!r}")
    for key in ("weights", "sha256"):
        if not isinstance(values.get(key), str):
            problems.append(f"{key} must be a string, got {values.get(key)!r}")
    base, files = values.get("base", []), values.get("files", {})
    if not isinstance(base, list) or not all(isinstance(part, dict) for part in base):
        problems.append(f"base must be a list of objects, got {base!r}")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        problems.append(f"files must be an object of file name -> sha256, got {files!r}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}; restore it from its source")
    for name in (*files, *(part["file"] for part in base if "file" in part)):
        _inside(folder, str(name), where)
    weights = _inside(folder, values["weights"], where)
    if not weights.is_file():
        raise CheckpointError(
            f"checkpoint {folder} lacks its delta weights {weights.name}; run `rsvlm pull` again or restore the file"
        )
    return Delta(weights, values["sha256"].lower(), tuple(base), {name: digest.lower() for name, digest in files.items()})


def save_checkpoint(
    folder: str | Path,
    config: RsvlmConfig,
    state_dict: Mapping[str, Any],
    *,
    base: Sequence[Mapping[str, Any]] | None = None,
    base_files: Mapping[str, str] | None = None,
    tokenizer: str | Path | None = None,
    knowledge: str | Path | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint folder at once or not at all: into a temporary sibling, then renamed.

    Args:
        folder: must not exist, unless `overwrite`.
        state_dict: our parameter names -> numpy arrays, or all torch tensors.
        base: None = a whole checkpoint (`model.safetensors`); otherwise the base parts (`part`, `source`, `sha256`, `file`?) of a
            delta (`delta.safetensors` and `delta.json`).
        base_files: sha256 of the base files that must lie beside the delta when it is loaded.
        tokenizer: a `tokenizer.json`, or a folder whose tokenizer files are copied.
        knowledge: a knowledge base folder to copy. card: text of `MODEL_CARD.md`.

    Raises:
        CheckpointError: the folder exists.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise CheckpointError(f"folder {target} exists and is not overwritten; choose another one or pass overwrite=True")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        config_file = temporary / "config.json"
        config_file.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        mode = config_file.stat().st_mode  # what the umask gives to new files
        temporary.chmod(mode & 0o777 | (mode & 0o444) >> 2)  # mkdtemp gives 0700: readable becomes enterable
        weights = temporary / ("model.safetensors" if base is None else "delta.safetensors")
        _save_tensors(state_dict, weights)
        weights.chmod(mode & 0o777)  # safetensors writes for the owner alone
        if base is not None:
            values: dict[str, Any] = {"format": DELTA_FORMAT, "base": [dict(part) for part in base], "weights": weights.name}
            values["sha256"] = sha256_of(weights)
            if base_files:
                values["files"] = dict(base_files)
            (temporary / DELTA_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            source = Path(tokenizer)
            for path in (
                [source] if source.is_file() else [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
            ):
                shutil.copyfile(path, temporary / path.name)
        if knowledge is not None:
            shutil.copytree(knowledge, temporary / "knowledge")
        if card is not None:
            (temporary / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_tensors(state_dict: Mapping[str, Any], path: Path) -> None:
    import numpy as np

    if all(isinstance(value, np.ndarray) for value in state_dict.values()):
        from safetensors.numpy import save_file as save_numpy

        save_numpy({name: np.ascontiguousarray(value) for name, value in state_dict.items()}, path)
    else:
        from safetensors.torch import save_file as save_torch

        # clone: tensors that share memory (tied weights, views) would be refused
        save_torch({name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()}, path)


def replace_folder(temporary: Path, target: Path) -> None:
    """Renames a finished folder to its place; what stood there goes when the new one is in."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
