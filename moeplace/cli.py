"""The `moeplace` command.

Answers go to stdout, everything else (errors, progress) to stderr. Exit codes: 0 done, 1 internal
failure, 2 bad input, 3 proven infeasible, 4 no plan found in time, 5 certificate refused, 130
interrupted (the plan so far is written).
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any, cast

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from moeplace import __version__
from moeplace._files import check_output, check_outputs
from moeplace.batches import Batches, over_batches
from moeplace.bounds import Bound, lower_bound, recompute
from moeplace.certificate import write_certificate
from moeplace.compare import (
    COLUMNS,
    RIVALS,
    WIDTH,
    Row,
    aligned,
    cells,
    described,
    exact,
    facts,
    imbalance,
    notes,
    percent,
    printable,
    sent,
)
from moeplace.compare import compare as beside
from moeplace.errors import (
    CertificateError,
    FormatError,
    MoeplaceError,
    PlanError,
    ProblemError,
)
from moeplace.evaluate import Evaluation
from moeplace.evaluate import evaluate as price
from moeplace.formats import PLAN_FORMATS, options, read_plan, write_plan
from moeplace.formats.loads import FORMATS as LOAD_FORMATS
from moeplace.formats.loads import inspect
from moeplace.formats.loads.binary import write as write_loads
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance, write_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.profile import match, measured_devices, read_profile, relative_speeds
from moeplace.result import OPTIMAL_GAP, Progress, Result, Status, gap
from moeplace.solve import METHODS
from moeplace.solve import solve as find
from moeplace.summary import lines, summarise

OK, INTERNAL, BAD_INPUT, INFEASIBLE, NONE_IN_TIME, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_EXITS = {
    Status.INFEASIBLE: INFEASIBLE,
    Status.NONE_IN_TIME: NONE_IN_TIME,
    Status.INTERRUPTED: INTERRUPTED,
}

EXIT_CODES = """Exit codes: 0 done, 1 internal or replay failure, 2 bad input, 3 proven
infeasible, 4 no plan found in time, 5 certificate refused, 130 interrupted (the plan so far is
written). MOEPLACE_DEBUG=1 shows tracebacks."""

app = typer.Typer(
    name="moeplace",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    help="Place the experts of Mixture-of-Experts models on GPUs, with a proven bound.",
    epilog=EXIT_CODES,
)

# ------------------------------------------------------------------------------- options

Instance = Annotated[
    str,
    typer.Argument(
        metavar="INSTANCE",
        help="Instance file (JSON), or generate:SHAPE:SEED[:SPEEDS] for a synthetic one: shape "
        "A to D, speeds equal, het (the default) or a spread such as 0.04.",
        show_default=False,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Wall time; 0 still gives a plan and its bound. Default: no limit, so that the "
        "work limit and the gap end the search and the same inputs give the same bits.",
        show_default=False,
    ),
]
WorkLimit = Annotated[
    int | None,
    typer.Option(metavar="STEPS", help="Search steps over all layers.", show_default=False),
]
PlanFormat = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"The plan file's format: {', '.join(PLAN_FORMATS)}."),
]
FirstMoeLayer = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Model layers before the first MoE layer (sglang, tensorrt-llm), e.g. 3 for "
        "DeepSeek-V3.",
        show_default=False,
    ),
]
Gap = Annotated[
    float, typer.Option(metavar="RATIO", help="Stop within (1 + gap) of the lower bound.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the search.")]
Workers = Annotated[int, typer.Option(metavar="N", help="Threads.")]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Run on the Dask cluster with this scheduler, e.g. tcp://10.0.0.1:8786.",
        show_default=False,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on this Ray cluster: auto (this machine's), local (start one), or an address.",
        show_default=False,
    ),
]
Hidden = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        help="Hidden size of the model: also tell the bytes that leave rank and node for each "
        "token, to the experts and back, of 2 bytes a number.",
        show_default=False,
    ),
]
TopK = Annotated[float, typer.Option(metavar="K", help="Experts of each token, for --hidden.")]
SumWindows = Annotated[
    bool,
    typer.Option(
        "--sum-windows",
        help="Sum all windows into one first. A plan looks better on the sum than in service.",
    ),
]
ProfileFile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="PROFILE",
        help="Profile file of moeplace calibrate: its ranks' speeds instead of the instance's.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No table and no progress: only --json and errors.")
]

# ------------------------------------------------------------------------------ commands


def example(command: str) -> str:
    """The end of a command's help: how it is used."""
    return f"\b\nExample:\n  moeplace {command}"


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


