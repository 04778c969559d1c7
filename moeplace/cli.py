"""The `moeplace` command.

Answers go to stdout, everything else (errors, progress) to stderr. Exit codes: 0 done, 1 internal
failure, 2 bad input, 3 proven infeasible, 4 no plan found in time, 5 certificate refused, 130
interrupted (the plan so far is written).
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from moeplace import (
    __version__,
    cli_bench,
    cli_engine,
    cli_files,
    cli_fit,
    cli_migrate,
    cli_price,
    cli_replay,
    cli_report,
    cli_reproduce,
    cli_simulate,
    cli_solve,
    cli_watch,
    cli_whatif,
)
from moeplace.cli_answers import error, write
from moeplace.cli_options import BAD_INPUT, INTERNAL, INTERRUPTED, OK, REFUSED
from moeplace.errors import (
    CertificateError,
    FormatError,
    MoeplaceError,
    PlanError,
    ProblemError,
)
from moeplace.tables import WIDTH

EXIT_CODES = """Exit codes: 0 done, 1 internal or replay failure, 2 bad input, 3 proven
infeasible, 4 no plan found in time, 5 certificate refused, 130 interrupted (the plan so far is
written). MOEPLACE_DEBUG=1 shows tracebacks."""

app = typer.Typer(
    name="moeplace",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    help="Place the experts of Mixture-of-Experts models on GPUs, with a proven bound.",
    epilog=EXIT_CODES,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        write(f"moeplace {__version__}\n")
        raise typer.Exit(OK)
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n", sys.stderr)
        raise typer.Exit(BAD_INPUT)


def add_all_commands() -> None:
    """Add the commands of all modules, once, in the order of the help."""
    for module in (
        cli_solve,
        cli_price,
        cli_files,
        cli_fit,
        cli_replay,
        cli_migrate,
        cli_watch,
        cli_whatif,
        cli_engine,
        cli_report,
        cli_bench,
        cli_simulate,
        cli_reproduce,
    ):
        module.add_commands(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (by default `sys.argv`) and exit with its code."""
    add_all_commands()
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is escaped
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    with _ended_as_by_ctrl_c():
        code = _guarded(lambda: app(args=arguments, prog_name="moeplace", standalone_mode=False))
    sys.exit(code)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Take the first SIGTERM (`timeout`, a batch system) and SIGHUP (a closed terminal) for Ctrl-C.

    So the plan so far is written, and solvers and temporary files are not left behind. Not under
    torchrun, where a rank may wait for others that have ended, and not if they are ignored
    (nohup); a second signal ends the process at once.
    """
    names = ("SIGTERM", "SIGHUP")
    kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [kind for kind in kinds if signal.getsignal(kind) == signal.SIG_DFL]
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or "WORLD_SIZE" in os.environ:
        taken = []

    def interrupt(kind: int, _: object) -> None:
        signal.signal(kind, signal.SIG_DFL)
        raise KeyboardInterrupt

    for kind in taken:
        signal.signal(kind, interrupt)
    try:
        yield
    finally:
        for kind in taken:
            signal.signal(kind, signal.SIG_DFL)


def _guarded(run: Callable[[], Any]) -> int:
    """Exit code of a run, with one clean message for whatever it raises."""
    try:
        code = run()
        if code == INTERRUPTED:
            error("interrupted")
        return code if isinstance(code, int) else OK
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else INTERNAL
    except (KeyboardInterrupt, typer.Abort):
        error("interrupted")
        return INTERRUPTED
    except (ProblemError, PlanError, FormatError) as cause:
        return _failed(cause, str(cause), BAD_INPUT)
    except CertificateError as cause:
        return _failed(cause, str(cause), REFUSED)
    except MoeplaceError as cause:
        return _failed(cause, str(cause), INTERNAL)
    except MemoryError as cause:
        return _failed(cause, "out of memory: the instance is too large for this machine", INTERNAL)
    except OSError as cause:
        return _failed(cause, f"the operating system refused: {cause}", INTERNAL)
    except Exception as cause:
        # Usage errors of typer, whose classes moved between versions.
        if hasattr(cause, "format_message") and hasattr(cause, "exit_code"):
            hint = "See moeplace --help."
            return _failed(cause, f"{cause.format_message().rstrip('.')}. {hint}", BAD_INPUT)
        return _failed(
            cause,
            f"unexpected {type(cause).__name__}: {cause}. This is a fault of moeplace or its "
            "installation; set MOEPLACE_DEBUG=1 for the traceback.",
            INTERNAL,
        )


def _failed(cause: BaseException, message: str, code: int) -> int:
    if os.environ.get("MOEPLACE_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(cause)
    error(message)
    return code


if __name__ == "__main__":
    main()
