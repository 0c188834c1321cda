"""This project's own format: `model_type` "rsvlm", our names, perhaps a delta. Knows no foreign name."""

from __future__ import annotations

from ...config import RsvlmConfig
from ..weight_tables import RSVLM
from .base import Layout, model_type, one_table

LAYOUT = Layout(
    name="rsvlm",
    matches=lambda folder: model_type(folder) == "rsvlm",
    config=lambda folder: RsvlmConfig.from_dict(folder.config or {}),
    weights=lambda folder, config: one_table(folder, RSVLM),
    hint="run `rsvlm pull` again, or correct config.json",
)