@app.command(epilog=example("solve instances/small/flashlb-even.json --out plan.json"))
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
    if profile is None and latency != "speed":
        raise ProblemError("--latency is about the times of a profile: give --profile too.")
    if start is not None and method in POLICIES:
        raise ProblemError(f"Method {method} cannot start from a plan: drop --start or use auto.")
    given = read_given(instance, sum_windows, profile, latency)
    old = (
        None
        if start is None
        else read_of_instance(start, plan_format, first_moe_layer, given.problem)
    )
    with _progress(quiet) as progress:
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
    _report(given, result, RIVALS, as_json=as_json, quiet=quiet)


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


@app.command(epilog=example("compare instances/small/flashlb-even.json --time-limit 1"))
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
    with _progress() as progress:
        result = find(
            given.problem,
            time_limit=time_limit,
            work_limit=work_limit,
            gap=gap,
            seed=seed,
            workers=workers,
            progress=progress,
        )
    sends = None if hidden is None else (hidden, top_k)
    _report(given, result, tuple(POLICIES), as_json=as_json, sends=sends)


@app.command(epilog=example("evaluate instances/small/flashlb-even.json plan.json"))
def evaluate(
    instance: Instance,
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="Plan file (JSON).", show_default=False)
    ],
    plan_format: PlanFormat = "moeplace",
    first_moe_layer: FirstMoeLayer = None,
    batches: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Price it over so many random forward passes of each window, too; the loads need "
            "passes.",
        ),
    ] = 0,
    sum_windows: SumWindows = False,
    hidden: Hidden = None,
    top_k: TopK = 1,
    as_json: AsJson = False,
) -> None:
    """Price a plan. A plan that breaks a rule of the problem is priced too, and ends with 2."""
    given = read_given(instance, sum_windows)
    problem, unit = given.problem, given.problem.cluster.time_unit
    found = price(problem, read_of_instance(plan, plan_format, first_moe_layer, problem))
    bound = lower_bound(problem)
    # Bounds hold for legal plans only.
    least = min(bound.total, found.objective) if found.legal else bound.total
    left = float(gap(found.objective, least)) if found.legal else None
    status = "illegal" if left is None else "optimal" if left <= OPTIMAL_GAP else "feasible"
    row = Row(method="plan", evaluation=found)
    drawn = over_batches(problem, found.plan, batches) if batches else None
    if as_json:
        answer = _answer(given, status, found, least, left, [row]) | {
            "violations": list(found.violations)
        }
        if drawn is not None:
            answer["batches"] = {"count": batches, "objective": drawn.objective}
        if hidden is not None:
            answer["traffic"] = _traffic([row], (hidden, top_k))["plan"]
        write_json(answer)
    else:
        balanced = found.balancedness
        words = [
            *given.words,
            ("plan", printable(plan)),
            ("status", status),
            ("step time", exact(found.objective, unit)),
            ("lower bound", exact(least, unit)),
            *([] if left is None else [("gap", percent(left))]),
            *([] if drawn is None else [("random batches", _over(drawn, found, unit))]),
            ("imbalance", imbalance(found)),
            ("balancedness", f"{balanced.mean():.5f} on average, {balanced.min():.5f} at worst"),
        ]
        if hidden is not None:
            ((_, off_rank, off_node),) = sent([row], hidden, top_k)
            said = f"{off_rank:,.0f} bytes leave their rank, {off_node:,.0f} their node"
            words.append(("each token", said))
        broken = [f"breaks a rule: {each}" for each in found.violations]
        write("\n".join([*aligned(words), *broken]) + "\n")
    if not found.legal:
        _error(
            f"{plan}: the plan breaks {len(found.violations)} rules of the problem, the first: "
            f"{found.violations[0]}. Correct the plan or drop the rule."
        )
        raise typer.Exit(BAD_INPUT)


def _over(drawn: Batches, found: Evaluation, unit: str) -> str:
    """What random batches take, against the price at expected counts."""
    more = drawn.objective / found.objective - 1 if found.objective > 0 else 0.0
    return (
        f"{exact(drawn.objective, unit)}: {percent(more)} above, mean of {drawn.batches} batches' "
        "slowest ranks"
    )


