"""Hooks of the documentation site: what is generated from the code and from instances/README."""

import contextlib
import io
from pathlib import Path
from typing import Any

COMMANDS, NAMES, SCHEMA = "<!-- commands:", "<!-- names:", "<!-- schema:"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated."""
    if COMMANDS in markdown:
        return markdown[: markdown.index(COMMANDS)] + commands()
    if NAMES in markdown:
        return markdown[: markdown.index(NAMES)] + names()
    if SCHEMA in markdown:
        return markdown[: markdown.index(SCHEMA)] + schema()
    return markdown


def commands() -> str:
    """Help of every command."""
    from typer.main import get_command

    from moeplace import cli

    said(["--help"])  # adds all commands
    known = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]
    return "".join(f"## {name}\n\n```text\n{said([name, '--help'])}```\n\n" for name in known)


def schema() -> str:
    """Every field of an instance file."""
    text = (Path(__file__).parent / "instances/README.md").read_text(encoding="utf-8")
    return text.split("## Schema\n", 1)[1].split("\n## ", 1)[0]


def said(arguments: list[str]) -> str:
    """What the command prints."""
    from moeplace.cli import main

    out = io.StringIO()
    out.reconfigure = lambda **_: None  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(arguments)
    return out.getvalue().rstrip("\n") + "\n"


def names() -> str:
    """Every public name, for mkdocstrings."""
    import moeplace

    return "".join(f"::: moeplace.{name}\n\n" for name in moeplace.__all__ if name != "EMPTY")
