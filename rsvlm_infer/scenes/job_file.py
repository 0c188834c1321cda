"""Owns the file that describes a job: its keys, their values, and which scenes its patterns name. Knows no model and starts nothing."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError, InputError
from .settings import RunSettings

Engine = Literal["local", "ray"]

DEFAULT_MICRO_BATCH = 4
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What a job file says. scenes: paths or URLs, in the order of the patterns, sorted within one, each once.

    checkpoint: None = the default one. backend, precision: as in `RSVLM.from_pretrained`. micro_batch: windows answered together.
    engine: "local" or "ray"; workers, ray_address, cpus, gpus belong to "ray": how many workers (None = one per core of this machine),
    which cluster (None = one on this machine), and what a worker takes.

    Raises:
        InputError: a value out of its range.
    """

    scenes: tuple[str, ...]
    output: Path
    settings: RunSettings
    formats: tuple[str, ...] = ()
    checkpoint: Path | None = None
    backend: str = "auto"
    precision: str = "auto"
    micro_batch: int = DEFAULT_MICRO_BATCH
    engine: Engine = "local"
    workers: int | None = None
    ray_address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise InputError(f"engine must be one of {list(get_args(Engine))}, got {self.engine!r}; choose one of them")
        given = {name: getattr(self, name) for name in ("workers", "ray_address")}
        given = {name: value for name, value in given.items() if value is not None}
        if self.engine == "local" and given:
            raise InputError(f'{", ".join(given)} need engine "ray", got engine "local"; add --engine ray or leave them out')
        for name, least in (("workers", 1), ("cpus", 0.0), ("gpus", 0.0), ("micro_batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least:g}, got {value}; raise it or leave it out")


def read_job_file(path: Path) -> JobFile:
    """A job from a TOML file. Paths in it begin at the file's folder; patterns are those of the shell, with ** for folders in folders.

    Raises:
        ConfigError: the file cannot be read, is no TOML, has an unknown key, a value of the wrong type, or lacks scenes or output.
        InputError: a value out of its range, or a pattern that no file meets.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"job file {path} cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {path} must be TOML ({error}); repair it, see docs/jobs.md") from None
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise ConfigError(f"job file {path} has unknown keys {unknown}; known are {sorted(_KEYS)}")
    for name in ("scenes", "output"):
        if name not in values:
            raise ConfigError(f'job file {path} must have the key "{name}"; add it, see docs/jobs.md')
    read = {name: _KEYS[name](f"{path}: {name}", value) for name, value in values.items()}
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 - resolve() would follow links, and a link may be how a cluster finds it
    output = folder / read.pop("output")
    checkpoint = read.pop("checkpoint", None)
    asked = {_SETTINGS[name]: read.pop(name) for name in list(read) if name in _SETTINGS}
    return JobFile(
        scenes=find_scenes(read.pop("scenes"), folder, output),
        output=output,
        settings=RunSettings(**asked),
        checkpoint=None if checkpoint is None else folder / Path(checkpoint).expanduser(),
        **read,
    )


def find_scenes(patterns: Sequence[str], folder: Path | None = None, output: Path | None = None) -> tuple[str, ...]:
    """The scenes that patterns name, each once: sorted within a pattern. folder: where relative ones begin, None = as they are.

    A name without wildcards is taken as it is, also when no such file exists: the job then lists it. What lies in `output` is left out
    of patterns, because a job's own pictures are no scenes.

    Raises:
        InputError: no pattern, a blank one, or one with wildcards that no file meets.
    """
    if not patterns:
        raise InputError("scenes must name at least one scene, got none; add a path or a pattern such as scenes/*.tif")
    found: dict[str, None] = {}
    for pattern in patterns:
        if not pattern.strip():
            raise InputError("scenes must not hold a blank name; remove it")
        remote = pattern.startswith("/vsi") or "://" in pattern
        place = pattern if remote or folder is None else str(folder / Path(pattern).expanduser())
        if remote or not _WILD.search(pattern) or Path(place).is_file():
            found[place] = None
            continue
        own = None if output is None else Path(os.path.abspath(output))  # noqa: PTH100
        names = [name for name in sorted(glob.glob(place, recursive=True)) if Path(name).is_file()]  # noqa: PTH207 - keeps the spelling
        names = [name for name in names if own is None or not Path(os.path.abspath(name)).is_relative_to(own)]  # noqa: PTH100
        if not names:
            raise InputError(
                f"scenes pattern {place} meets no file; check the path, or quote it so that the shell leaves it alone"
            )
        found |= dict.fromkeys(names)
    return tuple(found)


def parse_bytes(name: str, value: object) -> int:
    """Bytes from a number or a text such as "512MiB" or "1.5 GB".

    Raises:
        InputError: neither, or not above 0.
    """
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        unit = _UNITS.get(match[2].lower())
        if unit is not None and (number := int(float(match[1]) * unit)) > 0:
            return number
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InputError(f'{name} must be bytes above 0, such as 800000000 or "768MiB", got {value!r}; write one of these')


def _of(*kinds: type, words: str) -> Callable[[str, object], Any]:
    """A check for one key's type; TOML's true is no number."""

    def check(name: str, value: object) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name} must be {words}, got {value!r}; correct it, see docs/jobs.md")
        return value

    return check


def _list_of(kind: type, words: str) -> Callable[[str, object], Any]:
    def check(name: str, value: object) -> Any:
        if not isinstance(value, list) or not all(isinstance(each, kind) and not isinstance(each, bool) for each in value):
            raise ConfigError(f"{name} must be a list of {words}, got {value!r}; correct it, see docs/jobs.md")
        return tuple(value)

    return check


def _patterns(name: str, value: object) -> Any:
    return (value,) if isinstance(value, str) else _list_of(str, "texts")(name, value)


def _stretch(name: str, value: object) -> Any:
    """A word, or [low, high], each a number or a list of one for each band."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2:
        edges = [tuple(edge) if isinstance(edge, list) else edge for edge in value]
        numbers = [each for edge in edges for each in (edge if isinstance(edge, tuple) else (edge,))]
        if numbers and all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in numbers):
            return tuple(edges)
    raise ConfigError(
        f'{name} must be "auto", "percentile", "none" or [low, high], got {value!r}; correct it, see docs/jobs.md'
    )


