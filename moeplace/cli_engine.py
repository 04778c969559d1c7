"""The command for engines: `moeplace warm`."""

import logging
import subprocess
import sys
from typing import Annotated

import typer

from moeplace.cli_answers import write, write_json
from moeplace.cli_options import INTERNAL, AsJson

logger = logging.getLogger(__name__)
_CHECK = "from moeplace.integrations.planner import cached; raise SystemExit(0 if cached() else 3)"


def warm(
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compile nothing, only say whether it is done.")
    ] = False,
) -> None:
    """Compile the kernels of the policies that run inside engines.

    Once after installation, as the user and on the kind of machine that serves: an engine's
    process never compiles. Ends with 1 if a new process does not find the kernels.
    """
    if not check:
        from moeplace.integrations.planner import warm as compile_all

        compile_all()
    done = subprocess.run([sys.executable, "-c", _CHECK], check=False).returncode == 0
    if as_json:
        write_json({"cached": done})
    else:
        write(
            "Kernels are in the cache: engines plan with them.\n"
            if done
            else "A new process does not find the kernels: engines plan without them. Set "
            "NUMBA_CACHE_DIR to a folder that lasts, for this command and for the engine.\n"
        )
    if not done:
        raise typer.Exit(INTERNAL)


def add_commands(app: typer.Typer) -> None:
    """Add the command to the app, once."""
    from moeplace.cli_options import example

    if warm not in {command.callback for command in app.registered_commands}:
        app.command(epilog=example("warm"))(warm)
