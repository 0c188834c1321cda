"""Conversions of one checkpoint into each peer's own format. Each module runs in that peer's environment and imports nothing of ours."""
