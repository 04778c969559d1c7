"""Options that several commands share, exit codes, and the example at the end of a help."""

import textwrap
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from moeplace.errors import ProblemError
from moeplace.formats import PLAN_FORMATS, options
from moeplace.tables import WIDTH

OK, INTERNAL, BAD_INPUT, INFEASIBLE, NONE_IN_TIME, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

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


def _known(name: str) -> str:
    """The format of a plan, if there is such a one: also where no plan is read."""
    options(name, reading=True)
    return name


def _from_0(layers: int | None) -> int | None:
    if layers is not None and layers < 0:
        raise ProblemError(f"--first-moe-layer must be a whole number from 0, got {layers}.")
    return layers


PlanFormat = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"The plan file's format: {', '.join(PLAN_FORMATS)}.",
        callback=_known,
    ),
]
FirstMoeLayer = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Model layers before the first MoE layer (sglang, tensorrt-llm), e.g. 3 for "
        "DeepSeek-V3.",
        callback=_from_0,
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


def example(command: str) -> str:
    """The end of a command's help: how it is used, in at most 80 columns."""
    lines = textwrap.wrap(
        f"moeplace {command}", WIDTH - 8, break_long_words=False, break_on_hyphens=False
    )
    return "\b\nExample:\n  " + " \\\n      ".join(lines)


def add(to: typer.Typer, commands: Iterable[tuple[Callable[..., None], str]]) -> None:
    """Add commands with the examples of their help, once."""
    known = {command.callback for command in to.registered_commands}
    for command, usage in commands:
        if command not in known:
            to.command(epilog=example(usage))(command)
