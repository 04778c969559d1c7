"""Benchmark of our search and bounds against their targets, and CP-SAT on the same formulation."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.bench_case import NEVER, REPORT_SEEDS, Row
from moeplace.bounds import lower_bound
from moeplace.instances import generate, read_instance
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.search.split import at_best_shares
from moeplace.solve import solve

#: Seconds for CP-SAT, and the gaps whose times are told.
SECONDS, REACHED = 10.0, (1e-2, 1e-3)
#: Seconds of each small instance.
SMALL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A problem for each seed, the time that `auto` has, and the gap that it should reach.

    Attributes
    ----------
    shape : str or (layers, experts, slots, ranks)
    routing, speeds
        As in `generate`.
    seconds : float
    gap : float or None
        None where there is no target.
    workers : int
    """

    shape: Any
    seconds: float
    gap: float | None
    routing: str = "even"
    speeds: Any = "het"
    workers: int = 1

    def problem(self, seed: int) -> Problem:
        """Loads summed over windows."""
        made = generate(self.shape, seed, speeds=self.speeds).aggregate()
        return replace(made, routing=self.routing)  # type: ignore[arg-type]


#: One layer each, where CP-SAT runs beside.
LAYERS = (
    Aim(shape=(1, 128, 128, 8), seconds=0.5, gap=1e-4),
    Aim(shape=(1, 256, 256, 32), seconds=0.5, gap=1e-4),
    Aim(shape=(1, 256, 288, 32), seconds=0.5, gap=1e-4),
    Aim(shape=(1, 256, 320, 64), seconds=1.0, gap=2e-4),
    Aim(shape=(1, 256, 288, 32), seconds=0.1, gap=1e-6, routing="weighted"),
)
#: Whole models; then weighted routing with as many spare slots as ranks less one, or more, and
#: speeds within 30 %, where the optimum is fluid.
MODELS = (
    *(Aim(shape=shape, seconds=2.0, gap=None if shape == "C" else 1e-4, workers=2)
      for shape in "ABCD"),
    *(Aim(shape=shape, seconds=0.1, gap=1e-6, routing="weighted", speeds=0.3)
      for shape in ("A", "C", "D", (58, 256, 287, 32), (58, 256, 319, 64), (1, 24, 29, 6))),
)  # fmt: skip


def _median(gaps: Sequence[float]) -> str:
    """Median over seeds; a run that found no plan is above all others."""
    median = statistics.median(gaps)
    return "no plan" if median == float("inf") else f"{median:.1e}"


def _gap(result: Result) -> float:
    return float("inf") if result.evaluation is None else result.gap


def _ours(aim: Aim, problems: Sequence[Problem]) -> Row:
    """What `auto` reaches, beside its target."""
    found = [
        solve(each, time_limit=aim.seconds, gap=NEVER, workers=aim.workers) for each in problems
    ]
    gaps = [_gap(each) for each in found]
    one = problems[0]
    total = int(one.cluster.slots.sum())
    name = f"{one.layers} x {one.experts} / {total} / {one.ranks} {aim.routing}"
    median = statistics.median(gaps)
    return {
        "case": f"{name}, 30 %" if aim.speeds == 0.3 else name,
        "limit of auto": f"{aim.seconds} s" + (f", {aim.workers} cores" * (aim.workers > 1)),
        "gap of auto": _median(gaps),
        "worst seed": _median([max(gaps)]),
        "target": "" if aim.gap is None else f"{aim.gap:.0e}",
        "met": "" if aim.gap is None else ("yes" if median <= aim.gap else "no"),
    }


@dataclass(frozen=True, kw_only=True)
class Cold:
    """What CP-SAT makes of a layer by itself: no start, no cutoff, no bound of ours.

    Attributes
    ----------
    gap : float
        Over the better of our bound and its own; infinite without a plan.
    bound : float
        Its own bound over the fluid one.
    when : list of float
        Seconds until it had plans within `REACHED` of our bound; infinite if it had none.
    """

    gap: float
    bound: float
    when: list[float]


