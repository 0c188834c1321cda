"""_C.pyi says what _C has: same functions, same keywords in the same order, all keyword-only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rsvlm_infer.hardware import native_why_not

pytestmark = pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))


def stub_signatures(path: Path) -> dict[str, list[str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert all(not node.args.args and not node.args.posonlyargs for node in functions), "every argument is keyword-only"
    return {node.name: [argument.arg for argument in node.args.kwonlyargs] for node in functions}


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
        first_line = (getattr(_C, name).__doc__ or "").splitlines()[0]  # pybind11 writes the signature there
        match = re.fullmatch(r"(\w+)\((.*)\) -> .*", first_line)
        assert match, first_line
        arguments = [argument.split(":")[0] for argument in split_arguments(match.group(2))]
        assert arguments == [] or arguments[0] == "*", f"{name} takes positional arguments: {first_line}"
        signatures[name] = arguments[1:]
    return signatures


def test_stub_equals_the_extension(repository: Path) -> None:
    assert stub_signatures(repository / "rsvlm_infer" / "_C.pyi") == built_signatures()
