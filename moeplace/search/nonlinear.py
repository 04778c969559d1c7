"""Planning under latency planes or tables: linear planners as a start, then the true times.

1. The planners for linear speeds solve the problem with each rank's tokens per second next to
   the makespan that is aimed at (`latency.linear`), rules and all.
   Under an engine's own dispatch rule, or a limit on traffic off nodes, the plan for even
   routing by the true times is tried beside it, and that is all.
2. Without rules over placements, layers are also constructed with as many replicas as the
   makespan needs at the least, and with a few more: in decode an activated replica costs more
   than the tokens that it takes over.
3. The best start of each layer is searched by its true times (`latency.TrueTimes`), in all
   windows; under weighted routing shares follow (`split.resplit`).
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.bounds import lower_bound
from moeplace.claims import layer_floor
from moeplace.constraints import MaxOffNode
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search import portfolio
from moeplace.search.construct import adopt, construct
from moeplace.search.in_windows import all_windows, true_targets
from moeplace.search.latency import TrueTimes, linear
from moeplace.search.run import Run, part
from moeplace.search.state import OLD, State

#: Share of time and work for the linear planners.
LINEAR_SHARE = 0.15
#: Trials of each layer by which starts are compared; fewer where these parts of the limits end.
SHORT, SHORT_SHARE, SHORT_WORK = 2_000, 0.35, 0.1
#: Extra replicas of the starts that are constructed, as parts of the spare slots beyond the
#: fewest that the makespan needs.
EXTRA = (0.0, 0.1, 0.5)


def by_true_times(run: Run, start: Plan | None, pool: ThreadPoolExecutor) -> None:
    """Leave the best legal plan found in `run.best`, if there is one."""
    problem = run.problem
    _by_speeds(run, start)
    if run.best is not None and not run.open.any():
        return
    if _unknown(problem):
        _as_if_even(run, start)
        return
    if problem.max_moves is None and problem.node_groups is None:
        _few_replicas(run, pool)
    if run.kept is None:
        return
    kept = run.kept.plan
    state = _state(run, kept)
    try:
        layers = np.arange(problem.layers)
        all_windows(run, state, pool, layers, allowance=_allowance(run, kept))
    finally:
        run.offer(state.plan(problem))


def _unknown(problem: Problem) -> bool:
    """Whether the search by true times does not know the engine's rule, or traffic off nodes."""
    return problem.routing not in ("even", "weighted") or problem.max_off_node is not None


def _as_if_even(run: Run, start: Plan | None) -> None:
    """What the search by true times finds for even routing, priced under the engine's rule."""
    problem = run.problem
    rules = [rule for rule in problem.constraints if not isinstance(rule, MaxOffNode)]
    even = replace(problem, routing="even", constraints=rules)
    one = Run(
        even, lower_bound(even, prices=False), part(run, 1.0, 1), time.perf_counter(), run.seed,
        run.workers, None, quota=run.quota,
    )  # fmt: skip
    try:
        portfolio.search(one, None if start is None else start.with_split(None))
    finally:
        run.work += one.work
        if one.kept is not None:
            run.offer(one.kept.plan.with_split(None))


def _by_speeds(run: Run, start: Plan | None) -> None:
    """What the linear planners find, priced truly."""
    problem = run.problem
    plain = linear(problem)
    one = Run(
        plain, lower_bound(plain, prices=False), part(run, LINEAR_SHARE, 1), time.perf_counter(),
        run.seed, run.workers, None, quota=run.quota,
    )  # fmt: skip
    try:
        portfolio.search(one, start)
    finally:
        run.work += one.work
        if one.kept is not None:
            run.offer(one.kept.plan)
            if one.kept.plan.split is not None:  # best shares by true times
                run.offer(one.kept.plan.with_split(None))


def _few_replicas(run: Run, pool: ThreadPoolExecutor) -> None:
    """Constructions with the fewest replicas that the makespan needs, and with some more."""
    problem = run.problem
    slots = int(np.minimum(problem.cluster.slots, problem.experts).sum())
    most = np.full(problem.layers, slots) if run.quota is None else run.quota
    least = np.minimum(_needed(problem, layer_floor(problem, run.bound)), most)
    layers, cold = np.arange(problem.layers), np.zeros((problem.layers, 2))
    trials = SHORT
    if run.steps < float("inf"):
        each = SHORT_WORK * run.steps / (len(EXTRA) * problem.layers * problem.windows)
        trials = max(min(trials, int(each)), 1)
    plain = linear(problem)
    for extra in EXTRA:
        if run.late(SHORT_SHARE):
            return
        state = State.of(plain, run.seed, (least + extra * (most - least)).astype(np.int64))
        if construct(state) >= 0:
            return
        times = TrueTimes(problem, state, _unlimited(problem), true_targets(run))
        times.improve(layers, trials, cold, problem.window_weight, pool, run.workers)
        run.work += trials * problem.layers * problem.windows
        run.offer(state.plan(problem))


def _needed(problem: Problem, seconds: FloatArray) -> IntArray:
    """Replicas of each layer [layers] if experts have the fewest that end by `seconds` [layers]."""
    tokens, base = problem.mean_load
    holds = problem.cluster.slots > 0
    room = np.maximum(problem.cluster.tokens_by(seconds[:, None]) - base, 0.0)[:, holds]
    reach = np.sort(room, axis=1)[:, ::-1] * np.arange(1, holds.sum() + 1)
    reach = np.maximum.accumulate(reach, axis=1)
    copies = 1 + (reach[:, None, :] < tokens[:, :, None]).sum(axis=2)
    copies = np.minimum(copies, problem.most_replicas)
    return np.asarray(np.maximum(copies, problem.pinned.sum(axis=2)).sum(axis=1))


def _state(run: Run, kept: Plan) -> State:
    """A state that holds the kept plan, with the marks that rules need."""
    problem = run.problem
    state = State.of(problem, run.seed, run.quota)
    adopt(state, kept, np.arange(problem.layers))
    if problem.node_groups is not None:
        portfolio.stay_on_nodes(problem, state, kept)
    if problem.max_moves is not None:
        old = problem.max_moves.current
        layer, slot = np.nonzero(old.slots >= 0)
        state.on[layer, old.rank_of_slot[slot], old.slots[layer, slot]] |= OLD
    return state


def _allowance(run: Run, kept: Plan) -> IntArray:
    """Copies that each layer [layers] may receive.

    Under a budget over all layers each keeps what the kept plan gives it; what is left over goes
    to the layers with the most time above their bounds.
    """
    problem, rules = run.problem, run.problem.max_moves
    if rules is None:
        return _unlimited(problem)
    allowance = np.array(rules.allowance())
    if rules.total is not None:
        used = kept.moves_from(rules.current).sum(axis=1)
        left = max(int(rules.total) - int(used.sum()), 0)
        assert run.kept is not None
        above = problem.mean(run.kept.makespan - run.bound.per_layer) * problem.layer_weight
        order = np.argsort(-above, kind="stable")
        more = np.clip(allowance - used, 0, None)[order]
        allowance = used
        allowance[order] += np.diff(np.minimum(more.cumsum(), left), prepend=0)
    return allowance


def _unlimited(problem: Problem) -> IntArray:
    return np.full(problem.layers, 1 << 40)
