"""Fits a native package's text projection to the states that its runtime gives for sentences. Knows no image and no rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.models.load import LoadedCheckpoint
from rsvlm_infer.tasks.retrieve import text_ids
from rsvlm_infer.text.tokenizer import Tokenizer

from .native import INT8_INPUTS, LanguagePlan, in_memory
from .text_projection import NAME, TextProjection, turn

TOGETHER = 64  # texts of a batch, of like length


def refit_projection(
    loaded: LoadedCheckpoint, precision: str, plan: LanguagePlan | None, fitted: Sequence[str], held_out: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The projection's parameters for a package, by their names in a checkpoint, and what the manifest says of them.

    The runtime's own arithmetic gives the states, in float32 for the exact ones: there it errs by less than 1e-5. Where the fit does
    not turn held-out sentences less than the checkpoint's projection does, there are no parameters: few sentences may not suffice.

    Args:
        fitted, held_out: sentences; neither is empty.
    """
    assert loaded.model.alignment is not None
    tokenizer = Tokenizer.from_folder(loaded.folder)
    ids = [text_ids(tokenizer, loaded.config, sentence) for sentence in (*fitted, *held_out)]
    exact = _states(in_memory(loaded, "fp32"), ids)
    own = _states(in_memory(loaded, precision, plan, INT8_INPUTS), ids)
    before = TextProjection.of(loaded.model.alignment)
    after = before.refitted(exact[: len(fitted)], own[: len(fitted)]).stored()
    measured = exact[len(fitted) :], own[len(fitted) :]
    truth = before.embed(measured[0])
    turns = {"before": turn(truth, before.stored().embed(measured[1])), "after": turn(truth, after.embed(measured[1]))}
    taken = turns["after"] < turns["before"]
    notes = {
        "name": NAME,
        "fitted": taken,
        "texts": len(fitted),
        "held_out": len(held_out),
        "turn": {name: float(f"{value:.4g}") for name, value in turns.items()},
    }
    return (dict(after.state()) if taken else {}), notes


def _states(backend: NativeBackend, ids: Sequence[npt.NDArray[np.int32]]) -> Tensor:
    """[n, D] after each text's last token."""
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(ids)
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        for place, state in zip(places, backend.text_states([ids[place] for place in places]), strict=True):
            found[place] = state
    return torch.from_numpy(np.stack(found))