def _cold(problem: Problem) -> Cold:
    """One layer, from nothing; building the model counts."""
    from moeplace.exact.model import build
    from moeplace.exact.solvers import SOLVERS, Request

    ours, fluid = lower_bound(problem), problem.total(problem.fluid)
    began = time.perf_counter()
    model = build(problem, [0], ours.per_layer, np.full((1, 1), np.inf))
    low = model.low.copy()
    low[[column for column in model.blocks[0].time if column >= 0]] = 0.0
    when = [float("inf")] * len(REACHED)

    def heard(price: float, _: float) -> None:
        for n, gap in enumerate(REACHED):
            if price * model.unit <= ours.total * (1 + gap):
                when[n] = min(when[n], time.perf_counter() - began)

    left = SECONDS - (time.perf_counter() - began)
    answer = SOLVERS["cp-sat"].solve(
        replace(model, low=low), Request(seconds=left, incumbent=heard)
    )
    price, bound = float("inf"), max(answer.bound * model.unit, 0.0)
    if answer.values is not None:
        slots = model.slots(problem, answer.values)
        plan = Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)
        price = at_best_shares(problem, plan).objective
    return Cold(gap=price / max(bound, ours.total) - 1, bound=bound / fluid, when=when)


def _cp_sat(problems: Sequence[Problem]) -> Row:
    """CP-SAT on the same formulation, from nothing and from our plan."""
    cold = [_cold(each) for each in problems]
    warm = [solve(each, "cp-sat", time_limit=SECONDS, gap=NEVER) for each in problems]
    row: Row = {"CP-SAT from nothing": _median([each.gap for each in cold])}
    for n, gap in enumerate(REACHED):
        median = statistics.median(each.when[n] for each in cold)
        row[f"to {gap:.1%}"] = "not in time" if median == float("inf") else f"{median:.1f} s"
    row["its bound"] = f"{statistics.median(each.bound for each in cold):.4f}"
    row["CP-SAT from our plan"] = _median([_gap(each) for each in warm])
    return row


def solvers(instances: Path) -> Iterator[Row]:
    """`auto` against its targets, and CP-SAT with 10 s, from nothing and from our plan.

    Gaps are medians of five seeds, over the best bound known to each run: ours, and what CP-SAT
    claims. From nothing it knows no bound of ours: `its bound` is the part of the fluid bound that
    it proves by itself, `to 1.0%` when it has a plan within that of our bound. `30 %`: speeds
    evenly spaced, the fastest 30 % above the slowest. The last row: small instances proven optimal
    (to 1e-9) by `auto`, the slowest, and the largest gap.
    """
    for aim in LAYERS:
        problems = [aim.problem(seed) for seed in REPORT_SEEDS]
        yield _ours(aim, problems) | _cp_sat(problems)
    for aim in MODELS:
        yield _ours(aim, [aim.problem(seed) for seed in REPORT_SEEDS])
    slowest, proven, number, gaps = 0.0, 0, 0, [0.0]
    for path in sorted((instances / "small").glob("*.json")):
        one = read_instance(path)
        solve(one, work_limit=1)  # kernels loaded
        began = time.perf_counter()
        found = solve(one, time_limit=SMALL_SECONDS, gap=0.0)
        slowest = max(slowest, time.perf_counter() - began)
        done = found.status in ("optimal", "infeasible")
        proven += done
        gaps += [] if done else [_gap(found)]
        number += 1
    yield {
        "case": f"small: {proven} of {number} proven, the slowest in {slowest:.2f} s",
        "limit of auto": f"{SMALL_SECONDS} s",
        "gap of auto": "",
        "worst seed": f"{max(gaps):.1e}",
        "target": "all",
        "met": "yes" if proven == number else "no",
    }
