"""Every command of the app, none exempt: its help, its example, and what a shell completes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from moeplace import cli
from tests.test_cli import ROOT, Run, plain_terminal, process, run

__all__ = ["plain_terminal", "run"]  # fixtures

#: Say with their exit code and their file alone what is to be known.
WRITE_FILES = {"solve", "loads", "migrate", "watch", "report", "bench", "calibrate", "reproduce"}
#: Write a file, and hardly a word besides.
WITHOUT_JSON = {"export"}


def tree(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """All commands under one, by the words that call them."""
    found = {path: command} if path else {}
    for name, one in getattr(command, "commands", {}).items():
        found |= tree(one, (*path, name))
    return found


cli.add_all_commands()
COMMANDS = tree(get_command(cli.app))


def test_the_tree_holds_every_module_of_commands() -> None:
    known = {one.callback.__module__ for one in COMMANDS.values()}
    modules = {f"moeplace.{path.stem}" for path in (ROOT / "moeplace").glob("cli*.py")}
    adding = {name for name in modules if "app: typer.Typer" in source(name)}
    assert adding <= known
    assert len(COMMANDS) >= 19


def source(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_has_an_example_that_is_accepted(
    run: Run, path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = run(*path, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.split("\n"))) <= 80
    assert "\x1b" not in answer.out
    text = re.search(r"\n  Example:\n((?: {4,}.+\n)+)", answer.out)
    assert text, answer.out
    typed = shlex.split(text[1].replace("\\\n", " "))
    assert tuple(typed[: 1 + len(path)]) == ("moeplace", *path)
    COMMANDS[path].make_context(path[-1], typed[1 + len(path) :])  # refuses unknown options
    for word in typed:
        if word.startswith("instances/"):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_is_explained_and_answers_can_be_read_by_machines(
    path: tuple[str, ...],
) -> None:
    command = COMMANDS[path]
    options = {name for parameter in command.params for name in parameter.opts}
    for parameter in command.params:
        assert getattr(parameter, "help", None), (path, parameter.name)
    assert ("--json" in options) == (path[0] not in WITHOUT_JSON)
    assert ("--quiet" in options) == (path[0] in {*WRITE_FILES, "certify"})
    assert command.help
    assert len(command.help.split("\n\n")[0]) <= 100


def test_every_command_is_in_the_overview(run: Run) -> None:
    text = run("--help").out
    assert max(map(len, text.split("\n"))) <= 80
    for path in COMMANDS:
        assert re.search(rf"^  {path[0]}  ", text, re.MULTILINE)


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str, count: int) -> list[str]:
        asked = {"_MOEPLACE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        found = process(env=asked | {"COMP_CWORD": str(count)})
        assert found.returncode == 0
        return found.stdout.decode().split()

    assert completed("moeplace s", 1) == ["solve", "simulate"]
    assert {path[0] for path in COMMANDS} == set(completed("moeplace ", 1))
    assert "--certificate" in completed("moeplace solve --c", 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed(shell: str, tmp_path: Path) -> None:
    alone = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = process("--show-completion", shell, env=alone)
    assert shown.returncode == 0
    assert b"_MOEPLACE_COMPLETE=complete_" + shell.encode() in shown.stdout
    done = process("--install-completion", shell, env=alone)
    assert done.returncode == 0
    assert b"completion installed" in done.stdout
    assert any(path.is_file() for path in tmp_path.rglob("*moeplace*"))
