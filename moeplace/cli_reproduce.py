"""The command `moeplace reproduce`: published experiments in form."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeplace._files import check_output, write_text
from moeplace.cli_answers import write, write_json
from moeplace.cli_options import AsJson, Dask, Quiet, Ray, Workers, example
from moeplace.instances import shipped
from moeplace.sweep import on_cluster


def reproduce(
    what: Annotated[str, typer.Argument(help="The paper: vibe (arXiv 2606.00735).")],
    instances: Annotated[
        Path, typer.Option(help="The folder of shipped instances.", show_default=True)
    ] = Path("instances"),
    out: Annotated[
        Path | None, typer.Option(help="Write the tables there, as Markdown, too.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer seeds and requests: to see that it runs.")
    ] = False,
    workers: Workers = 1,
    dask: Dask = None,
    ray: Ray = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Repeat a paper's experiments in form, its numbers beside ours."""
    from moeplace.reproduce import reproduce as repeat

    if out is not None:
        check_output(out)
    with on_cluster(dask, ray):
        report = repeat(
            what,
            shipped(instances),
            quick=quick,
            workers=workers,
            tell=lambda line: None if quiet else write(line + "\n", sys.stderr),
        )
    if out is not None:
        write_text(out, report.markdown())
    if as_json:
        write_json(report.to_json())
    elif not quiet:
        write(report.markdown())


def add_commands(app: typer.Typer) -> None:
    """Add `reproduce`, once."""
    if all(command.callback is not reproduce for command in app.registered_commands):
        usage = example("reproduce vibe --out vibe.md --workers 2")
        app.command("reproduce", epilog=usage)(reproduce)
