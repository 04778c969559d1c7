"""What a table of runs says, in Markdown: an overview, means with intervals, what was not run.

The unit is the instance: seeds of one instance are averaged first. The settings may come from a
file, so they are a mapping here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.bench_run import GOAL, SETS, TABLE_SEEDS, Row
from moeplace.bench_stats import Interval, by_instance, paired_ratio, shifted_geometric_mean
from moeplace.solve import METHODS

#: Times below this many seconds count as small in means.
SHIFT = 0.01


def summary(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The whole text.

    Parameters
    ----------
    rows : sequence of Row
    about : mapping
        Settings and environment, as in settings.json.
    """
    settings, where = about["settings"], about["environment"]
    base = base_of(settings)
    words = (
        f"Ratio: geometric mean of the imbalance ratio over instances. Against {base}: geometric "
        f"mean of step time over {base}'s on the same instance, with a 95 % paired bootstrap "
        "interval. Moves: copies that ranks receive, from contiguous. Wall and CPU: shifted "
        f"geometric means (10 ms). In goal: share of instances whose runs all came within {GOAL:g} "
        "of the bound; time to goal: median over instances of a run that stops there. Time-outs "
        "count as not reached, at any time, and enter no mean."
    )
    lines = ["# Benchmark", "", f"Made by `{command(settings)}`.", "", *overview(rows, settings)]
    lines += ["", words]
    for chosen in settings["sets"]:
        part = [row for row in rows if row["set"] == chosen]
        lines += ["", f"## {chosen}", ""]
        lines.append(
            f"| method | instances | ratio | against {base} | in goal | time to goal | moves "
            "| wall | CPU |"
        )
        lines.append("|" + "---|" * 9)
        lines += [_line(part, method, base) for method in settings["methods"]]
        lines += _left_out(part)
    lines += ["", "## What was not run", "", not_run(settings), "", "## Machine", ""]
    lines.append(", ".join(f"{key} {value}" for key, value in where.items()) + ".")
    return "\n".join(lines) + "\n"


def base_of(settings: Mapping[str, Any]) -> str:
    """The method that others are compared with."""
    methods = settings["methods"]
    return str("auto" if "auto" in methods else methods[-1])


def command(settings: Mapping[str, Any]) -> str:
    """What makes the table."""
    limit = (
        f"--time-limit {settings['time_limit']:g}"
        if settings["work_limit"] is None
        else f"--work-limit {settings['work_limit']}"
    )
    return (
        f"moeplace bench --out DIR --sets {','.join(settings['sets'])} "
        f"--methods {','.join(settings['methods'])} "
        f"--seeds {','.join(map(str, settings['seeds']))} {limit} --jobs {settings['jobs']}"
    )


def overview(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Step time of each method over the base's, a line for each set."""
    base = base_of(settings)
    others = [method for method in settings["methods"] if method != base]
    lines = [
        (
            f"| instances | {' | '.join(f'{method} / {base}' for method in others)} "
            f"| {base} above its bound |"
        ),
        "|" + "---|" * (len(others) + 2),
    ]
    for chosen in settings["sets"]:
        part = [row for row in rows if row["set"] == chosen]
        count = len({row["instance"] for row in part})
        cells = [_cell(against(part, method, base), part, method) for method in others]
        gaps = list(values(part, base, "gap").values())
        left = f"{np.median(gaps):.1e}, at most {max(gaps):.1e}" if gaps else "no plan"
        lines.append(f"| {chosen}: {count} | {' | '.join(cells)} | {left} |")
    if any(row["legal"] == "false" for row in rows):
        lines += ["", "\\* breaks a rule of some of the instances (two replicas on one rank)."]
    return lines


def _cell(found: Interval | None, rows: Sequence[Row], method: str) -> str:
    if found is None:
        return "n/a"
    star = any(row["method"] == method and row["legal"] == "false" for row in rows)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]" + " \\*" * star


def against(rows: Sequence[Row], method: str, base: str) -> Interval | None:
    """Step time over the base's on instances where both have a plan."""
    mine, theirs = values(rows, method, "objective"), values(rows, base, "objective")
    both = [name for name in mine if name in theirs]
    if method == base or not both or not all(mine[n] > 0 and theirs[n] > 0 for n in both):
        return None
    return paired_ratio([mine[n] for n in both], [theirs[n] for n in both])


