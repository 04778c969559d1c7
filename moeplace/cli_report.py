"""The command `moeplace report`: a study of an instance and plans as one HTML file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeplace._files import check_output, write_text
from moeplace.cli_answers import read_given, read_of_instance, write, write_json
from moeplace.cli_options import (
    AsJson,
    FirstMoeLayer,
    Instance,
    PlanFormat,
    ProfileFile,
    Quiet,
    Seed,
    SumWindows,
    Workers,
    example,
)
from moeplace.compare import percent, printable
from moeplace.errors import ProblemError
from moeplace.integrations.observe import is_observed
from moeplace.plan import Plan
from moeplace.study import SECONDS

EXAMPLE = "report generate:A:0 --sum-windows --expert-bytes 44050944 --out report.html"


def report(
    instance: Instance,
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PLAN]...",
            help="Plan files (JSON); the first is what the ranks hold now. By default the "
            "instance's current plan, or contiguous, and EPLB's.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="The HTML file, whole or not at all.")
    ] = "report.html",
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of all searches together, about.")
    ] = SECONDS,
    expert_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Bytes of one expert's weights; without it moves are counted in copies.",
            show_default=False,
        ),
    ] = None,
    plan_format: PlanFormat = "moeplace",
    first_moe_layer: FirstMoeLayer = None,
    profile: ProfileFile = None,
    seed: Seed = 0,
    workers: Workers = 1,
    sum_windows: SumWindows = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a report on an instance and plans: one HTML file, with figures, that works offline."""
    from moeplace.bench_report import is_runs, report_runs
    from moeplace.figures import plotly
    from moeplace.report import report as page
    from moeplace.report_observe import report_observed
    from moeplace.study import study

    plotly()  # before minutes of search
    paths = plans or []
    check_output(out, [path for path in (instance, profile, *paths) if path is not None])
    if expert_bytes is not None and expert_bytes < 1:
        raise ProblemError(f"--expert-bytes must be at least 1, got {expert_bytes}.")
    if is_observed(instance):
        _written(report_observed(instance), out, as_json, quiet)
        return
    if is_runs(instance):
        _written(report_runs(instance), out, as_json, quiet)
        return
    given = read_given(instance, sum_windows, profile)
    named: dict[str, Plan] = {}
    for path in paths:
        name = printable(Path(path).stem)
        while name in named:
            name += "'"
        named[name] = read_of_instance(path, plan_format, first_moe_layer, given.problem)
    if not quiet:
        write(f"searching for about {time_limit:g} s\n", sys.stderr)
    found = study(
        given.problem,
        named,
        time_limit=time_limit,
        expert_bytes=expert_bytes,
        seed=seed,
        workers=workers,
    )
    text = page(found)
    write_text(out, text)
    if as_json:
        write_json(
            {
                "out": out,
                "bytes": len(text.encode()),
                "unit": given.problem.cluster.time_unit,
                "lower_bound": found.result.lower_bound,
                "gap": found.result.gap,
                "plans": {name: priced.objective for name, priced in found.plans.items()},
            }
        )
    elif not quiet:
        write(
            f"{out}: {len(text.encode()) / 1e6:.1f} MB, {len(found.plans)} plans; ours is within "
            f"{percent(found.result.gap)} of the bound\n"
        )


def _written(text: str, out: str, as_json: bool, quiet: bool) -> None:
    """A report on a folder: decisions that were recorded inside an engine, or runs of `bench`."""
    write_text(out, text)
    if as_json:
        write_json({"out": out, "bytes": len(text.encode())})
    elif not quiet:
        write(f"{out}: {len(text.encode()) / 1e6:.1f} MB\n")


def add_commands(app: typer.Typer) -> None:
    """Add the command, once."""
    if all(command.callback is not report for command in app.registered_commands):
        app.command(epilog=example(EXAMPLE))(report)
