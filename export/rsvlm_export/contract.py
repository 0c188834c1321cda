"""The contract of a package, under the name that exporters use.

It is defined in `rsvlm_infer.contract`, because the backend that reads packages needs it and may not import this package.
"""

from __future__ import annotations

from rsvlm_infer.contract import (
    ARCHITECTURE,
    CERTIFICATE,
    DOMAIN,
    FORMAT,
    FORMAT_VERSION,
    GRAPHS,
    MANIFEST,
    PRECISIONS,
    GraphContract,
    TensorContract,
    cache_names,
    cue_names,
    graph_contracts,
    tap_names,
)

__all__ = [
    "ARCHITECTURE",
    "CERTIFICATE",
    "DOMAIN",
    "FORMAT",
    "FORMAT_VERSION",
    "GRAPHS",
    "MANIFEST",
    "PRECISIONS",
    "GraphContract",
    "TensorContract",
    "cache_names",
    "cue_names",
    "graph_contracts",
    "tap_names",
]
