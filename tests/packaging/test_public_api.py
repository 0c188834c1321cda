"""The public surface is small and changes only on purpose: whoever changes it changes this snapshot."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect

import pytest

import rsvlm_infer

PUBLIC = ["RSVLM", "Answer", "Classification", "RsvlmConfig", "RsvlmError", "__version__", "open_scene", "plan_scene"]

METHODS = {
    "RSVLM": {
        "ask",
        "caption",
        "caption_many",
        "classify",
        "embed_image",
        "embed_text",
        "from_pretrained",
        "plan",
        "scene",
    },
}

ERRORS = {
    "ConfigError": ValueError,
    "InputError": ValueError,
    "ImageReadError": OSError,
    "CheckpointError": ValueError,
    "BackendError": RuntimeError,
    "MissingDependencyError": ImportError,
}


def test_public_names_are_the_snapshot() -> None:
    assert sorted(rsvlm_infer.__all__) == sorted(PUBLIC)
    assert len(PUBLIC) <= 10
    assert dir(rsvlm_infer) == sorted(PUBLIC)


def test_every_public_name_is_there() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    for name in PUBLIC:
        assert getattr(rsvlm_infer, name) is not None


def test_methods_that_users_meet() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    for name, methods in METHODS.items():
        public = {method for method, _ in inspect.getmembers(getattr(rsvlm_infer, name)) if not method.startswith("_")}
        assert methods <= public, f"{name} lacks {sorted(methods - public)}"


def test_an_unknown_name_is_explained() -> None:
    with pytest.raises(AttributeError, match="public names are"):
        rsvlm_infer.no_such_name  # noqa: B018


def test_version_is_the_installed_one() -> None:
    try:
        installed = importlib.metadata.version("rsvlm-infer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rsvlm-infer runs from the source tree, not installed")
    assert installed == rsvlm_infer.__version__


def test_one_exception_root_whose_children_are_builtins() -> None:
    errors = importlib.import_module("rsvlm_infer.errors")
    found = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.RsvlmError)}
    assert found == {"RsvlmError", *ERRORS}
    for name, builtin in ERRORS.items():
        assert issubclass(getattr(errors, name), (errors.RsvlmError, builtin))
        assert issubclass(getattr(errors, name), builtin)
