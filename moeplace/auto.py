"""The portfolio `auto`: our search, then proofs of what is left open, and the search again."""

from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from moeplace.bounds import FEW, few_moves, lifted_bound, longest
from moeplace.claims import EXHAUSTIVE, Bound, Claim, with_claims
from moeplace.clash import Clash, sought
from moeplace.clash import Search as RuleSearch
from moeplace.constraints import MaxMoves, NodeGroups, ReplicaBudget
from moeplace.dual_bound import DUAL, price_layers, pricing_seconds, worth_pricing
from moeplace.errors import ProblemError
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.result import Limits

if TYPE_CHECKING:
    from moeplace.search.run import Run

#: Share of time and work that comes before proofs, and before an exact method.
WARM_SHARE = 0.2
#: Search steps of a small layer before proofs are tried.
WARM_STEPS = 200_000
#: Replicas that may exist in a layer up to which every placement is tried.
SMALL = 300
#: Nodes of the exhaustive search of a tiny layer, for each makespan; and of them in a second.
NODES, PACE = 10_000_000, 20_000_000
#: Deterministic seconds of CP-SAT for a tiny layer that the exhaustive search cannot decide.
ASKED = 1.0
#: Seconds a layer from which it is asked at all: to build a model takes some of them.
ASK_LEAST = 0.1
#: Shares of the time limit: after which a search without a plan is broken off to see whether rules
#: clash, and which is left to go on after that.
PATIENCE, RETRY_SHARE = 0.6, 0.15
#: Seconds a layer from which the bound on few moves is searched deeper, and by when that ends.
DEEP, PROOF_SHARE = 0.5, 0.5
#: Time for one round of prices of all layers, as a share of the limit, up to which it comes early;
#: else the search has half of the limit first, gaps wider than this are looked at, up to a share.
EARLY, LATE_SHARE, WIDE, LATE = 0.25, 0.5, 1e-3, 0.9


def auto(run: "Run", start: Plan | None, rules: RuleSearch) -> Clash | None:
    """Our search; where that finds no plan for a while, whether rules clash, and the search again.

    A clash rests on CP-SAT's word, unless it can be counted.
    """
    if not run.problem.constraints:
        _searched_and_proven(run, start)
        return None
    run.patience = PATIENCE
    _searched_and_proven(run, start)
    run.patience = 1.0
    if run.best is not None:
        return None
    clash = sought(run, rules, 1 - RETRY_SHARE)
    if clash is None and (run.best is not None or run.limits.time is not None):
        searched(run, start if run.best is None else run.best.plan, _rest(run))
    return clash


def _searched_and_proven(run: "Run", start: Plan | None) -> None:
    """The portfolio; then proofs, where few replicas may exist or move, and the portfolio again."""
    problem, limit = run.problem, run.limits.time
    small, dual = is_small(problem), worth_pricing(problem)
    if asks(problem) and limit is not None and limit < ASK_LEAST * problem.layers:
        small = False
    few = problem.max_moves is not None and problem.routing == "even"
    few = few and limit is not None and limit >= DEEP * problem.layers
    if dual and limit is not None:  # for one layer there must be time
        each = pricing_seconds(problem) / (problem.windows * problem.layers)
        dual = each <= (LATE - LATE_SHARE) * limit
    if not (small or few or dual):
        searched(run, start, run.limits)
        return
    late = dual and not (small or few) and limit is not None
    late = late and pricing_seconds(problem) > EARLY * (limit or 0.0)
    share = LATE_SHARE if late else WARM_SHARE
    steps = share * run.steps
    steps = min(steps, WARM_STEPS * problem.layers) if small else steps
    warm = Limits(
        time=None if limit is None else share * limit,
        work=int(steps) if steps < float("inf") else None,
        gap=run.limits.gap,
    )
    searched(run, start, warm)
    if small and run.best is not None:
        _try_all(run)
    if small and run.best is not None and asks(problem) and run.open.any():
        _ask(run)
    price_open(run, late)
    if few and run.best is not None and run.best.legal:
        left = np.flatnonzero(run.open).tolist()
        for turn, layer in enumerate(left):
            high = run.bound.per_layer.copy()  # only this layer is searched
            high[:, layer] = run.best.makespan[:, layer]
            seconds = (PROOF_SHARE * (limit or 0.0) - run.seconds) / (len(left) - turn)
            if seconds <= 0:
                break
            each = seconds / problem.windows
            lifted = few_moves(problem, run.bound.per_layer, high, each)
            run.bound = lifted_bound(problem, run.bound, lifted, FEW)
    if run.best is not None and not run.open.any():
        return
    near = run.best is not None and (small or few)
    searched(run, run.best.plan if near and run.best is not None else start, _rest(run))


def _rest(run: "Run") -> Limits:
    """What is left of the work; time is counted from the call."""
    if run.steps == float("inf"):
        return run.limits
    return replace(run.limits, work=max(int(run.steps) - run.work, 0))