@app.command(epilog=example("bound instances/small/flashlb-even.json --json"))
def bound(instance: Instance, sum_windows: SumWindows = False, as_json: AsJson = False) -> None:
    """Prove a lower bound without solving, and check the proof again."""
    given = read_given(instance, sum_windows)
    problem, unit = given.problem, given.problem.cluster.time_unit
    proven = lower_bound(problem)
    recompute(problem, proven)
    fluid = problem.total(problem.fluid)
    if as_json:
        write_json(
            _answer(given, "bound", None, proven.total, None, [])
            | {"fluid": fluid, "sources": proven.sources, "recomputed": True}
        )
        return
    above = float(gap(proven.total, fluid))
    words = [
        *given.words,
        ("lower bound", exact(proven.total, unit)),
        ("fluid bound", exact(fluid, unit)),
        ("above fluid", percent(above)),
        ("bound from", _sources(proven)),
        ("checked", "recomputed from the problem alone: every argument holds"),
    ]
    write("\n".join(aligned(words)) + "\n")


@app.command(epilog=example("loads recorder.pt --passes 1000 --strict"))
def loads(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="What an engine recorded: a file, or TensorRT-LLM's folder.",
            show_default=False,
        ),
    ],
    load_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"One of {', '.join(LOAD_FORMATS)}. By default told from the content.",
            show_default=False,
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What was recorded: prefill, decode or mixed (the default).",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Forward passes of each window, where the file does not say it.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Rows to keep, TO excluded, e.g. 3:61 where dense layers have rows too.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Sum consecutive windows into this many.", show_default=False
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts of a trace; by default the largest id + 1.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="NPZ", help="Write the loads here (.npz).", show_default=False),
    ] = None,
    instance: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Write an instance here: these loads on --ranks equal ranks of --slots slots.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="EP ranks.", show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="Slots of each rank.", show_default=False)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 2 if there is a warning.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Describe recorded loads, and warn of statistics that lie."""
    check_outputs([out, instance], [file])
    if len({instance is None, ranks is None, slots is None}) > 1:
        raise ProblemError("--instance, --ranks and --slots belong together: give all or none.")
    with _reading() as progress:
        read = inspect(
            file,
            load_format,
            phase=cast(Any, phase),  # checked with the loads
            passes=passes,
            layers=None if layers is None else parse_range(layers),
            windows=windows,
            experts=experts,
            progress=progress,
        )
    found = summarise(file, read)
    if out is not None:
        write_loads(read.loads, out)
    if instance is not None and ranks is not None and slots is not None:
        cluster = Cluster.from_speeds([1.0] * ranks, slots, speed_unit="relative")
        write_instance(Problem(read.loads, cluster, name=Path(file).stem), instance)
    write_json(found) if as_json else write("\n".join(lines(found)) + "\n")
    if strict and found["warnings"]:
        names = ", ".join(each["name"] for each in found["warnings"])
        _error(f"{file}: {names}: the loads may not be what the model's router did. See above.")
        raise typer.Exit(BAD_INPUT)


def parse_range(text: str) -> slice:
    """FROM:TO as a slice."""
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError(text)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError as cause:
        raise ProblemError(f"--layers must be FROM:TO, e.g. 3:61, got {text!r}.") from cause


@app.command(epilog=example("export plan.json --format sglang --first-moe-layer 3 --out map.json"))
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Plan file (JSON); with --model or --solution an INSTANCE.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="Write here, whole or not at all.")],
    plan_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"One of {', '.join(PLAN_FORMATS)}.",
            show_default=False,
        ),
    ] = None,
    first_moe_layer: FirstMoeLayer = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The model's layers (sglang, tensorrt-llm), to check that none is missing.",
            show_default=False,
        ),
    ] = None,
    mtp_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layers of multi-token prediction after the plan's (tensorrt-llm): slot p gets "
            "expert p mod experts.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="vllm: map, row or expert-to-rank.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Write the exact model of an instance: lp or mps, with a MIP start (.mst) and "
            "its names (.json) beside it.",
            show_default=False,
        ),
    ] = None,
    solution: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A solver's solution of that model: write it as a checked plan.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="The names that were written beside the model.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="MIP start of a model; by default a quick solve's plan.",
            show_default=False,
        ),
    ] = None,
    sum_windows: SumWindows = False,
    drop_split: Annotated[
        bool,
        typer.Option(
            "--drop-split", help="Drop the plan's shares: the engine shares by its own rule."
        ),
    ] = False,
) -> None:
    """Write a plan as an engine reads it, or an instance's exact model for another solver."""
    asked = [plan_format is not None, model is not None, solution is not None]
    if sum(asked) != 1:
        raise FormatError(
            f"Export needs one of --format ({', '.join(PLAN_FORMATS)}), --model (lp, mps) and "
            "--solution."
        )
    check_output(out, [source])
    if model is not None or solution is not None:
        _export_model(source, out, model, solution, names, start, sum_windows)
        return
    assert plan_format is not None
    plan = read_plan(source)
    write_plan(
        plan,
        out,
        plan_format,
        first_moe_layer=first_moe_layer,
        num_layers=num_layers,
        mtp_layers=mtp_layers,
        form=form,
        drop_split=drop_split,
    )


