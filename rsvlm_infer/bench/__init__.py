"""The bench: how fast, how large and how right each backend is. Owns the command `rsvlm bench`; imports its parts when called."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Runs `rsvlm bench`; `argv` without the command's name, None takes the process's own.

    Returns 0 ok, 1 error or violated rule, 2 usage, 3 when some rows failed.
    """
    from .command import run

    return run(argv)


__all__ = ["main"]
