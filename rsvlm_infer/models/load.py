"""From a checkpoint folder to a model with its weights: layout, config, the generic loop, the delta. Knows no backend and no image.

`read_config` needs no torch; `load_checkpoint` does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RsvlmConfig
from ..errors import CheckpointError, MissingDependencyError
from .checkpoint import CheckpointFolder, open_weights, sha256_of
from .layouts import detect_layout
from .layouts.base import Weights
from .package import Package, is_package
from .weight_tables import RSVLM, Assignment, Rule, assign

if TYPE_CHECKING:
    import torch

    from .rsvlm import RsvlmModel

DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 1024  # the deepest public models have 126
_LISTED = 20  # names of each kind in one error message
_BLOCK = re.compile(r"vision_encoder\.blocks\.(\d+)\..*")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in eval mode, without gradients, and where it came from. `layout` is the name of the recognised format."""

    config: RsvlmConfig
    model: RsvlmModel
    folder: Path
    layout: str
    knowledge_folder: Path | None
    weight_files: tuple[Path, ...]
    verified: dict[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> dict[str, str]:
        """File name -> sha256 of config and weights; files that were verified while loading are not read again."""
        paths = (self.folder / "config.json", *self.weight_files)
        return {path.name: self.verified.get(path.name) or sha256_of(path) for path in paths if path.is_file()}

    @cached_property
    def embedder(self) -> str:
        """See `embedder_digest`; files that were verified while loading are not read again."""
        return _embedder_digest(self.config, self.weight_files, self.verified)


def read_config(path: str | Path) -> RsvlmConfig:
    """The config of any supported checkpoint folder, without torch and without its weights' content.

    Raises:
        CheckpointError: the folder is unknown or unsafe.
        ConfigError: the config asks for something that this model has not.
    """
    folder = CheckpointFolder.open(path)
    return detect_layout(folder).config(folder)


def embedder_digest(path: str | Path) -> str:
    """Hex sha256 that names how a checkpoint embeds text: of its weight files and its text template. Reads all weights.

    An exported package has the digest of its checkpoint: it embeds into the same space, as nearly as its certificate says.

    Raises:
        CheckpointError, ConfigError: see `read_config`.
    """
    if is_package(path):
        return Package.open(path).embedder
    folder = CheckpointFolder.open(path)
    layout = detect_layout(folder)
    config = layout.config(folder)
    return _embedder_digest(config, _weight_files(folder, layout.weights(folder, config)), {})


def load_checkpoint(path: str | Path, *, dtype: str = "float32", implementation: str = "eager") -> LoadedCheckpoint:
    """Loads a checkpoint folder of any supported layout.

    Args:
        path: the folder.
        dtype: "float32", "bfloat16" or "float16", applied to every weight.
        implementation: of the model's ops, see `RsvlmModel`.

    Raises:
        CheckpointError: unknown, unsafe or damaged; missing, unexpected and mis-shaped weights are reported at once.
        ConfigError: the config asks for something that this model has not.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"loading weights needs torch ({error}); pip install 'rsvlm-infer[torch]'") from None
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {DTYPES}, got {dtype!r}; choose one of them")
    folder = CheckpointFolder.open(path)
    layout = detect_layout(folder)
    config = layout.config(folder)
    verified = folder.verify()
    if is_package(path):
        raise CheckpointError(f'{path} is an exported package, which holds graphs and no weights to load; use backend "onnx"')
    _check_depth(config)
    weights = layout.weights(folder, config)
    with torch.inference_mode(False):  # a caller's inference mode would make weights that can never be trained
        model = _build_empty(config, folder.path, implementation)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        state = _read_state(folder, weights, config, expected, layout.hint)
        model.load_state_dict({name: value.to(getattr(torch, dtype)) for name, value in state.items()}, assign=True)
    model.requires_grad_(False)
    knowledge = folder.path / "knowledge"
    files = _weight_files(folder, weights)
    return LoadedCheckpoint(
        config, model.eval(), folder.path, layout.name, knowledge if knowledge.is_dir() else None, files, verified
    )


def _weight_files(folder: CheckpointFolder, weights: Weights) -> tuple[Path, ...]:
    return (*(file for file, _ in weights), *([folder.delta.weights] if folder.delta is not None else []))


def _embedder_digest(config: RsvlmConfig, files: Sequence[Path], known: Mapping[str, str]) -> str:
    template = "" if config.alignment is None else config.alignment.text_template
    digests = sorted({known.get(file.name) or sha256_of(file) for file in files})  # a file may be read by two tables
    return hashlib.sha256("\n".join([template, *digests]).encode()).hexdigest()


def _check_depth(config: RsvlmConfig) -> None:
    """A layer costs time and memory even without weights: an absurd depth would hang instead of failing."""
    for part in ("vision", "language", "text_encoder"):
        layers = getattr(getattr(config, part), "num_layers", 0)
        if layers > MAX_LAYERS:
            raise CheckpointError(f"config {part}.num_layers must be at most {MAX_LAYERS}, got {layers}; restore config.json")


def _build_empty(config: RsvlmConfig, folder: Path, implementation: str) -> RsvlmModel:
    """The model on the meta device: no memory and no random numbers, because every weight comes from a file."""
    import torch

    from .rsvlm import RsvlmModel

    try:
        with torch.device("meta"):
            return RsvlmModel(config, implementation)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]  # torch adds a C++ stack
        raise CheckpointError(
            f"config of checkpoint {folder} has sizes that no tensor can have ({reason}); restore config.json from its source"
        ) from None


class _Gaps:
    """Everything that is wrong with the weights, for one message."""

    def __init__(self) -> None:
        self.unexpected: list[str] = []
        self.misshaped: dict[str, str] = {}  # our name -> what is wrong
        self.twice: list[str] = []

    def report(self, folder: Path, missing: list[str], hint: str) -> None:
        misshaped = list(self.misshaped.values())
        kinds = {"missing": missing, "unexpected": self.unexpected, "mis-shaped": misshaped, "given twice": self.twice}
        parts = [
            f"{len(names)} {kind}: {', '.join(sorted(names)[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
            for kind, names in kinds.items()
            if names
        ]
        if parts:
            raise CheckpointError(f"weights of checkpoint {folder} do not fit its config: {'; '.join(parts)}; {hint}")


def _read_state(
    folder: CheckpointFolder, weights: Weights, config: RsvlmConfig, expected: dict[str, tuple[int, ...]], hint: str
) -> dict[str, torch.Tensor]:
    """All weights by our names, in the dtypes of their files, exactly the expected names and shapes."""
    gaps = _Gaps()
    state: dict[str, torch.Tensor] = {}
    for path, rules in weights:
        _read_file(path, rules, config, expected, state, gaps)
    if folder.delta is not None:
        changed: dict[str, torch.Tensor] = {}
        _read_file(folder.delta.weights, RSVLM, config, expected, changed, gaps)
        low_rank = {name: changed.pop(name) for name in list(changed) if name.endswith((".lora_a", ".lora_b"))}
        state.update(changed)
        _merge_low_rank(low_rank, state, gaps)
    missing = [name for name in expected if name not in state and name not in gaps.misshaped]
    gaps.report(folder.path, missing, hint)
    return state


def _read_file(
    path: Path,
    rules: Sequence[Rule],
    config: RsvlmConfig,
    expected: dict[str, tuple[int, ...]],
    state: dict[str, torch.Tensor],
    gaps: _Gaps,
) -> None:
    with open_weights(path, "pt") as file:
        assignments, unknown = assign(file.keys(), rules)
        gaps.unexpected.extend(unknown)
        for item in assignments:
            if not item.targets or all(_beyond_last_tap(target, config) for target in item.targets):
                continue
            low_rank = item.source.endswith((".lora_a", ".lora_b"))
            if not low_rank and any(target not in expected for target in item.targets):
                gaps.unexpected.append(item.source)
                continue
            tensor = file.get_tensor(item.source)
            if not tensor.is_floating_point():
                wrong = f"{item.source} (expected floating point, got {tensor.dtype})"
                gaps.misshaped.update(dict.fromkeys(item.targets, wrong))
                continue
            for target, part in zip(item.targets, _parts(tensor, item, expected), strict=True):
                if not low_rank and tuple(part.shape) != expected[target]:
                    shown = target if target == item.source else f"{item.source} -> {target}"
                    gaps.misshaped[target] = f"{shown} (expected {list(expected[target])}, got {list(part.shape)})"
                elif target in state:
                    gaps.twice.append(target)
                else:
                    state[target] = part


def _beyond_last_tap(name: str, config: RsvlmConfig) -> bool:
    match = _BLOCK.fullmatch(name)
    return match is not None and max(config.vision.taps) <= int(match[1]) < config.vision.num_layers


def _parts(tensor: torch.Tensor, item: Assignment, expected: dict[str, tuple[int, ...]]) -> list[torch.Tensor]:
    """The source tensor as its targets want it. What cannot be made to fit is returned as it is, and reported by its shape."""
    if item.how == "transpose" and tensor.ndim == 2:
        return [tensor.T.contiguous()]
    if item.how == "split3" and tensor.shape[0] % 3 == 0:
        return list(tensor.chunk(3))
    if item.how == "reshape" and tensor.numel() == _count(expected[item.targets[0]]):
        return [tensor.reshape(expected[item.targets[0]])]
    return [tensor] * len(item.targets)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _merge_low_rank(low_rank: dict[str, torch.Tensor], state: dict[str, torch.Tensor], gaps: _Gaps) -> None:
    """W += B @ A in fp32 for every pair X.lora_a [r, in], X.lora_b [out, r] and W = X.weight [out, in]."""
    for module in sorted({name.rpartition(".")[0] for name in low_rank}):
        a, b = low_rank.get(f"{module}.lora_a"), low_rank.get(f"{module}.lora_b")
        weight = state.get(f"{module}.weight")
        if a is None or b is None or weight is None:
            gaps.unexpected.extend(name for name in low_rank if name.rpartition(".")[0] == module)
        elif a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0] or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            shapes = f"[r, in] and [out, r] of {list(weight.shape)}, got {list(a.shape)} and {list(b.shape)}"
            gaps.misshaped[f"{module}.weight"] = f"{module}.lora_a and lora_b (expected {shapes})"
        else:
            state[f"{module}.weight"] = (weight.float() + b.float() @ a.float()).to(weight.dtype)