def _export_model(
    source: str,
    out: str,
    model: str | None,
    solution: str | None,
    names: str | None,
    start: str | None,
    sum_windows: bool,
) -> None:
    from moeplace.exact.export import read_solution, write_model

    given = read_given(source, sum_windows)
    problem = given.problem
    if solution is not None:
        if names is None:
            raise FormatError("--solution needs --names, the .json beside the exported model.")
        plan = read_solution(problem, solution, names)
        write_plan(plan, out)
        words = [*given.words, ("step time", exact(price(problem, plan).objective, _unit(problem)))]
        write("\n".join(aligned(words)) + "\n")
        return
    if model not in ("lp", "mps"):
        raise FormatError(f"--model must be lp or mps, got {model!r}.")
    beside = [Path(out).with_suffix(suffix) for suffix in (".json", ".mst")]
    check_outputs([out, *beside], [path for path in (source, start) if path is not None])
    if start is not None:
        begin: Evaluation | None = price(problem, read_plan(start))
    else:
        begin = find(problem, time_limit=1.0).evaluation
    unit = write_model(problem, out, cast(Any, model), begin)
    words = [
        *given.words,
        ("model", printable(out)),
        ("unit", f"1 in the objective is {exact(unit, _unit(problem))}"),
    ]
    if begin is not None:
        words.append(("start", f"costs {begin.objective / unit:.9g} there"))
    write("\n".join(aligned(words)) + "\n")


def _unit(problem: Problem) -> str:
    return problem.cluster.time_unit


@app.command(epilog=example("certify certificate.json"))
def certify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="CERTIFICATE", help="What solve --certificate wrote.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Check a certificate without a solver, in exact arithmetic; a false one ends with 5."""
    from moeplace.certificate import check

    checked = check(file)
    problem, bound = checked.problem, checked.bound
    proven, claimed, left = checked.shares
    unit = _unit(problem)
    if as_json:
        write_json(
            {
                "status": "holds",
                "digest": problem.digest(),
                "objective": float(checked.objective),
                "lower_bound": bound.total,
                "recomputed": bound.recomputed,
                "unit": unit,
                "arguments": checked.arguments,
                "claims": [
                    {"layers": list(claim.layers), "value": claim.value, "by": claim.by}
                    for claim in bound.claims
                ],
                "closed_by_arguments": proven,
                "closed_by_claims": claimed,
                "open": left,
            }
        )
        return
    by = sorted({claim.by for claim in bound.claims})
    closed = (
        f"{percent(proven)} closed by what was checked here, {percent(claimed)} by claims, "
        f"{percent(left)} open"
    )
    words = [
        *described(problem),
        ("certificate", "holds"),
        ("step time", f"{exact(float(checked.objective), unit)}, computed in rational numbers"),
        ("lower bound", exact(bound.total, unit)),
        ("recomputed", exact(bound.recomputed, unit)),
        ("arguments", _sources(bound)),
        *([("claimed by", ", ".join(by))] if by else []),
        ("gap to fluid", closed),
    ]
    write("\n".join(aligned(words)) + "\n")


# -------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Given:
    """What a command works on, and how to say it."""

    problem: Problem
    path: str
    words: list[tuple[str, str]] = field(default_factory=list)


def read_given(
    instance: str, sum_windows: bool, profile: str | None = None, latency: str = "speed"
) -> _Given:
    """Read the problem that a command is about, and the words for it."""
    problem = _generated(instance) if instance.startswith("generate:") else read_instance(instance)
    if profile is not None:
        problem = replace(problem, cluster=_profiled(problem.cluster, profile, latency))
    summed = []
    if sum_windows:
        summed = [("summed", f"{problem.windows:,} windows into one, which understates their time")]
        problem = problem.aggregate()
    return _Given(problem, instance, [*described(problem), *summed])


