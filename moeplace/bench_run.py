"""One run of a table of `bench`: a method on an instance, as a row of text."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplace.bench_case import real_instances
from moeplace.bounds import lower_bound
from moeplace.errors import MoeplaceError, PolicyNotApplicable
from moeplace.evaluate import Evaluation
from moeplace.instances import generate, read_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Progress, on_scale
from moeplace.result import gap as over
from moeplace.search.split import at_best_shares
from moeplace.solve import solve

if TYPE_CHECKING:
    from moeplace.bench_table import Settings

#: Seeds of generated instances in tables: none that parameters were tuned on.
TABLE_SEEDS = range(100, 130)
SHAPES: dict[str, Any] = {
    "A": "A", "B": "B", "C": "C", "D": "D", "tiny": (3, 32, 40, 8),
}  # fmt: skip
SETS = ("real", "real-windows", *SHAPES)
COLUMNS = (
    "set", "instance", "method", "seed", "status", "objective", "lower_bound", "gap", "ratio",
    "worst_layer", "moves", "legal", "wall_seconds", "cpu_seconds", "goal_seconds", "load",
    "trace", "digest", "reason",
)  # fmt: skip
#: Columns that differ when a table is made again: times, and what depends on them.
TIMES = ("wall_seconds", "cpu_seconds", "goal_seconds", "load", "trace")
#: Runs within this of their bound have reached the goal.
GOAL = 1e-3
#: Points of a trace at most.
POINTS = 24

Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One row to be."""

    set: str
    instance: str
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Set, instance, method and seed, as text."""
        return (self.set, self.instance, self.method, str(self.seed))


def names(chosen: str, instances: Path) -> list[str]:
    """Names of the instances of a set."""
    if chosen in SHAPES:
        return [f"{chosen}-{seed}" for seed in TABLE_SEEDS]
    return [path.stem for path in real_instances(instances)]


def problem(chosen: str, name: str, instances: Path) -> Problem:
    """The problem of a set by name; windows are summed but for "real-windows"."""
    if chosen in SHAPES:
        seed = int(name.rpartition("-")[2])
        return generate(SHAPES[chosen], seed).aggregate()
    found = read_instance(instances / "real" / f"{name}.json")
    return found if chosen == "real-windows" else found.aggregate()


def measure(run: Run, settings: "Settings", instances: Path) -> Row:
    """What a run gives; a plan that breaks a rule (two copies on a rank) is priced as it stands."""
    given = problem(run.set, run.instance, instances)
    row = dict.fromkeys(COLUMNS, "")
    row |= dict(zip(("set", "instance", "method", "seed"), run.key, strict=True))
    row |= {"digest": given.digest()[:16], "load": load()}
    try:
        found, more = (_policy if run.method in POLICIES else _solved)(given, run, settings)
    except PolicyNotApplicable as cause:
        return row | {"status": "not_applicable", "reason": _line(cause)}
    except MoeplaceError as cause:
        return row | {"status": "failed", "reason": f"{type(cause).__name__}: {_line(cause)}"}
    row |= more
    if found is None:
        return row
    held = _held(given)
    return row | {
        "objective": repr(found.objective),
        "gap": f"{float(over(found.objective, float(row['lower_bound']))):.6e}",
        "ratio": f"{found.imbalance:.9f}", "worst_layer": f"{found.ratio.max():.9f}",
        "moves": "" if held is None else str(int(found.plan.moves_from(held).sum())),
        "legal": str(found.legal).lower(),
    }  # fmt: skip


def _solved(given: Problem, run: Run, settings: "Settings") -> tuple[Evaluation | None, Row]:
    """A solve within the limits, and where it reached the goal one that stops there."""
    steps = settings.work_limit and settings.work_limit * given.layers
    limits: dict[str, Any] = {"time_limit": settings.time_limit, "work_limit": steps}
    solve(given, run.method, work_limit=1, time_limit=settings.time_limit)  # kernels loaded
    seen: list[Progress] = []
    began, cpu = time.perf_counter(), time.process_time()
    result = solve(given, run.method, **limits, gap=1e-7, seed=run.seed, progress=seen.append)
    more = _times(began, cpu) | {
        "status": str(result.status), "reason": _line(result.reason),
        "lower_bound": repr(float(result.lower_bound)),
    }  # fmt: skip
    if result.evaluation is None:
        return None, more
    points = [(each.seconds, each.gap) for each in on_scale(seen, result.objective)]
    more["trace"] = trace([*points, (float(more["wall_seconds"]), result.gap)])
    if result.gap <= GOAL:
        began = time.perf_counter()
        again = solve(given, run.method, **limits, gap=GOAL, seed=run.seed)
        if again.gap <= GOAL:
            more["goal_seconds"] = f"{time.perf_counter() - began:.6f}"
    return result.evaluation, more


def _policy(given: Problem, run: Run, _: "Settings") -> tuple[Evaluation | None, Row]:
    """A policy's plan with its best shares; its bound is proven off the clock."""
    POLICIES[run.method](given)  # kernels loaded
    began, cpu = time.perf_counter(), time.process_time()
    plan = POLICIES[run.method](given)
    more = _times(began, cpu)
    found = at_best_shares(given, plan)
    more |= {"status": "feasible"} if found.legal else {
        "status": "illegal", "reason": _line(found.violations[0])
    }  # fmt: skip
    least = min(lower_bound(given).total, found.objective)
    left = float(over(found.objective, least))
    more |= {"lower_bound": repr(least), "trace": trace([(float(more["wall_seconds"]), left)])}
    if found.legal and left <= GOAL:
        more["goal_seconds"] = more["wall_seconds"]
    return found, more


def trace(points: Sequence[tuple[float, float]]) -> str:
    """Seconds and gaps as text, "0.02:1.8e-03 0.12:3e-05": where the gap fell, thinned."""
    fell = [points[0]] if points else []
    for seconds, gap in points[1:]:
        if gap < fell[-1][1]:
            fell.append((seconds, gap))
    kept = [*fell[: -1 : len(fell) // POINTS + 1], *fell[-1:]]
    return " ".join(f"{seconds:.4g}:{gap:.3g}" for seconds, gap in kept)


def read_trace(text: str) -> list[tuple[float, float]]:
    """Seconds and gaps of a trace."""
    pairs = (point.partition(":") for point in text.split())
    return [(float(seconds), float(gap)) for seconds, _, gap in pairs]


def load() -> str:
    """Processes that ran or waited in the last minute, where the system tells."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""


def _line(reason: object) -> str:
    """One line: a row that was cut off must be told by its end of line."""
    return " ".join(str(reason).split())


def _times(began: float, cpu: float) -> Row:
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"wall_seconds": f"{wall:.6f}", "cpu_seconds": f"{cpu:.6f}"}


def _held(given: Problem) -> Plan | None:
    try:
        return POLICIES["contiguous"](given)
    except PolicyNotApplicable:
        return None
