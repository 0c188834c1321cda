"""_C.pyi says what _C has: same functions, same arguments in the same order, keyword-only but for the calls of every layer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rsvlm_infer.hardware import native_why_not

# Called several times per layer and token, where keywords would cost as much as the call.
POSITIONAL = {"WeightMatmul.float32", "WeightMatmul.bfloat16"}

pytestmark = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))


def stub_signatures(path: Path) -> dict[str, list[str]]:
    """Functions by name, methods by Class.name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    signatures = {}
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        prefix, implied = ("", []) if isinstance(scope, ast.Module) else (f"{scope.name}.", ["self"])
        for node in scope.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                arguments = [argument.arg for argument in node.args.posonlyargs + node.args.args]
                named = [argument.arg for argument in node.args.kwonlyargs]
                if prefix + node.name in POSITIONAL:
                    arguments, named = arguments[: len(implied)], arguments[len(implied) :]
                assert arguments == implied, f"every argument of {prefix}{node.name} is keyword-only"
                signatures[prefix + node.name] = named
    return signatures


def split_arguments(text: str) -> list[str]:
    """Splits at the commas that are outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def built_signatures() -> dict[str, list[str]]:
    from rsvlm_infer import _C

    signatures = {}
    for name in dir(_C):
        if name.startswith("_"):
            continue
        item = getattr(_C, name)
        methods = {name: item}
        if isinstance(item, type):
            methods = {
                f"{name}.{key}": value
                for key, value in vars(item).items()
                if callable(value) and (not key.startswith("_") or key == "__init__")
            }
        for key, function in methods.items():
            first_line = (function.__doc__ or "").splitlines()[0]  # pybind11 writes the signature there
            match = re.fullmatch(r"(\w+)\((.*)\) -> .*", first_line)
            if key.endswith(".__init__") and match is None:
                continue  # a class that only C++ makes
            assert match, first_line
            arguments = [argument.split(":")[0] for argument in split_arguments(match.group(2))]
            arguments = arguments[1:] if isinstance(item, type) else arguments
            if key in POSITIONAL:
                arguments = ["*", *arguments]
            assert arguments == [] or arguments[0] == "*", f"{key} takes positional arguments: {first_line}"
            signatures[key] = arguments[1:]
    return signatures


def test_stub_equals_the_extension(repository: Path) -> None:
    assert stub_signatures(repository / "rsvlm_infer" / "_C.pyi") == built_signatures()