_text = _of(str, words="a text")
_integer = _of(int, words="a whole number")
_number = _of(int, float, words="a number")
_switch = _of(bool, words="true or false")
_texts = _list_of(str, "texts")

# the job file's key -> the field of RunSettings
_SETTINGS = {
    "window": "window_px",
    "overlap": "overlap_px",
    "budget": "max_visual_tokens",
    "max_ram": "max_ram_bytes",
} | {
    field.name: field.name
    for field in dataclasses.fields(RunSettings)
    if field.name not in ("window_px", "overlap_px", "max_visual_tokens", "max_ram_bytes")
}

_KEYS: dict[str, Callable[[str, object], Any]] = {
    "scenes": _patterns,
    "output": _text,
    "mode": _text,
    "query": _text,
    "labels": _texts,
    "choices": _texts,
    "method": _text,
    "template": _text,
    "window": _integer,
    "overlap": _integer,
    "budget": _integer,
    "bands": _list_of(int, "whole numbers"),
    "stretch": _stretch,
    "tiling": _text,
    "max_tiles": _integer,
    "max_new_tokens": _integer,
    "query_aware": _switch,
    "deterministic": _switch,
    "max_ram": parse_bytes,
    "max_pixels": _integer,
    "allow_drivers": _texts,
    "allow_vsi": _switch,
    "formats": _texts,
    "checkpoint": _text,
    "backend": _text,
    "precision": _text,
    "micro_batch": _integer,
    "engine": _text,
    "workers": _integer,
    "ray_address": _text,
    "cpus": _number,
    "gpus": _number,
}
