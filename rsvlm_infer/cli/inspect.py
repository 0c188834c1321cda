"""Owns what `rsvlm info` and `rsvlm doctor` say. Knows checkpoint folders and this machine, runs no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import backends, hardware
from ..config import RsvlmConfig
from ..contract import ENGINES, MANIFEST
from ..errors import CheckpointError
from ..models.checkpoint import DELTA_FILE, CheckpointFolder, sha256_of
from ..models.layouts import detect_layout
from ..models.load import read_config
from ..models.package import Package, is_package
from ..pipeline import DEFAULT_NAME, default_checkpoint

PACKAGED_CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


@dataclass(frozen=True)
class Report:
    """The same facts for programs and for people."""

    values: dict[str, Any]
    text: str
    problem: str | None = None


def planning_config(checkpoint: Path | None) -> RsvlmConfig:
    """The config to plan with: of the given checkpoint, else of the pulled default, else the one that comes with the package.

    Planning needs no weights, so the packaged config makes the same plans as the default checkpoint.

    Raises:
        CheckpointError: no such folder. ConfigError: a bad config.
    """
    if checkpoint is not None:
        return read_config(_folder(checkpoint))
    pulled = default_checkpoint()
    if (pulled / "config.json").is_file():
        return read_config(pulled)
    return RsvlmConfig.from_json(PACKAGED_CHECKPOINTS / DEFAULT_NAME / "config.json")


def checkpoint_report(checkpoint: Path | None) -> Report:
    """Modules, config and files of a checkpoint, and how the files differ from its `delta.json`.

    Raises:
        CheckpointError: no such folder. ConfigError: a bad config.
    """
    folder = _folder(default_checkpoint() if checkpoint is None else checkpoint)
    if is_package(folder):
        return _package_report(Package.open(folder))
    opened = CheckpointFolder.open(folder)
    layout = detect_layout(opened)
    config = read_config(folder)
    files = _files(folder)
    total = sum(entry["bytes"] for entry in files)
    parts, choice = modules(config), backends.choose_backend(folder)
    lines = [
        f"checkpoint  {folder}",
        f"layout      {layout.name}",
        f"backend     {choice}",
        f"tiling      {config.tiling}",
        f"size        {_size(total)}",
    ]
    lines += _parts_and_files(parts, files)
    damaged = _damages(opened, {entry["file"]: entry["sha256"] for entry in files})
    if damaged:
        lines += ["", *(f"damaged: {damage}" for damage in damaged)]
    values = {
        "checkpoint": str(folder),
        "layout": layout.name,
        "auto_backend": dataclasses.asdict(choice),
        "modules": parts,
        "tiling": config.tiling,
        "bytes": total,
        "files": files,
        "damaged": damaged,
        "config": config.to_dict(),
    }
    problem = f"checkpoint {folder} is damaged: {'; '.join(damaged)}; run `rsvlm pull` again or restore the files"
    return Report(values, "\n".join(lines), problem if damaged else None)


def _files(folder: Path) -> list[dict[str, Any]]:
    return [
        {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _parts_and_files(parts: dict[str, str | None], files: list[dict[str, Any]]) -> list[str]:
    lines = ["", "modules", *(f"  {name:<13} {text or 'off'}" for name, text in parts.items())]
    return [*lines, "", "files", *(f"  {entry['sha256']}  {_size(entry['bytes']):>10}  {entry['file']}" for entry in files)]


def _package_report(package: Package) -> Report:
    """Precision, graphs, layers that were kept finer than asked, files and certificate of an exported package."""
    files, manifest = _files(package.path), package.manifest
    total = sum(entry["bytes"] for entry in files)
    parts, choice = modules(package.config), backends.choose_backend(package.path)
    finer = [layer for layer in manifest.get("layers", []) if layer.get("kept") != layer.get("asked")]
    lines = [
        f"package     {package.path}",
        f"kind        {manifest['kind']}, format version {manifest['version']}",
        f"backend     {choice}",
        f"precision   {package.precision}",
        f"model       {manifest.get('model', {}).get('sha256')}",
        f"tiling      {package.config.tiling}",
        f"size        {_size(total)}",
        f"certificate {_certificate_line(package)}",
    ]
    chips = dict.fromkeys(f"{entry['chip']} ({entry['library']} {entry['version']})" for entry in manifest.get(ENGINES, []))
    lines += [f"engines     {', '.join(chips)}"] if chips else []
    if "graphs" in manifest:
        lines += ["", "graphs", *(f"  {name}" for name in manifest["graphs"])]
    if finer:
        lines += ["", "layers kept finer", *(f"  {layer['name']:<24} {layer['kept']}" for layer in finer)]
    projection = manifest.get("calibration", {}).get("text_projection")
    if projection is not None:
        lines += ["", f"text projection {_projection_line(projection)}"]
    lines += _parts_and_files(parts, files)
    damaged = package.damages()
    if damaged:
        lines += ["", *(f"damaged: {damage}" for damage in damaged)]
    values = {
        "package": str(package.path),
        "manifest": manifest,
        "auto_backend": dataclasses.asdict(choice),
        "certificate": package.certificate,
        "modules": parts,
        "tiling": package.config.tiling,
        "bytes": total,
        "files": files,
        "damaged": damaged,
        "config": package.config.to_dict(),
    }
    problem = f"package {package.path} is damaged: {'; '.join(damaged)}; export it again with `rsvlm export`"
    return Report(values, "\n".join(lines), problem if damaged else None)


def _projection_line(projection: dict[str, Any]) -> str:
    """What became of the fit to rounded states, by the manifest."""
    turn = projection["turn"]
    if not projection["fitted"]:
        return f"of the checkpoint: fitting it did not help {projection['held_out']} held-out texts ({turn['before']:g} of 1 - cosine)"
    return f"fitted to {projection['texts']} texts: held-out ones turn by {turn['after']:g} (1 - cosine) instead of {turn['before']:g}"


def _certificate_line(package: Package) -> str:
    """Verdict and date, and whether the package is still the one that was verified."""
    values = package.certificate
    if values is None:
        return "none; run `rsvlm verify`"
    if values.get("manifest_sha256") != sha256_of(package.path / MANIFEST):
        return "of another package; run `rsvlm verify` again"
    failures = "; ".join(str(failure) for failure in values.get("failures", []))
    sample = values.get("sample", {})
    verdict = "passed" if values.get("passed") else f"FAILED, written by force: {failures}"
    return f"{verdict} ({values.get('date')}, {sample.get('images')} images of {sample.get('set')})"


def _damages(folder: CheckpointFolder, hashes: dict[str, str]) -> list[str]:
    """What `delta.json` says and the files do not, a line each; `hashes` is sha256 by file. Empty when there is none.

    The file is read here by hand, because `CheckpointFolder.delta` stops at the first missing file.
    """
    values = folder.read_json(DELTA_FILE)
    if values is None:
        return []
    named, parts = values.get("files"), values.get("base")
    expected: dict[Any, Any] = dict(named) if isinstance(named, dict) else {}
    expected[values.get("weights")] = values.get("sha256")
    beside = [part["file"] for part in parts if isinstance(part, dict) and "file" in part] if isinstance(parts, list) else []
    absent = sorted({name for name in (*expected, *beside) if isinstance(name, str) and name not in hashes})
    found = [f"{name} is missing, {DELTA_FILE} names it" for name in absent]
    found += [
        f"{name} has sha256 {hashes[name]}, {DELTA_FILE} says {digest}"
        for name, digest in expected.items()
        if name in hashes and isinstance(digest, str) and digest.lower() != hashes[name]
    ]
    if not found:
        try:
            _ = folder.delta
        except CheckpointError as error:
            found = [str(error)]
    return found


def modules(config: RsvlmConfig) -> dict[str, str | None]:
    """Each part of the model in a few words; None = off, which means absent."""
    vision, projector, language, text = config.vision, config.projector, config.language, config.text_encoder
    alignment, augmentation, experts = config.alignment, config.augmentation, config.experts
    found: dict[str, str | None] = dict.fromkeys(
        ("vision", "projector", "language", "text_encoder", "alignment", "augmentation", "experts")
    )
    found["vision"] = (
        f"{vision.family}, {vision.num_layers} layers, width {vision.hidden_size}, {vision.patch_size}-px patches, "
        f"taps {list(vision.taps)}"
    )
    if projector is not None:
        found["projector"] = f"width {projector.hidden_size}, pixel shuffle {projector.pixel_shuffle}"
    if language is not None:
        found["language"] = (
            f"{language.family}, {language.num_layers} layers, width {language.hidden_size}, context {language.max_positions}"
        )
    if text is not None:
        found["text_encoder"] = f"{text.num_layers} layers, width {text.hidden_size}"
    if alignment is not None:
        found["alignment"] = f"{', '.join(alignment.levels)}, width {alignment.embed_size}, text from {alignment.text_source}"
    if augmentation is not None:
        found["augmentation"] = f"{augmentation.cues_per_level} cues per level"
    if experts is not None:
        found["experts"] = f"{experts.num_experts} experts, top {experts.top_k}, {experts.kind}"
    return found


def doctor_report() -> Report:
    """This machine, the optional libraries, what can run, the default checkpoint, and the next steps."""
    machine = hardware.probe()
    reasons = {name: backends.why_not(name) for name in backends.BACKENDS}
    checkpoint = default_checkpoint()
    present = (checkpoint / "config.json").is_file()
    steps = [f"backend {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if machine.native_why_not is not None:
        steps.append(f"slower preprocessing: {machine.native_why_not}")
    if machine.libraries.get("rasterio") is None:
        steps.append('GeoTIFFs without georeference and windows: pip install "rsvlm-infer[geo]"')
    if not present:
        steps.append("no default checkpoint: rsvlm pull")
    values: dict[str, Any] = {
        "hardware": machine.to_dict(),
        "backends": {
            name: {"can_run": reason is None, "why_not": reason, "precisions": list(backends.BACKENDS[name])}
            for name, reason in reasons.items()
        },
        "checkpoint": {"path": str(checkpoint), "present": present},
        "next_steps": steps,
    }
    memory = _size(machine.memory_bytes) if machine.memory_bytes else "unknown"
    lines = [
        f"machine     {machine.cpu}, {machine.cores} cores, {memory} memory",
        f"            {' '.join(machine.flags) or 'no known CPU flags'}",
        f"system      {machine.system}, Python {machine.python}",
        f"native      {machine.native_why_not or 'rsvlm_infer._C is there'}",
        f"checkpoint  {checkpoint} {'is there' if present else 'is absent'}",
        "",
        "backends",
    ]
    lines += [
        f"  {name:<14} {'can run: ' + ', '.join(backends.BACKENDS[name]) if reason is None else 'cannot run: ' + reason}"
        for name, reason in reasons.items()
    ]
    lines += ["", "libraries"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in machine.libraries.items()]
    lines += ["", "next steps", *(f"  {step}" for step in steps or ["none: everything is ready"])]
    return Report(values, "\n".join(lines))


def _folder(checkpoint: Path) -> Path:
    folder = checkpoint.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist; pass a checkpoint folder, or run `rsvlm pull`")
    return folder


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
