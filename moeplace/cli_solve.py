"""The commands `moeplace solve` and `moeplace compare`."""

import json
import sys
from typing import Annotated, Any, cast

import typer

from moeplace._files import check_outputs
from moeplace.certificate import write_certificate
from moeplace.cli_answers import (
    read_given,
    read_of_instance,
    report_result,
    sends_of,
)
from moeplace.cli_options import (
    AsJson,
    FirstMoeLayer,
    Gap,
    Hidden,
    Instance,
    PlanFormat,
    ProfileFile,
    Quiet,
    Seed,
    SumWindows,
    TimeLimit,
    TopK,
    Workers,
    WorkLimit,
    add,
)
from moeplace.cli_progress import searching
from moeplace.compare import (
    RIVALS,
)
from moeplace.errors import (
    ProblemError,
)
from moeplace.formats import write_plan
from moeplace.policies import POLICIES
from moeplace.solve import METHODS
from moeplace.solve import solve as find


def solve(
    instance: Instance,
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(METHODS)}.")
    ] = "auto",
    time_limit: TimeLimit = None,
    work_limit: WorkLimit = None,
    gap: Gap = 1e-4,
    seed: Seed = 0,
    workers: Workers = 1,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Plan to improve on; the result is never worse.",
            show_default=False,
        ),
    ] = None,
    plan_format: PlanFormat = "moeplace",
    first_moe_layer: FirstMoeLayer = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Write the plan here (JSON), whole or not at all.",
            show_default=False,
        ),
    ] = None,
    profile: ProfileFile = None,
    latency: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What a profile is fitted by: speed (relative, where tokens are many), plane, "
            "hinges, planes or table (in seconds; the loads need passes).",
        ),
    ] = "speed",
    certificate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write what proves the result here (JSON), for moeplace certify.",
            show_default=False,
        ),
    ] = None,
    warm_start: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What an exact method starts from: auto, lpt, greedy or none.",
        ),
    ] = "auto",
    solver_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Parameter of an exact method's solver, as it calls it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    solver_log: Annotated[
        bool, typer.Option("--solver-log", help="Show the solver's log on stderr.")
    ] = False,
    fill: Annotated[
        bool,
        typer.Option(
            "--fill",
            help="Leave no slot EMPTY, as most engines' files need; may cost time.",
        ),
    ] = False,
    sum_windows: SumWindows = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find a plan and prove how far from the optimum it can be."""
    inputs = [path for path in (instance, start, profile) if path is not None]
    check_outputs([out, certificate], inputs)
    if start is not None and method in POLICIES:
        raise ProblemError(f"Method {method} cannot start from a plan: drop --start or use auto.")
    given = read_given(instance, sum_windows, profile, latency)
    old = (
        None
        if start is None
        else read_of_instance(start, plan_format, first_moe_layer, given.problem)
    )
    with searching(quiet or as_json, given.unit) as progress:
        result = find(
            given.problem,
            method,
            time_limit=time_limit,
            work_limit=work_limit,
            gap=gap,
            seed=seed,
            workers=workers,
            start=old,
            progress=progress,
            warm_start=cast(Any, warm_start),
            solver_options=_solver_options(solver_option or []),
            solver_log=_solver_line if solver_log else None,
            fill=fill,
        )
    if out is not None and result.evaluation is not None:
        write_plan(result.plan, out)
    if certificate is not None and result.evaluation is not None:
        write_certificate(result, certificate)
    report_result(given, result, RIVALS, as_json=as_json, quiet=quiet)


def _solver_options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE with values as JSON where they are (1, 0.5, true), else as text."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ProblemError(f"--solver-option must be NAME=VALUE, got {text!r}.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _solver_line(line: str) -> None:
    sys.stderr.write(line.rstrip("\n") + "\n")


def compare(
    instance: Instance,
    time_limit: TimeLimit = None,
    work_limit: WorkLimit = None,
    gap: Gap = 1e-4,
    seed: Seed = 0,
    workers: Workers = 1,
    sum_windows: SumWindows = False,
    hidden: Hidden = None,
    top_k: TopK = 1,
    as_json: AsJson = False,
) -> None:
    """Solve, and price every policy beside our plan."""
    given = read_given(instance, sum_windows)
    sends = sends_of(given.problem, hidden, top_k)
    with searching(as_json, given.unit) as progress:
        result = find(
            given.problem,
            time_limit=time_limit,
            work_limit=work_limit,
            gap=gap,
            seed=seed,
            workers=workers,
            progress=progress,
        )
    report_result(given, result, tuple(POLICIES), as_json=as_json, sends=sends)


_COMMANDS = (
    (solve, "solve instances/small/flashlb-even.json --out plan.json"),
    (compare, "compare instances/small/flashlb-even.json --time-limit 1"),
)


def add_commands(app: typer.Typer) -> None:
    """Add the commands, once."""
    add(app, _COMMANDS)