def values(rows: Sequence[Row], method: str, column: str) -> dict[str, float]:
    """Mean over seeds of a column, by instance; instances with an empty field are left out."""
    found = [row for row in rows if row["method"] == method]
    empty = {row["instance"] for row in found if not row[column]}
    found = [row for row in found if row["instance"] not in empty]
    if not found:
        return {}
    labels = [row["instance"] for row in found]
    known, means = by_instance(np.array([float(row[column]) for row in found]), labels)
    return dict(zip(known, means.tolist(), strict=True))


def goal_times(rows: Sequence[Row], method: str) -> FloatArray:
    """Seconds to the goal [instances], infinite where a run of the instance was cut off before."""
    reached = values(rows, method, "goal_seconds")
    return np.array([reached.get(name, np.inf) for name in instances_of(rows)])


def instances_of(rows: Sequence[Row]) -> list[str]:
    """Instances in order of appearance."""
    return list(dict.fromkeys(row["instance"] for row in rows))


def _line(rows: Sequence[Row], method: str, base: str) -> str:
    priced = values(rows, method, "objective")
    if not priced:
        return f"| {method} | 0 |" + " |" * 7
    ratios = list(values(rows, method, "ratio").values())
    found = against(rows, method, base)
    times = goal_times(rows, method)
    typical = float(np.median(times)) if np.isfinite(np.median(times)) else None
    wall, cpu = (
        shifted_geometric_mean(list(values(rows, method, name).values()), SHIFT)
        for name in ("wall_seconds", "cpu_seconds")
    )
    moves = list(values(rows, method, "moves").values())
    illegal = len({r["instance"] for r in rows if r["method"] == method and r["legal"] == "false"})
    star = f" ({illegal} illegal)" if illegal else ""
    return (
        f"| {method}{star} | {len(priced)} | {shifted_geometric_mean(ratios, 0):.5f} "
        f"| {found or ''} | {np.isfinite(times).mean():.0%} "
        f"| {'not reached' if typical is None else f'{typical * 1e3:.1f} ms'} "
        f"| {f'{np.mean(moves):,.0f}' if moves else ''} "
        f"| {wall * 1e3:.1f} ms | {cpu * 1e3:.1f} ms |"
    )


def _left_out(rows: Sequence[Row]) -> list[str]:
    """What has no number, in words."""
    said = []
    for method in dict.fromkeys(row["method"] for row in rows):
        without = [row for row in rows if row["method"] == method and not row["objective"]]
        if without:
            why = without[0]["reason"] or without[0]["status"]
            said += ["", f"{method} has no plan in {len(without)} runs, the first: {why}"]
    return said


def not_run(settings: Mapping[str, Any]) -> str:
    """What a reader could take for measured and is not."""
    sets = [name for name in SETS if name not in settings["sets"]]
    methods = [name for name in METHODS if name not in settings["methods"]]
    limit = (
        f"{settings['time_limit']:g} s"
        if settings["work_limit"] is None
        else f"{settings['work_limit']:,} search steps a layer"
    )
    said = [f"Methods {', '.join(methods)}."] * bool(methods)
    said += [f"Sets {', '.join(sets)}."] * bool(sets)
    seeds = ", ".join(map(str, settings["seeds"]))
    said += [
        (
            f"Limits other than {limit} and seeds of searches other than {seeds}; of generated "
            f"instances, seeds other than {TABLE_SEEDS[0]} to {TABLE_SEEDS[-1]}."
        ),
        (
            "No engine's own code (policies are reimplementations, tested against the originals), "
            "no other planner, and no GPU: step times are the model's."
        ),
    ]
    if "real" in settings["sets"]:
        said.append("Set real has its windows summed, which understates step times.")
    if {"real", "real-windows"} & set(settings["sets"]):
        said.append(
            "Real instances share the loads of two models and were in sight while the search was "
            "made: their intervals say little about other models."
        )
    return " ".join(said)
