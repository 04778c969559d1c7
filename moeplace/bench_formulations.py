"""Benchmark of two exact formulations of even split: counts selected, or shares times placement.

The package selects the number of replicas (see `exact.model`), so that a share is a constant in
each choice. The other way, made here only, keeps one column x_eg a replica and lets the share be
a column s_e, which falls as replicas are added; y_eg is the product of both. It is exact as well:
1 / c is convex, so its chords between whole numbers of replicas meet it in each of them, and a
minimum wants no share larger than it must be.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from moeplace._check import BoolArray, FloatArray
from moeplace.bench_case import REPORT_SEEDS, Row
from moeplace.bounds import lower_bound
from moeplace.errors import SolverError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.exact.layer import Builder, Layer
from moeplace.exact.model import Model, build, cutoffs
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.instances import generate
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.solve import solve

#: Experts, slots, ranks.
SHAPES = ((8, 10, 3), (10, 12, 3), (12, 16, 4), (24, 30, 6), (64, 72, 8))
SEEDS = REPORT_SEEDS
#: Seconds of a solver.
SECONDS = 3.0
#: Search steps of the plan that solvers start from.
STEPS = 20_000
#: Gaps that count as closed: what MILP solvers' tolerances leave.
CLOSED = 2.1e-6
WAYS = ("counts selected", "products, big-M", "products, McCormick")


def products(problem: Problem, bound: FloatArray, cutoff: FloatArray, tight: bool = True) -> Model:
    """The second formulation, of a problem of one layer and window with no rules, even routing.

    minimise T with  sum_e w_e y_eg <= v_g T,  y_eg >= s_e - most s (1 - x_eg),
    s_e >= each chord of 1 / n_e between whole numbers,  n_e = sum_g x_eg.

    Parameters
    ----------
    bound, cutoff : array [windows, layers]
        As in `exact.model.build`; fewest and most replicas follow from them as they do there.
    tight : bool
        Add what a product obeys besides (McCormick 1976: y_eg >= least s x_eg, y_eg <= most s x_eg,
        y_eg <= s_e - least s (1 - x_eg)), and that an expert's shares add up to 1.
    """
    if problem.windows > 1 or problem.layers > 1 or problem.constraints or problem.base.any():
        raise SolverError("The second formulation is for one plain layer and window.")
    make = Builder()
    unit = float(bound[0, 0]) or 1.0
    counts = Layer(problem, 0, bound[:, 0], cutoff[:, 0], make)
    least, most = (part.tolist() for part in counts._levels())
    longest = min(float(cutoff[0, 0]), counts._longest(0)) / unit
    total = make.column("T", float(bound[0, 0]) / unit, max(longest, 1.0) * (1 + 1e-9), cost=1.0)
    ranks, load = range(problem.ranks), problem.tokens[0, 0]
    held, carried = [], np.empty((problem.experts, problem.ranks), dtype=np.int64)
    for expert in range(problem.experts):
        small, large = 1.0 / most[expert], 1.0 / least[expert]
        x = [make.column(f"x_e{expert}_g{rank}", whole=True) for rank in ranks]
        s = make.column(f"s_e{expert}", small, large)
        held += [(column, 0, expert, rank) for rank, column in enumerate(x)]
        make.row(f"copies_e{expert}", x, 1.0, float(least[expert]), float(most[expert]))
        for c in range(least[expert], most[expert]):
            slope = 1.0 / (c * (c + 1))  # between 1 / c and 1 / (c + 1)
            make.row(f"chord_e{expert}_c{c}", [s, *x], [1.0, *[slope] * len(x)],
                     1.0 / c + slope * c, np.inf)  # fmt: skip
        for rank in ranks:
            y = carried[expert, rank] = make.column(f"y_e{expert}_g{rank}", 0.0, 1.0)
            name, here = f"e{expert}_g{rank}", x[rank]
            make.row(f"share_{name}", [y, s, here], [1.0, -1.0, -large], -large, np.inf)
            if tight:
                make.row(f"least_{name}", [y, here], [1.0, -small], 0.0, np.inf)
                make.row(f"most_{name}", [y, here], [1.0, -large], -np.inf, 0.0)
                make.row(f"no_more_{name}", [y, s, here], [1.0, -1.0, -small], -np.inf, -small)
        if tight:
            make.row(f"served_e{expert}", carried[expert], 1.0, 1.0, np.inf)
    table = np.array(held)
    for rank in ranks:
        value = load / problem.cluster.speeds[rank] / unit
        make.row(f"time_g{rank}", [*carried[:, rank], total], [*value, -1.0], -np.inf, 0.0)
        mine = table[table[:, 3] == rank, 0]
        make.row(f"slots_g{rank}", mine, 1.0, -np.inf, float(counts.caps[rank]))
    return Model(
        cost=np.array(make.cost), low=np.array(make.low), high=np.array(make.high),
        whole=np.array(make.whole, dtype=np.bool_), rows=make.rows(),
        row_low=np.array(make.row_low), row_high=np.array(make.row_high), columns=make.columns,
        row_names=make.row_names, constant=0.0, unit=unit, layers=(0,), held=table, blocks=[],
    )  # fmt: skip


def product_values(model: Model, problem: Problem, plan: Plan) -> FloatArray:
    """A plan as a solution [columns] of `products`."""
    values = np.zeros(model.cost.size)
    places = {name: n for n, name in enumerate(model.columns)}
    values[places["T"]] = evaluate(problem, plan).makespan[0, 0] / model.unit
    held = placed(problem, plan)
    copies = held.sum(axis=1)
    for expert in range(problem.experts):
        values[places[f"s_e{expert}"]] = 1.0 / copies[expert]
    for expert, rank in np.argwhere(held).tolist():
        values[places[f"x_e{expert}_g{rank}"]] = 1.0
        values[places[f"y_e{expert}_g{rank}"]] = 1.0 / copies[expert]
    return values


def placed(problem: Problem, plan: Plan) -> BoolArray:
    """Replicas [experts, ranks] of a plan of one layer."""
    held = np.zeros((problem.experts, problem.ranks), dtype=np.bool_)
    row = plan.slots[0]
    held[row[row >= 0], plan.rank_of_slot[row >= 0]] = True
    return held


def plan_of(problem: Problem, held: BoolArray) -> Plan:
    """The plan of one layer with replicas `held` [experts, ranks]."""
    slots = problem.cluster.slots
    row = np.full(int(slots.sum()), EMPTY)
    first = np.cumsum(slots) - slots
    for rank in range(problem.ranks):
        mine = np.flatnonzero(held[:, rank])
        row[first[rank] : first[rank] + mine.size] = mine
    return Plan(slots=row[None], rank_slots=slots, experts=problem.experts)


def hint(model: Model, problem: Problem, plan: Plan) -> FloatArray:
    """A plan as a solution [columns] of either formulation."""
    return model.values(problem, plan) if model.blocks else product_values(model, problem, plan)


def relaxation(model: Model) -> float:
    """Optimum of the linear relaxation, in the problem's time, without what bounds T."""
    low = model.low.copy()
    low[[n for n, name in enumerate(model.columns) if name[0] == "T"]] = 0.0
    down, up = np.isfinite(model.row_low), np.isfinite(model.row_high)
    found = linprog(  # type: ignore[call-overload]
        model.cost,
        A_ub=sparse.vstack([model.rows[up], -model.rows[down]]),
        b_ub=np.concatenate([model.row_high[up], -model.row_low[down]]),
        bounds=np.stack([low, model.high], axis=1),
        method="highs",
    )
    if found.status != 0:
        raise SolverError(f"The relaxation was not solved: {found.message}")
    return float(found.fun) * model.unit


