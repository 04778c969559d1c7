"""What commands work on, and how they say what they found."""

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any, get_args

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeplace.claims import Bound
from moeplace.clash import named
from moeplace.cli_options import (
    INFEASIBLE,
    INTERRUPTED,
    NONE_IN_TIME,
    OK,
)
from moeplace.compare import (
    COLUMNS,
    Row,
    aligned,
    cells,
    described,
    facts,
    notes,
    printable,
    sent,
)
from moeplace.compare import compare as beside
from moeplace.errors import (
    ProblemError,
)
from moeplace.evaluate import Evaluation
from moeplace.fit import Model
from moeplace.formats import options, read_plan
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.profile import match, measured_devices, read_profile, relative_speeds
from moeplace.result import Result, Status
from moeplace.tables import LONGEST, SHORTEST, WIDTH, bar, table
from moeplace.topology import check_top_k

_EXITS = {
    Status.INFEASIBLE: INFEASIBLE,
    Status.NONE_IN_TIME: NONE_IN_TIME,
    Status.INTERRUPTED: INTERRUPTED,
}


@dataclass(frozen=True)
class Given:
    """What a command works on, and how to say it."""

    problem: Problem
    path: str
    words: list[tuple[str, str]] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Of the problem's times."""
        return self.problem.cluster.time_unit


def read_given(
    instance: str, sum_windows: bool, profile: str | None = None, latency: str = "speed"
) -> Given:
    """Read the problem that a command is about, and the words for it."""
    known = tuple(dict.fromkeys(("speed", *get_args(Model))))
    if latency not in known:
        raise ProblemError(f"--latency must be one of {', '.join(known)}, got {latency!r}.")
    if latency != "speed" and profile is None:
        raise ProblemError("--latency is about the times of a profile: give --profile too.")
    problem = _generated(instance) if instance.startswith("generate:") else read_instance(instance)
    if profile is not None:
        problem = replace(problem, cluster=_profiled(problem.cluster, profile, latency))
    summed = []
    if sum_windows:
        summed = [("summed", f"{problem.windows:,} windows into one, which understates their time")]
        problem = problem.aggregate()
    return Given(problem, instance, [*described(problem), *summed])


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


def sends_of(problem: Problem, hidden: int | None, top_k: float) -> tuple[int, float] | None:
    """Hidden size and experts of each token, checked, if bytes were asked for."""
    check_top_k(problem, top_k)
    if hidden is None:
        return None
    if hidden < 1:
        raise ProblemError(f"--hidden must be a whole number from 1, got {hidden}.")
    return hidden, top_k


def report_result(
    given: Given,
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
            more = {} if sends is None else {"traffic": traffic_by_method(rows, sends)}
            write_json(_solved(given, result, rows) | more)
        else:
            _show(given, result, rows)
            if sends is not None:
                write("\n" + "\n".join(sent_lines(rows, sends)) + "\n")
    if code in (INFEASIBLE, NONE_IN_TIME):
        reason = result.reason or "no plan was found within the limits. Give more time."
        error(f"{result.status}: {reason}")
    if code != OK:
        raise typer.Exit(code)


def _solved(given: Given, result: Result, rows: list[Row]) -> dict[str, Any]:
    least = result.lower_bound
    left = None if result.evaluation is None else result.gap
    answer = common(given, str(result.status), result.evaluation, least, left, rows)
    return answer | {
        "method": result.method,
        "reason": result.reason,
        "clash": [named(rule) for rule in result.clash],
        "seconds": result.seconds,
        "work": result.work,
        "sources": result.bound.sources,
    }


def common(
    given: Given,
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


def traffic_by_method(rows: list[Row], sends: tuple[int, float]) -> dict[str, dict[str, float]]:
    """By method: bytes that leave rank and node for each token."""
    return {
        label: {"off_rank_bytes_per_token": rank, "off_node_bytes_per_token": node}
        for label, rank, node in sent(rows, *sends)
    }


def sent_lines(rows: list[Row], sends: tuple[int, float]) -> list[str]:
    """The same as a table in text."""
    found = [(label, f"{rank:,.0f}", f"{node:,.0f}") for label, rank, node in sent(rows, *sends)]
    return table([("bytes for each token", "off rank", "off node"), *found])


def _imbalance(found: Evaluation | None) -> dict[str, float] | None:
    if found is None:
        return None
    ratio = found.ratio
    return {
        "total": found.imbalance,
        "mean_layer": float(ratio.mean()),
        "worst_layer": float(ratio.max()),
    }


def _show(given: Given, result: Result, rows: list[Row]) -> None:
    known = {label for label, _ in given.words}
    said = [pair for pair in facts(result) if pair[0] not in known]
    shown = cells(rows)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *shown, strict=True)]
    room = min(WIDTH - sum(widths) - 2 * len(widths), LONGEST)
    slowest = max((row.evaluation.objective for row in rows if row.evaluation), default=0.0)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        left = column == COLUMNS[0]
        grid.add_column(column, justify="left" if left else "right", no_wrap=True)
    if room >= SHORTEST:
        grid.add_column(width=room, no_wrap=True)
    for row, texts in zip(rows, shown, strict=True):
        ours = row.method == result.method and row.evaluation is not None
        share = row.evaluation.objective / slowest if row.evaluation and slowest > 0 else 0.0
        drawn = [Text(bar(share, room))] if room >= SHORTEST else []
        grid.add_row(*map(Text, texts), *drawn, style="bold green" if ours else None)
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for line in [*aligned([*given.words, *said]), ""]:
            console.print(Text(line))
        console.print(grid)
        for line in notes(result.problem, rows):
            console.print(Text(line))
    write("\n".join(line.rstrip() for line in capture.get().split("\n")))


def sources(proven: Bound) -> str:
    """Which arguments prove a bound, and of how many layers and windows."""
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


def error(message: str) -> None:
    """Say on stderr what went wrong; control characters from files are escaped."""
    text = "".join(c if c == "\n" else printable(c) for c in message.strip())
    write(f"error: {text}\n", sys.stderr)
