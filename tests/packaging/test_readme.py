"""What the documents tell a user to type exists: make targets, rsvlm commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def shell_lines(document: Path) -> list[str]:
    """Lines of the fenced shell blocks, prompts and comments taken off, continued lines joined."""
    if not document.exists():
        pytest.fail(f"{document.name} is missing")
    blocks = re.findall(r"```(?:bash|sh|console|shell)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in text.splitlines() if line.strip()]


def commands(document: Path, program: str) -> list[list[str]]:
    """Arguments of each call of `program` in the document's shell blocks."""
    calls = []
    for line in shell_lines(document):
        for part in re.split(r"&&|\|\||[|;]", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value before the program
                words = words[1:]
            if words and words[0].rsplit("/", 1)[-1] == program:
                calls.append(words[1:])
    return calls


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for arguments in commands(document, "make"):
        named = [argument for argument in arguments if not argument.startswith("-") and "=" not in argument]
        assert set(named) <= targets, f"make {' '.join(arguments)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_rsvlm_commands_and_options_exist(document: Path) -> None:
    import typer.main

    from rsvlm_infer.bench.command import parser as bench_parser
    from rsvlm_infer.cli.app import app

    group = typer.main.get_command(app)
    for arguments in commands(document, "rsvlm"):
        words = [argument for argument in arguments if not argument.startswith("-")]
        if not words:
            continue
        known = group.commands  # type: ignore[attr-defined]
        assert words[0] in known, f"rsvlm {' '.join(arguments)}"
        command = known[words[0]]
        used = {argument.split("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)}
        if words[0] == "bench":  # which has its own parser, as pull has
            own = {option for action in bench_parser()._actions for option in action.option_strings}
            assert used <= own, f"rsvlm {' '.join(arguments)}: unknown {sorted(used - own)}"
            continue
        if command.context_settings.get("ignore_unknown_options"):
            continue
        if hasattr(command, "commands"):  # a group, as `rsvlm kb`
            assert words[1:2], f"rsvlm {' '.join(arguments)}: names no command of {words[0]}"
            assert words[1] in command.commands, f"rsvlm {' '.join(arguments)}"
            command = command.commands[words[1]]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
            "--help"
        }
        assert used <= options, f"rsvlm {' '.join(arguments)}: unknown {sorted(used - options)}"


def test_readme_names_the_two_commands() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "make bench" in readme
    assert "make test" in readme
