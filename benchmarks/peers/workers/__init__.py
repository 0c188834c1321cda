"""One process per peer and precision. Each module but `ours` runs in its peer's environment and imports nothing of ours."""
