"""Where Triton kernels run in a test: on a CUDA device, or in the interpreter, whose variable must be set before triton is imported.

A process that has neither does not collect `test_triton_*.py`; `test_interpreter.py` runs each of them in a process of its own.
"""

from __future__ import annotations

import pytest

try:
    import torch

    from rsvlm_infer.kernels.triton.launch import interpreting, triton_why_not
except ImportError:
    REASON: str | None = "torch is not installed"
else:
    REASON = triton_why_not()

collect_ignore_glob = [] if REASON is None else ["test_triton_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test want their tensors; skips with the reason when they cannot run."""
    if REASON is not None:
        pytest.skip(REASON)
    return torch.device("cpu" if interpreting() else "cuda")
