"""The command `rsvlm`. Owns arguments, output and exit codes; knows the pipeline, no model."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
