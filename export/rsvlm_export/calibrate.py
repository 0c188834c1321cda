"""What goes through every Linear of a model while it captions images: sums for compensation, rows for measuring. Knows no rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.errors import InputError, RsvlmError
from rsvlm_infer.evaluation.datasets import read_rsicd
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.text.tokenizer import Tokenizer

from .linears import Linear

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
KEPT_CALLS = 4  # calls whose inputs are kept for measuring errors
HELD_OUT = 3  # every third call is kept, until there are enough, and fits nothing: an error on fitted rows would flatter
KEPT_ROWS = 256  # of each kept call
NEW_TOKENS = 24  # a caption's length: decode steps see other activations than the prompt
TOGETHER = 8  # images of a batch: eager decode steps cost nearly the same for eight rows as for one
WORDS = ("an airport", "a dense forest", "a harbor with many ships", "green farmland beside a river")


@dataclass
class Seen:
    """Inputs of one Linear: Σ x·xᵀ [in, in] of what may be fitted, where it is wanted, and rows of calls that were held out."""

    hessian: npt.NDArray[np.float64] | None
    count: int = 0
    calls: list[npt.NDArray[np.float32]] = field(default_factory=list)
    first: npt.NDArray[np.float32] | None = None

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        several = len(rows) > TOGETHER  # prompts and images rather than steps
        if several:
            self.count += 1
        if several and self.count % HELD_OUT == 0 and len(self.calls) < KEPT_CALLS:
            self.calls.append(_some(rows))
            return
        if self.first is None:
            self.first = _some(rows)
        if self.hessian is not None:
            self.hessian += rows.T @ rows

    @property
    def measured(self) -> list[npt.NDArray[np.float32]]:
        """Rows to measure errors on: held-out ones, or the first call's where there were too few."""
        return self.calls or ([] if self.first is None else [self.first])


def _some(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows[:: max(1, len(rows) // KEPT_ROWS)][:KEPT_ROWS].copy()


def find_images(path: Path, limit: int) -> list[Path]:
    """At most `limit` images of a file or folder, evenly spread over its sorted names; of RSICD only its train split.

    Raises:
        InputError: there are none.
    """
    if (path / "captions.json").is_file():  # the split that a package is verified on must not be fitted
        files = [image.path for image in read_rsicd(path, "train") if image.path.is_file()]
    elif path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(
            f"--calibrate must name an image or a folder of images, {path} has none; pass images of the kind to be seen"
        )
    return [files[index * len(files) // min(limit, len(files))] for index in range(min(limit, len(files)))]


def watch(
    model: RsvlmModel,
    linears: Iterable[Linear],
    with_hessian: Callable[[Linear], bool],
    run: Callable[[], None],
) -> dict[str, Seen]:
    """Runs something and returns what each Linear saw, by its name. Linears that were never reached are absent."""
    seen: dict[str, Seen] = {}
    modules = dict(model.named_modules())
    handles = []

    def taker(linear: Linear) -> Callable[[Any], None]:
        def take(value: Any) -> None:
            rows = value.detach().float().reshape(-1, value.shape[-1]).cpu().numpy()
            if linear.name not in seen:
                side = rows.shape[1]
                seen[linear.name] = Seen(np.zeros((side, side)) if with_hessian(linear) else None)
            seen[linear.name].add(rows)

        return take

    for linear in linears:
        module, take = modules[linear.probe], taker(linear)
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, inputs, take=take: take(inputs[0])))
        else:  # a tied head has no module of its own: its input is what the final norm gives
            handles.append(module.register_forward_hook(lambda _, inputs, output, take=take: take(output)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def caption_images(model: RsvlmModel, folder: Path, images: list[Path], report: Callable[[int], None]) -> None:
    """Captions images with the float32 model and embeds what it said and some words; a retrieval model embeds images.

    report: takes the number of images done.

    Raises:
        InputError: no image can be read.
    """
    rsvlm = RSVLM(EagerBackend(model), Tokenizer.from_folder(folder))
    texts: list[str] = list(WORDS)
    read = 0
    reason = ""
    for start in range(0, len(images), TOGETHER):
        batch = images[start : start + TOGETHER]
        if model.language_model is not None:
            for answer in rsvlm.caption_many(batch, batch_size=TOGETHER, max_new_tokens=NEW_TOKENS):
                read += answer.error is None
                reason = str(answer.error or reason)
                if answer.error is None and answer.text.strip():
                    texts.append(answer.text.strip())
        else:
            for image in batch:
                try:
                    rsvlm.embed_levels(image)
                    read += 1
                except RsvlmError as error:
                    reason = str(error)
        report(start + len(batch))
    if not read:
        raise InputError(
            f"--calibrate needs an image that can be read, none of {len(images)} can ({reason}); pass other images"
        )
    if model.alignment is not None:
        for start in range(0, len(texts), TOGETHER):
            rsvlm.embed_text(texts[start : start + TOGETHER])
