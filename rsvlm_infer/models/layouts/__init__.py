"""Which checkpoint formats exist. Owns the registry; a new model family is one file here and one line in `LAYOUTS`."""

from __future__ import annotations

from ...errors import CheckpointError
from ..checkpoint import CheckpointFolder
from . import clip, hf_llava, hf_vision, original_llava, rsvlm
from .base import Layout, model_type

LAYOUTS: tuple[Layout, ...] = (
    rsvlm.LAYOUT,
    original_llava.LAYOUT,
    hf_llava.LAYOUT,
    hf_vision.LAYOUT,
    clip.HF_LAYOUT,
    clip.OPEN_CLIP_LAYOUT,  # last: without a config.json it is recognised by its weight names
)


def detect_layout(folder: CheckpointFolder) -> Layout:
    """The first layout that recognises the folder.

    Raises:
        CheckpointError: none does.
    """
    for layout in LAYOUTS:
        if layout.matches(folder):
            return layout
    known = [layout.name for layout in LAYOUTS]
    raise CheckpointError(
        f"checkpoint {folder.path} has an unknown layout (model_type {model_type(folder)!r}); known are {known}; "
        "pass a folder with config.json of one of them"
    )


__all__ = ["LAYOUTS", "Layout", "detect_layout"]
