"""The one exception tree. Knows no other module.

Every message names the argument, the expectation, the value that came, and the next step.
Each child is also the builtin that a caller would expect to catch.
"""

from __future__ import annotations


class RsvlmError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(RsvlmError, ValueError):
    """A config file or config object is unknown, incomplete or contradicts itself."""


class InputError(RsvlmError, ValueError):
    """An argument of a public call is out of its contract."""


class ImageReadError(RsvlmError, OSError):
    """An image cannot be read: missing, damaged, unsupported or too large."""


class CheckpointError(RsvlmError, ValueError):
    """A checkpoint folder is incomplete, damaged, unsafe or does not fit its config."""


class BackendError(RsvlmError, RuntimeError):
    """A backend, an implementation or a precision was asked for and cannot run here."""


class MissingDependencyError(RsvlmError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""
