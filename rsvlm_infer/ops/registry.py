"""Which implementation of an op runs here. Knows op names and where implementations live, nothing of what they compute.

`rsvlm_infer.ops.<op>.<op>` is the eager definition, the oracle and the fallback.
`rsvlm_infer.kernels.<implementation>.<op>` holds the fast twin with the same signature and `why_not() -> str | None`,
the reason why it cannot run on this machine (None = it can).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ..errors import BackendError

_log = logging.getLogger(__name__)

# op -> implementations in order of preference, before eager. Preference is data; capability is each twin's why_not().
OPS: dict[str, tuple[str, ...]] = {
    "complexity_map": ("native",),
    "cell_means": ("native",),
    "pack_tiles": ("native",),
    "cue_search": ("native",),
    "varlen_tile_attention": ("triton", "native"),
    "route": ("triton", "native"),
    "grouped_experts": ("triton", "native"),
    "level_experts": ("triton", "native"),
    "rms_norm": ("triton", "native"),
    "rope": ("triton", "native"),
    "decode_attention": ("triton", "native"),
    "weight_matmul": ("triton", "native"),
}
# implementation -> the kind of device whose tensors it is made for; eager takes all. Triton's interpreter reads CPU tensors too, but
# as a proof that is asked for by name, never as a choice.
SERVES: dict[str, str] = {"triton": "cuda", "native": "cpu"}


def why_not(op: str, implementation: str) -> str | None:
    """Why `implementation` of `op` cannot run here; None when it can.

    Raises:
        BackendError: the op or the implementation does not exist.
    """
    if op not in OPS:
        raise BackendError(f"op must be one of {sorted(OPS)}, got {op!r}; correct the name")
    if implementation == "eager":
        return None
    if implementation not in OPS[op]:
        raise BackendError(
            f"implementation of {op} must be one of {['eager', *OPS[op]]}, got {implementation!r}; choose one of them"
        )
    reason: str | None = _module(op, implementation).why_not()
    return reason


@cache
def resolve(op: str, implementation: str = "auto") -> Callable[..., Any]:
    """The function that computes `op`.

    A named implementation holds or raises. `auto` is decided by where the tensors are, see `choose`: the function looks at the
    device of its first argument at every call, so it stays right when a model moves after it was built.

    Raises:
        BackendError: unknown names, or a named implementation that cannot run here.
    """
    if implementation != "auto":
        reason = why_not(op, implementation)
        if reason is not None:
            raise BackendError(f"implementation {implementation!r} of {op} cannot run here: {reason}; use 'eager' or 'auto'")
        return _function(op, implementation)
    why_not(op, "eager")  # raises for an unknown op
    if all(SERVES[name] == "cpu" for name in OPS[op]):  # its arguments may be arrays, which know no device
        return choose(op, "cpu")
    return partial(_by_device, op)


@cache
def choose(op: str, device: str) -> Callable[..., Any]:
    """What `auto` means for tensors on a kind of device: the first implementation that serves it and can run, else eager.

    Logs once per op and device why a preferred one cannot run. Knows no dtype: a twin that lacks one says so when it is called.

    Args:
        device: a torch device type, such as "cpu" or "cuda".

    Raises:
        BackendError: an unknown op.
    """
    why_not(op, "eager")  # raises for an unknown op
    reasons = []
    chosen = "eager"
    for name in OPS[op]:
        if SERVES[name] != device:
            continue
        reason = why_not(op, name)
        if reason is None:
            chosen = name
            break
        reasons.append(f"{name} cannot run here ({reason})")
    if reasons:
        _log.info("%s: %s, using %s", op, ", ".join(reasons), chosen)
    return _function(op, chosen)


def _by_device(op: str, first: Any, *others: Any, **named: Any) -> Any:
    """Every op that has a twin for a device takes a tensor first."""
    return choose(op, first.device.type)(first, *others, **named)


def _module(op: str, implementation: str) -> Any:
    package = "rsvlm_infer.ops" if implementation == "eager" else f"rsvlm_infer.kernels.{implementation}"
    return importlib.import_module(f"{package}.{op}")


def _function(op: str, implementation: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_module(op, implementation), op)
    return function
