"""The command `moeplace watch`: follow a folder of load dumps."""

import json
import time
from typing import Annotated, Any, cast

import typer

from moeplace._files import check_outputs
from moeplace.cli_answers import read_given, read_of_instance, write
from moeplace.cli_files import parse_range
from moeplace.cli_migrate import (
    GIGA,
    Chunk,
    EngineName,
    Inter,
    Intra,
    Slowdown,
    Steps,
    StepSeconds,
    TimeLimit,
    sizes_of,
)
from moeplace.cli_options import AsJson, ProfileFile, Quiet, example
from moeplace.compare import printable
from moeplace.drift import Monitor
from moeplace.errors import ProblemError
from moeplace.migrate import Engine
from moeplace.replan import Economy
from moeplace.tradeoff import BUDGETS
from moeplace.transfer import Links

Mode = Annotated[
    str,
    typer.Option(metavar="NAME", help="stall: serving waits for the weights; slowed: it goes on."),
]


def watch_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Where a recorder writes its dumps.")
    ],
    instance: Annotated[
        str,
        typer.Option(
            metavar="INSTANCE", help="Cluster, and the loads that the plan was made on (JSON)."
        ),
    ],
    plan: Annotated[str, typer.Option(metavar="PLAN", help="What the ranks hold now (JSON).")],
    out: Annotated[
        str, typer.Option(metavar="PLAN", help="Write new plans here, whole or not at all.")
    ],
    state: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where to go on after a restart. Default: OUT.state.json.",
            show_default=False,
        ),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Decisions, a JSON object a line. Default: OUT.log.jsonl.",
            show_default=False,
        ),
    ] = None,
    trigger: Annotated[
        str, typer.Option(metavar="NAME", help="regret, cosine or max-mean.")
    ] = "regret",
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Default: 0.03, 0.05 or 1.2 by trigger.", show_default=False
        ),
    ] = None,
    cooldown: Annotated[
        int, typer.Option(metavar="N", help="Windows without change after a change.")
    ] = 10,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="N|MODEL",
            help="Bytes of one expert, or its model: a plan is written only if it pays.",
            show_default=False,
        ),
    ] = None,
    moves: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Copies a layer that a new plan may receive. Default: what pays most.",
            show_default=False,
        ),
    ] = None,
    steps: Steps = 3000.0,
    step_seconds: StepSeconds = None,
    mode: Mode = "stall",
    slowdown: Slowdown = 0.1,
    engine: EngineName = "vllm",
    chunk: Chunk = None,
    intra: Intra = 200.0,
    inter: Inter = 25.0,
    profile: ProfileFile = None,
    load_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="NAME", help="Of the dumps; see loads.", show_default=False
        ),
    ] = None,
    passes: Annotated[
        float | None,
        typer.Option(metavar="N", help="Forward passes of each window.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="FROM:TO", help="Rows to keep, TO excluded.", show_default=False),
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between two looks at the folder.")
    ] = 5.0,
    settle: Annotated[
        float, typer.Option(metavar="SECONDS", help="A younger dump may be half-written.")
    ] = 10.0,
    once: Annotated[
        bool, typer.Option("--once", help="Take what is there, as it is, and end.")
    ] = False,
    time_limit: TimeLimit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Follow a folder of load dumps; write a new plan when it pays, and log every decision."""
    from moeplace.watch import Watch

    state, log = state or f"{out}.state.json", log or f"{out}.log.jsonl"
    check_outputs([out, state, log], [instance, plan, profile])
    if not 0 < interval <= 1e6:
        raise ProblemError(f"--interval must be above 0, at most 1e6 seconds, got {interval!r}.")
    if moves is not None and moves < 1:
        raise ProblemError(f"--moves must be a whole number from 1, got {moves!r}.")
    problem = read_given(instance, False).problem
    # Built, and so checked, whether it is used or not.
    costs = Economy(
        expert_bytes=1 if expert_bytes is None else max(sizes_of(expert_bytes, problem)),
        links=Links(intra=intra * GIGA, inter=inter * GIGA),
        steps=steps,
        step_seconds=step_seconds,
        mode=cast(Any, mode),
        slowdown=slowdown,
        engine=cast(Engine, engine),
        chunk=chunk,
    )
    economy = None if expert_bytes is None else costs
    if economy is not None:
        economy.before(problem, 0.0)  # seconds are known, or said to be missing now
    held = read_of_instance(plan, "moeplace", None, problem)
    monitor = Monitor(
        problem, held, trigger=cast(Any, trigger), threshold=threshold, cooldown=cooldown
    )
    budgets = ([*BUDGETS] if economy is not None else []) if moves is None else [moves]
    follower = Watch(
        folder=folder,
        monitor=monitor,
        out=out,
        state=state,
        log=log,
        economy=economy,
        budgets=budgets,
        options={
            "format": load_format,
            "passes": passes,
            "layers": None if layers is None else parse_range(layers),
        },
        profile=profile,
        settle=settle,
        time_limit=time_limit,
    )

    def heard(line: dict[str, Any]) -> None:
        if as_json:
            write(json.dumps(line) + "\n")
        elif not quiet:
            write(_said(line))

    while True:
        follower.poll(heard, settled=once)
        if once:
            return
        time.sleep(interval)


def _said(line: dict[str, Any]) -> str:
    window = "" if line["window"] is None else f" window {line['window']}"
    more = f", {line['moves']:,} copies" if "moves" in line else ""
    name = printable(line["file"])
    return f"{line['time']} {name}{window}: {line['action']}{more}: {printable(line['reason'])}\n"


def add_commands(app: typer.Typer) -> None:
    """Add the command, once."""
    usage = "watch dumps --instance instance.json --plan plan.json --out new.json --once"
    if watch_command not in {command.callback for command in app.registered_commands}:
        app.command("watch", epilog=example(usage))(watch_command)