def _profiled(cluster: Cluster, path: str, latency: str) -> Cluster:
    """The cluster with the times of a profile; equal speeds, and a warning, if it is not usable.

    By the latency "speed" relative speeds where tokens are many, else a fitted model, in seconds.
    """
    profile = read_profile(path)
    devices = measured_devices(profile)
    if devices and len(devices) != cluster.ranks:
        raise ProblemError(
            f"{path}: holds {len(devices)} ranks but the instance has {cluster.ranks}: calibrate "
            "on as many ranks."
        )
    if devices and latency != "speed":
        return Cluster.from_profile(profile, cluster.slots, cluster.nodes, model=latency)
    entries = match(profile, devices).entries if devices else None
    speeds = np.ones(cluster.ranks) if entries is None else relative_speeds(entries)
    return replace(cluster, speeds=speeds, speed_unit="relative", planes=None, table=None)


def read_of_instance(
    path: str, plan_format: str, first_moe_layer: int | None, problem: Problem
) -> Plan:
    """Read a plan; what an engine's file does not say is as in the problem."""
    slots = problem.cluster.slots
    said: dict[str, int] = {"ranks": problem.ranks, "layers": problem.layers}
    if (slots == slots[0]).all():
        said["slots"] = int(slots[0])
    takes = options(plan_format, reading=True)
    known = {name: value for name, value in said.items() if name in takes}
    return read_plan(path, plan_format, first_moe_layer=first_moe_layer, **known)


def _generated(text: str) -> Problem:
    _, *parts = text.split(":")
    speeds: str | float = parts[2] if len(parts) == 3 else "het"
    try:
        shape, seed = parts[0], int(parts[1])
    except (IndexError, ValueError) as cause:
        raise ProblemError(
            f"{text!r} must be generate:SHAPE:SEED or generate:SHAPE:SEED:SPEEDS, e.g. "
            "generate:A:0 or generate:A:0:equal."
        ) from cause
    if len(parts) > 3:
        raise ProblemError(f"{text!r} has more than shape, seed and speeds: drop the rest.")
    if speeds not in ("equal", "het"):
        with suppress(ValueError):  # `generate` says what is allowed
            speeds = float(speeds)
    return generate(shape, seed, speeds=speeds)


# ------------------------------------------------------------------------------- answers


def _report(
    given: _Given,
    result: Result,
    methods: tuple[str, ...],
    *,
    as_json: bool = False,
    quiet: bool = False,
    sends: tuple[int, float] | None = None,
) -> None:
    """Print a result with its comparison; exit with the code of its status."""
    code = _EXITS.get(result.status, OK)
    if as_json or not quiet:
        rows = beside(result.problem, result, methods)
        if as_json:
            more = {} if sends is None else {"traffic": _traffic(rows, sends)}
            write_json(_solved(given, result, rows) | more)
        else:
            _show(given, result, rows)
            if sends is not None:
                write("\n" + "\n".join(_sent(rows, sends)) + "\n")
    if code in (INFEASIBLE, NONE_IN_TIME):
        reason = result.reason or "no plan was found within the limits. Give more time."
        _error(f"{result.status}: {reason}")
    if code != OK:
        raise typer.Exit(code)


def _solved(given: _Given, result: Result, rows: list[Row]) -> dict[str, Any]:
    least = result.lower_bound
    left = None if result.evaluation is None else result.gap
    answer = _answer(given, str(result.status), result.evaluation, least, left, rows)
    return answer | {
        "method": result.method,
        "reason": result.reason,
        "seconds": result.seconds,
        "work": result.work,
        "sources": result.bound.sources,
    }


def _answer(
    given: _Given,
    status: str,
    evaluation: Evaluation | None,
    least: float,
    left: float | None,
    rows: list[Row],
) -> dict[str, Any]:
    """The keys that every command's JSON has."""
    problem = given.problem
    return {
        "status": status,
        "objective": None if evaluation is None else evaluation.objective,
        "lower_bound": least,
        "gap": left,
        "methods": [_method(row) for row in rows],
        "instance": given.path,
        "name": problem.name,
        "unit": problem.cluster.time_unit,
        "routing": problem.routing,
        "objective_over_windows": problem.objective,
        "shapes": {
            "windows": problem.windows,
            "layers": problem.layers,
            "experts": problem.experts,
            "slots": problem.cluster.total_slots,
            "ranks": problem.ranks,
        },
        "digest": problem.digest(),
        "imbalance": _imbalance(evaluation),
    }


