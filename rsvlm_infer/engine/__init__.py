"""Generation: token ids and arrays in, tokens out. Knows no text and no raster."""

from __future__ import annotations

from .engine import Engine
from .request import ChoiceScores, Request, TokenEvent

__all__ = ["ChoiceScores", "Engine", "Request", "TokenEvent"]