def formulate(way: str, problem: Problem, cutoff: FloatArray) -> Model:
    """The model of a problem by one of `WAYS`."""
    bound = lower_bound(problem).per_layer
    if way == WAYS[0]:
        return build(problem, [0], bound, cutoff)
    return products(problem, bound, cutoff, tight=way == WAYS[2])


def attempt(
    name: str,
    model: Model,
    problem: Problem,
    seconds: float,
    start: Evaluation | None = None,
    hint: FloatArray | None = None,
) -> tuple[float, float]:
    """A solver on a model: seconds that it took (the limit, if its gap is open), and the gap.

    The gap lies between the best plan, priced by `evaluate`, and the solver's bound, which no
    model lets fall below ours; `start` is what stands if no better plan is found.
    """
    began = time.perf_counter()
    answer = SOLVERS[name].solve(model, Request(hint=hint, seconds=seconds))
    spent = time.perf_counter() - began
    if answer.ended == "infeasible":
        raise SolverError(f"{name} claims that a layer has no plan, but every one has.")
    price = np.inf if start is None else start.objective
    if answer.values is not None:
        slots = model.slots(problem, answer.values)
        plan = Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)
        price = min(price, evaluate(problem, plan).objective)
    bound = max(answer.bound * model.unit, lower_bound(problem).total)
    gap = 0.0 if price <= bound else price / bound - 1
    return (spent if gap <= CLOSED else seconds), gap


