"""Benchmark of large-neighbourhood search by CP-SAT against the package's own search.

A step takes the slowest rank and a few others, frees every replica on them, and lets CP-SAT place
these anew, all else fixed. An expert that lies on freed ranks only may change its number of
replicas; one that lies elsewhere, too, keeps it, so that no other rank's time changes. Steps are
repeated until time is up; a result that is no slower is kept.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.bench_case import NEVER, REPORT_SEEDS, Row
from moeplace.bench_formulations import placed, plan_of
from moeplace.bench_hard import _drifted
from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.exact.layer import Builder
from moeplace.exact.model import Model
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.instances import generate, read_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.solve import solve

SEEDS = REPORT_SEEDS
#: Experts, slots, ranks.
SHAPES = ((256, 256, 32), (256, 288, 32), (256, 320, 64))
#: Seconds of either search, and of the plan that both start from.
SECONDS, FIRST = 10.0, 0.2
#: Ranks that are freed at once, and CP-SAT's deterministic seconds for one step.
FREED, WORK = (3, 4, 5, 6), 0.1
#: Under a budget of moves, ranks that have received a copy are this much likelier to be freed.
LIKELIER = 8.0


@dataclass(kw_only=True, eq=False)
class Neighbourhood:
    """The freed part of a plain layer under even routing.

    Attributes
    ----------
    ranks : array [freed ranks]
    experts : array [freed experts]
    held : array of bool [freed experts, freed ranks]
        Today's replicas there.
    outside : array [freed experts]
        Replicas on other ranks, which stay.
    moves : int or None
        Copies that the freed ranks may receive.
    """

    ranks: IntArray
    experts: IntArray
    held: BoolArray
    outside: IntArray
    moves: int | None


def free(problem: Problem, held: BoolArray, ranks: IntArray) -> Neighbourhood:
    """What lies on `ranks`, of a placement `held` [experts, ranks]."""
    experts = np.flatnonzero(held[:, ranks].any(axis=1))
    inside = held[np.ix_(experts, ranks)]
    moves = None
    rules = problem.max_moves
    if rules is not None:
        received = held & ~placed(problem, rules.current)
        received[:, ranks] = False
        moves = int(rules.allowance()[0]) - int(received.sum())
    return Neighbourhood(
        ranks=ranks,
        experts=experts,
        held=inside,
        outside=held[experts].sum(axis=1) - inside.sum(axis=1),
        moves=moves,
    )


def to_model(problem: Problem, part: Neighbourhood, makespan: float) -> tuple[Model, FloatArray]:
    """The freed part as a model in units of `makespan`, and how it lies today as a solution."""
    make = Builder()
    hint: list[float] = []

    def column(name: str, value: float, whole: bool = True) -> int:
        hint.append(value)
        return make.column(name, 0.0, 1.0, whole=whole, cost=0.0 if whole else 1.0)

    count, size = part.held.sum(axis=1), part.ranks.size
    old = np.ones(part.held.shape, dtype=np.bool_)
    if problem.max_moves is not None:
        old = placed(problem, problem.max_moves.current)[np.ix_(part.experts, part.ranks)]
    load = problem.tokens[0, 0, part.experts]
    caps = np.minimum(problem.cluster.slots, problem.experts)[part.ranks].tolist()
    speeds = problem.cluster.speeds[part.ranks] * makespan
    spare = sum(caps) - part.experts.size
    longest = column(
        "T", float(((load / (count + part.outside)) @ part.held / speeds).max()), False
    )
    carried: list[list[tuple[int, float]]] = [[] for _ in range(size)]
    held: list[tuple[int, int, int, int]] = []
    received: list[int] = []
    for n, expert in enumerate(part.experts.tolist()):
        now = int(count[n])
        levels = [now] if part.outside[n] else list(range(1, min(size, spare + 1) + 1))
        chosen = [column(f"z_e{expert}_c{c}", float(c == now)) for c in levels]
        make.row(f"count_e{expert}", chosen, 1.0, 1.0, 1.0)
        for c, z in zip(levels, chosen, strict=True):
            mine = []
            for at, rank in enumerate(part.ranks.tolist()):
                value = float(part.held[n, at] and c == now)
                x = column(f"x_e{expert}_g{rank}_c{c}", value)
                mine.append(x)
                held.append((x, 0, expert, rank))
                carried[at].append((x, load[n] / (c + part.outside[n])))
                if not old[n, at]:
                    received.append(x)
                make.row(f"on_e{expert}_g{rank}_c{c}", [x, z], [1.0, -1.0], -np.inf, 0.0)
            make.row(f"copies_e{expert}_c{c}", [*mine, z], [*[1.0] * size, -float(c)], 0.0, 0.0)
    for at, rank in enumerate(part.ranks.tolist()):
        columns = [x for x, _ in carried[at]]
        tokens = np.array([share for _, share in carried[at]]) / speeds[at]
        make.row(f"slots_g{rank}", columns, 1.0, -np.inf, float(caps[at]))
        make.row(f"time_g{rank}", [*columns, longest], [*tokens, -1.0], -np.inf, 0.0)
    if part.moves is not None and received:
        make.row("moves", received, 1.0, -np.inf, float(part.moves))
    made = Model(
        cost=np.array(make.cost), low=np.array(make.low), high=np.array(make.high),
        whole=np.array(make.whole, dtype=np.bool_), rows=make.rows(),
        row_low=np.array(make.row_low), row_high=np.array(make.row_high), columns=make.columns,
        row_names=make.row_names, constant=0.0, unit=makespan, layers=(0,),
        held=np.array(held), blocks=[],
    )  # fmt: skip
    return made, np.array(hint)


def times(problem: Problem, held: BoolArray) -> FloatArray:
    """Time [ranks] of a placement [experts, ranks] under even routing."""
    tokens: FloatArray = (problem.tokens[0, 0] / held.sum(axis=1)) @ held
    return tokens / problem.cluster.speeds


def step(
    problem: Problem, held: BoolArray, ranks: IntArray, seed: int, seconds: float | None = None
) -> BoolArray:
    """The placement [experts, ranks] with all on `ranks` placed anew, or as it is if no faster."""
    part = free(problem, held, ranks)
    before = times(problem, held)[ranks].max()
    model, hint = to_model(problem, part, float(before))
    request = Request(hint=hint, work=WORK, seconds=seconds, gap=1e-7, seed=seed)
    answer = SOLVERS["cp-sat"].solve(model, request)
    if answer.values is None:
        return held
    found = held.copy()
    found[:, ranks] = False
    chosen = model.held[answer.values[model.held[:, 0]] > 0.5]
    found[chosen[:, 2], chosen[:, 3]] = True
    return found if times(problem, found)[ranks].max() < before else held


def repeated(problem: Problem, start: Plan, seconds: float, seed: int) -> tuple[Plan, int]:
    """Steps from a plan until time is up; the plan, and how many steps were made.

    The slowest rank is freed, and others at random; under a budget of moves rather those that
    have spent some of it, without which little could change.
    """
    end = time.perf_counter() + seconds
    random = np.random.default_rng(seed)
    held, steps = placed(problem, start), 0
    usable = np.flatnonzero(problem.cluster.slots > 0)
    target = lower_bound(problem).total * (1 + NEVER)
    while (left := end - time.perf_counter()) > 0.01:
        now = times(problem, held)
        order = usable[np.argsort(now[usable])]
        if now.max() <= target:
            break
        size = min(int(random.choice(FREED)), order.size)
        likely = np.ones(problem.ranks)
        if problem.max_moves is not None:
            spent = (held & ~placed(problem, problem.max_moves.current)).any(axis=0)
            likely += (LIKELIER - 1) * spent
        likely = likely[order[:-1]] / likely[order[:-1]].sum()
        others = random.choice(order[:-1], size - 1, replace=False, p=likely)
        ranks = np.sort(np.append(others, order[-1]))
        held = step(problem, held, ranks, int(random.integers(1 << 30)), left)
        steps += 1
    return plan_of(problem, held), steps


def _made(shape: tuple[int, int, int]) -> Callable[[int], Problem]:
    return lambda seed: generate((1, *shape), seed).aggregate()


def _real(instances: Path, number: int) -> Problem:
    """Of one of the real instances of 16 ranks and 5 slots each, the layer with most load."""
    path = sorted((instances / "real").glob("*_16x5_*.json"))[number]
    one = read_instance(path).aggregate()
    layer = int(one.tokens[0].sum(axis=1).argmax())
    loads = LoadHistogram(tokens=one.loads.tokens[:, [layer]])
    return Problem(loads, one.cluster, routing="even")


def lns(instances: Path) -> Iterator[Row]:
    """CP-SAT places a few ranks anew, again and again, against our search: one layer, 10 s each.

    Both from the plan that `auto` has after 0.2 s; gaps are medians of five seeds (of the real
    instances: the five fleets), over the same bound. `better`: in how many seeds CP-SAT's plan is
    the better one. `freed`: 3 to 6 ranks a step, the slowest and others at random.
    """
    cases: list[tuple[str, Callable[[int], Problem]]] = [
        *(("{} / {} / {}".format(*shape), _made(shape)) for shape in SHAPES),
        ("real, 64 / 80 / 16", lambda seed: _real(instances, seed - SEEDS[0])),
        ("256 / 288 / 32, 8 moves", _drifted(8)),
    ]
    for name, problem_of in cases:
        found: list[tuple[float, float, float, int]] = []
        for seed in SEEDS:
            problem = problem_of(seed)
            start = solve(problem, time_limit=FIRST, gap=NEVER, seed=seed)
            ours = solve(problem, time_limit=SECONDS, gap=NEVER, seed=seed, start=start.plan)
            plan, steps = repeated(problem, start.plan, SECONDS, seed)
            theirs = evaluate(problem, plan)
            assert theirs.legal, theirs.violations
            prices = [each.objective / ours.lower_bound - 1 for each in (start, ours, theirs)]
            found.append((prices[0], prices[1], prices[2], steps))
        first, mine, lns_gap, steps_made = (statistics.median(part) for part in zip(*found))  # noqa: B905
        yield {
            "case": name,
            "gap of the start": f"{first:.1e}",
            "our search": f"{mine:.1e}",
            "CP-SAT on freed ranks": f"{lns_gap:.1e}",
            "steps": f"{steps_made:.0f}",
            "better": f"{sum(each[2] < each[1] for each in found)} of {len(found)}",
        }