def price_open(run: "Run", late: bool = False) -> None:
    """Layers that are open: prices prove more where rules are that other arguments do not know.

    They may last to the end of a part of the limit, a larger one if it is `late`.
    """
    problem, bound = run.problem, run.bound
    if not worth_pricing(problem) or not run.open.any():
        return
    high = longest(problem, problem.tokens, problem.base)
    if run.best is not None:
        wanted = run.open & (run.best.makespan > bound.per_layer * (1 + late * WIDE))
        high = np.where(wanted, run.best.makespan, bound.per_layer)
    limit = run.limits.time
    seconds = None if limit is None else (LATE if late else PROOF_SHARE) * limit - run.seconds
    lifted, prices = price_layers(problem, bound.per_layer, high, seconds)
    run.bound = lifted_bound(problem, bound, lifted, DUAL, prices)


def _try_all(run: "Run") -> None:
    """Tiny layers: the exhaustive search finds a better placement, or proves that none is.

    In several windows where their mean counts, which each layer then serves by itself.
    """
    from moeplace.exhaustive import Exhaustive

    problem = run.problem
    mean = problem.objective == "mean" or (problem.objective == "cvar" and problem.cvar_alpha == 0)
    if problem.windows > 1 and not mean:
        return
    for layer in np.flatnonzero(run.open).tolist():
        tiny = Exhaustive(problem, 0 if problem.windows == 1 else None, layer)
        while run.best is not None and not run.late(0.6):
            price = float(problem.mean(run.best.makespan)[layer])
            nodes = NODES
            if run.limits.time is not None:
                nodes = min(nodes, int((0.6 * run.limits.time - run.seconds) * PACE))
            none_better, slots = tiny.search(price * (1 - 1e-10), nodes)
            if none_better:
                run.bound = _tried(run, layer, price * (1 - 1e-10))
            if slots is None:
                break
            every = run.best.plan.slots.copy()
            every[layer] = slots
            before = run.best
            run.offer(Plan(slots=every, rank_slots=problem.cluster.slots, experts=problem.experts))
            if run.best is before:  # a rule that the search does not know
                break


def _tried(run: "Run", layer: int, price: float) -> Bound:
    """The bound, now that no placement of the layer costs less."""
    problem, bound = run.problem, run.bound
    if problem.windows == 1:
        better = bound.per_layer.copy()
        better[0, layer] = price
        return lifted_bound(problem, bound, better, EXHAUSTIVE)
    value = price * float(problem.layer_weight[layer])
    claim = Claim(layers=(layer,), weight=problem.window_weight, value=value, by=EXHAUSTIVE)
    return with_claims(problem, bound, [claim])


def asks(problem: Problem) -> bool:
    """Whether the exhaustive search cannot decide a tiny layer: CP-SAT is asked there."""
    rules = any(isinstance(r, MaxMoves | NodeGroups | ReplicaBudget) for r in problem.constraints)
    return problem.windows > 1 or problem.routing == "weighted" or rules


def _ask(run: "Run") -> None:
    """Tiny layers that the exhaustive search cannot decide: CP-SAT, for part of the time."""
    from moeplace.exact.model import refuse_table
    from moeplace.exact.run import STEPS, Exact
    from moeplace.search.run import Run

    with suppress(ProblemError):
        refuse_table(run.problem)
        left = ASKED * run.problem.layers
        if run.limits.work is not None:
            left = min(left, max(run.limits.work - run.work, 0) / STEPS / 2)
        if left < 0.01 * ASKED:  # too little to build a model for
            return
        work = left if run.limits.time is None else None
        stage = Run(  # several workers of CP-SAT are not reproducible
            run.problem, run.bound, run.limits, run.began, run.seed, 1, run.progress, run.best
        )
        exact = Exact(stage, "cp-sat", work=work, share=0.6)
        try:
            exact.solve()
        finally:
            run.best, run.bound = stage.best, stage.bound
        if exact.interrupted:
            raise KeyboardInterrupt


@cache
def rehearse_tiny() -> None:
    """Load the kernel of the exhaustive search, before the clock starts."""
    from moeplace.exhaustive import Exhaustive
    from moeplace.hardware import Cluster
    from moeplace.loads import LoadHistogram

    cluster = Cluster.from_speeds([1.0, 2.0], 2)
    tiny = Problem(LoadHistogram(tokens=np.array([[[3.0, 2.0, 1.0]]])), cluster)
    Exhaustive(tiny, 0, 0).search(3.0, 10)


def is_small(problem: Problem) -> bool:
    """Whether few enough replicas may exist in a layer for every placement to be tried."""
    most = int(problem.allowed.sum(axis=(1, 2)).max()) * problem.windows
    return problem.routing in ("even", "weighted") and most <= SMALL


def searched(run: "Run", start: Plan | None, limits: Limits) -> None:
    """Run the portfolio under `limits` and keep what it finds, also when interrupted."""
    from moeplace.search.portfolio import search
    from moeplace.search.run import Run

    stage = Run(
        run.problem, run.bound, limits, run.began, run.seed, run.workers, run.progress, run.best
    )
    stage.patience = run.patience
    try:
        search(stage, start)
    finally:
        if stage.best is not None:
            run.best = stage.best
        run.nearest = stage.nearest
        run.work += stage.work