def told(found: list[tuple[float, float]]) -> str:
    """Medians over seeds: seconds if most of them were closed, else the gap."""
    closed = sum(gap <= CLOSED for _, gap in found)
    of = f"({closed} of {len(found)})"
    if 2 * closed > len(found):
        return f"{statistics.median(seconds for seconds, _ in found):.2f} s {of}"
    gap = statistics.median(gap for _, gap in found)
    return "no plan" if gap == np.inf else f"{gap:.1e} {of}"


def formulations(instances: Path) -> Iterator[Row]:
    """Even split as a choice of counts (the package's) and as products of shares: one layer, 3 s.

    Medians of five seeds. Columns and rows without a cutoff; the linear relaxation over the fluid
    bound, without the bounds that we know. Then of each solver the seconds until its plan is
    proven to 2e-6 if it is in most seeds (in how many), or else its gap after 3 s. `our plan`: a
    hint, and the same cutoff for all.
    """
    for experts, slots, ranks in SHAPES:
        problems = [generate((1, experts, slots, ranks), seed).aggregate() for seed in SEEDS]
        starts = [evaluate(one, solve(one, work_limit=STEPS).plan) for one in problems]
        fluid = [one.total(one.fluid) for one in problems]
        for way in WAYS:
            models, cut = [], []
            for one, start in zip(problems, starts, strict=True):
                models.append(formulate(way, one, np.full((1, 1), np.inf)))
                least = lower_bound(one).per_layer
                cut.append(formulate(way, one, cutoffs(one, least, start, alone=True)))
            row: Row = {"case": f"{experts} / {slots} / {ranks}", "formulation": way}
            row["columns"] = f"{statistics.median(each.cost.size for each in models):.0f}"
            row["rows"] = f"{statistics.median(each.row_low.size for each in models):.0f}"
            ratios = [relaxation(one) / by for one, by in zip(models, fluid, strict=True)]
            row["relaxation"] = f"{statistics.median(ratios):.4f}"
            for name in ("cp-sat", "highs"):
                cold = [
                    attempt(name, model, one, SECONDS)
                    for model, one in zip(models, problems, strict=True)
                ]
                warm = [
                    attempt(name, model, one, SECONDS, start, hint(model, one, start.plan))
                    for model, one, start in zip(cut, problems, starts, strict=True)
                ]
                row[f"{name} from nothing"] = told(cold)
                row[f"{name} from our plan"] = told(warm)
            yield row