def _method(row: Row) -> dict[str, Any]:
    found = row.evaluation
    return {
        "method": row.method,
        "objective": None if found is None else found.objective,
        "imbalance": _imbalance(found),
        "moves": row.moves,
        "legal": None if found is None else found.legal,
        "violations": None if found is None else len(found.violations),
        "reason": row.reason,
    }


def _traffic(rows: list[Row], sends: tuple[int, float]) -> dict[str, dict[str, float]]:
    """By method: bytes that leave rank and node for each token."""
    return {
        label: {"off_rank_bytes_per_token": rank, "off_node_bytes_per_token": node}
        for label, rank, node in sent(rows, *sends)
    }


def _sent(rows: list[Row], sends: tuple[int, float]) -> list[str]:
    """The same as a table in text."""
    found = [(label, f"{rank:,.0f}", f"{node:,.0f}") for label, rank, node in sent(rows, *sends)]
    head = ("bytes for each token", "off rank", "off node")
    return [f"{label:<28}{rank:>16}{node:>16}" for label, rank, node in (head, *found)]


def _imbalance(found: Evaluation | None) -> dict[str, float] | None:
    if found is None:
        return None
    ratio = found.ratio
    return {
        "total": found.imbalance,
        "mean_layer": float(ratio.mean()),
        "worst_layer": float(ratio.max()),
    }


def _show(given: _Given, result: Result, rows: list[Row]) -> None:
    known = {label for label, _ in given.words}
    said = [pair for pair in facts(result) if pair[0] not in known]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        left = column == COLUMNS[0]
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row, texts in zip(rows, cells(rows), strict=True):
        ours = row.method == result.method and row.evaluation is not None
        table.add_row(*map(Text, texts), style="bold green" if ours else None)
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for line in [*aligned([*given.words, *said]), ""]:
            console.print(Text(line))
        console.print(table)
        for line in notes(result.problem, rows):
            console.print(Text(line))
    write(capture.get())


def _sources(proven: Bound) -> str:
    return ", ".join(f"{name} {count}" for name, count in proven.sources.items())


def write_json(answer: dict[str, Any]) -> None:
    """One object, ASCII; infinite numbers, which JSON does not know, become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in answer.items()
    }
    write(json.dumps(finite, indent=1, allow_nan=False) + "\n")


def write(text: str, stream: IO[str] | None = None) -> None:
    """Write and flush; a reader that has gone (as `| head` does) is no failure."""
    stream = sys.stdout if stream is None else stream
    if stream is None:  # closed before we began
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _mute(stream)


def _mute(stream: IO[str]) -> None:
    """Send what is left in the buffer nowhere, lest Python complains when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _error(message: str) -> None:
    text = "".join(c if c == "\n" else printable(c) for c in message.strip())
    write(f"error: {text}\n", sys.stderr)


# ------------------------------------------------------------------------------ progress


@contextmanager
def _progress(quiet: bool = False) -> Iterator[Callable[[Progress], None] | None]:
    """A callback that draws a bar on stderr, if that is a terminal, after a second's work."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers done"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    task = bar.add_task("searching", total=1)

    def draw(now: Progress) -> None:
        if now.seconds > 1:
            bar.start()
            bar.update(task, completed=now.layers_done, total=now.layers)

    try:
        yield draw
    finally:
        bar.stop()


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None] | None]:
    """A callback that draws a bar for a file on stderr, if that is a terminal, after a second."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = Bar(
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    task = bar.add_task("reading", total=1)
    began = time.perf_counter()

    def draw(done: int, total: int) -> None:
        if time.perf_counter() - began > 1:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield draw
    finally:
        bar.stop()


# ----------------------------------------------------------------------------- entry point


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (by default `sys.argv`) and exit with its code."""
    from moeplace import (  # they import this
        cli_bench,
        cli_engine,
        cli_fit,
        cli_migrate,
        cli_replay,
        cli_report,
        cli_reproduce,
        cli_simulate,
        cli_watch,
        cli_whatif,
    )

    for module in (
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
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is escaped
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    sys.exit(_guarded(lambda: app(args=arguments, prog_name="moeplace", standalone_mode=False)))


def _guarded(run: Callable[[], Any]) -> int:
    """Exit code of a run, with one clean message for whatever it raises."""
    try:
        code = run()
        if code == INTERRUPTED:
            _error("interrupted")
        return code if isinstance(code, int) else OK
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else INTERNAL
    except (KeyboardInterrupt, typer.Abort):
        _error("interrupted")
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
    _error(message)
    return code


if __name__ == "__main__":
    main()
