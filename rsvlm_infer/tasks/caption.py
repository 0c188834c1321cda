"""Owns the caption prompt. The recipe that trains the default checkpoint imports it, so that both say the same words."""

from __future__ import annotations

CAPTION_PROMPT = "Describe this remote sensing image in one sentence."
