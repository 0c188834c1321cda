"""This project's own format: `model_type` "rsvlm", our names, perhaps a delta. Knows no foreign name."""

from __future__ import annotations

from ...config import RsvlmConfig
from ..checkpoint import CheckpointFolder
from ..weight_tables import RSVLM
from .base import Layout


def _config(folder: CheckpointFolder) -> RsvlmConfig:
    return RsvlmConfig.from_dict(folder.config or {})


LAYOUT = Layout(
    name="rsvlm",
    matches=lambda folder: (folder.config or {}).get("model_type") == "rsvlm",
    config=_config,
    rules=lambda config: RSVLM,
    hint="run `rsvlm pull` again, or correct config.json",
)
