"""The portfolio behind `solve(method="auto")`: which planner runs when, under which limits."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np

from moeplace._check import IntArray, frozen
from moeplace.bounds import lower_bound
from moeplace.constraints import (
    Constraint,
    MaxMoves,
    NodeGroups,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.dispatch import FIXED
from moeplace.errors import PolicyNotApplicable
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.latency import Planes
from moeplace.loads import LoadHistogram
from moeplace.nodes_bound import affordable, share_groups
from moeplace.plan import EMPTY, Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, Routing
from moeplace.result import Limits
from moeplace.search.aims import Aims
from moeplace.search.budget import allot, points
from moeplace.search.construct import adopt, construct
from moeplace.search.improve import improve
from moeplace.search.in_windows import RISK_STEP, all_windows, under_rule
from moeplace.search.moves import Moves
from moeplace.search.nodes import assign
from moeplace.search.polish import Polish
from moeplace.search.pour import join_ranks, pour, pours
from moeplace.search.run import Run, chunks, part
from moeplace.search.split import at_best_shares
from moeplace.search.state import BARRED, HELD, PINNED, State
from moeplace.search.windows import Windows

#: What is tried besides our own search, on layers where that leaves a gap.
RIVALS = ("contiguous", "eplb", "vibe", "eplb_lpt")
#: No rival is tried later than this share of the time limit.
RIVAL_SHARE = 0.3
#: Share of time and work that a problem of several windows spends on the mean load.
MEAN_SHARE = 0.15
#: The same under a budget of moves.
MOVES_SHARE = 0.6
#: Share of both that is spent near a start plan, if that does not bring all within the gap.
NEAR_SHARE = 0.3
#: Share of both for the search under even routing, if the routing is weighted.
WEIGHTED_SHARE = 0.3
#: Share of both after which several windows under weighted routing get shares of their own.
EVEN_SHARE = 0.6
#: Share of both for finding out how many replicas of a budget each layer should have.
BUDGET_SHARE = 0.5


@cache
def rehearse(
    weighted: bool,
    several: bool,
    near: bool,
    grouped: bool,
    rule: Routing = "even",
    nonlinear: bool = False,
) -> None:
    """Solve a tiny problem of this kind: loads kernels, and compiles them after installation.

    Called before the clock starts, so that neither counts against a time limit.

    Parameters
    ----------
    weighted : bool
        Weighted routing.
    several : bool
        Several windows.
    near : bool
        From a current plan: `MaxMoves` or a start plan.
    grouped : bool
        `NodeGroups`.
    rule : str
        The routing, unless it is weighted.
    nonlinear : bool
        Latency planes or a table.
    """
    if nonlinear:  # begins with the linear planners, which the tiny problem may not get to
        rehearse(weighted, several, near, grouped, rule)
    tokens = np.array([[9.0, 7, 5, 3, 1], [1, 3, 5, 7, 9]])[: 1 + several, None]
    cluster = Cluster(speeds=np.array([1, 0.9, 1.1]), slots=np.full(3, 2), nodes=np.arange(3))
    current = Plan(slots=[[0, 1, 2, 3, 4, -1]], rank_slots=cluster.slots, experts=5)  # type: ignore[arg-type]
    rules: list[Constraint] = [TokenCapacity(100.0)]  # not tight: what it needs besides is run
    rules += [MaxMoves(current, per_layer=2)] if near else []
    rules += [NodeGroups(np.array([0, 0, 1, 1, 2]))] if grouped else []
    if nonlinear:
        planes = Planes(startup=[1.0], activation=[1.0], compute=[1.0])  # type: ignore[arg-type]
        cluster = replace(cluster, planes=planes)
    problem = Problem(
        LoadHistogram(tokens=tokens, passes=np.ones(1 + several)),
        cluster,
        routing="weighted" if weighted else rule,
        constraints=rules,
    )
    limits = Limits(work=20_000, gap=0.0)
    run = Run(problem, lower_bound(problem, prices=False), limits, time.perf_counter(), 0, 1, None)
    search(run, None)
    if near:  # a start plan is left where it does not do
        rehearse(weighted, several, False, grouped, rule, nonlinear)


def search(run: Run, start: Plan | None) -> None:
    """Leave the best legal plan found within the limits in `run.best`, if there is one."""
    if start is not None:
        run.offer(start, "The start plan")
        run.from_start = True
    with ThreadPoolExecutor(run.workers) as pool:
        if run.problem.replica_budget is not None:
            if pours(run.problem) and not run.problem.cluster.nonlinear:
                pour(run)
                if run.best is not None and not run.open.any():
                    return
            _share_replicas(run)
        if run.problem.cluster.nonlinear:
            from moeplace.search.nonlinear import by_true_times  # imports this module

            by_true_times(run, start, pool)
        elif run.problem.max_moves is not None:
            _few_moves(run, run.problem.max_moves.current, run.problem.max_moves.allowance(), pool)
        else:
            _afresh(run, start, pool)


def _afresh(run: Run, start: Plan | None, pool: ThreadPoolExecutor) -> None:
    """Exact window, construction and search, rivals where a gap is left, then all windows."""
    problem = run.problem
    if run.best is not None and not run.open.any():
        return
    if pours(problem):
        pour(run)
        if run.best is not None and not run.open.any():
            return
    state = State.of(problem, run.seed, run.quota)
    if problem.node_groups is not None:
        groups = problem.node_groups.of(problem.experts)
        alone = problem.windows == 1 and len(problem.constraints) == 1
        alone = alone and affordable(problem, run.limits.time)
        shared = share_groups(problem) if alone else None
        if shared is None:
            node_of = assign(problem, groups, run.targets, run.seed)
        else:
            node_of = shared.node_of[0]
        if node_of is None:
            return
        _bar_nodes(problem, state, node_of)
    aims = _aims(run, state)
    if construct(state) >= 0:
        return
    fixed = problem.routing in FIXED
    share = 1.0 if problem.windows == 1 and not fixed else MEAN_SHARE
    spare = int(np.minimum(problem.cluster.slots, problem.experts).sum()) - problem.experts
    weighted = problem.routing == "weighted" and spare > 0  # without replicas there are no shares
    if weighted:
        share = WEIGHTED_SHARE
    try:
        if start is not None and problem.node_groups is None:
            _near_start(run, state, start, pool)
            if problem.windows > 1 and not weighted and run.open.any():
                _near_start_in_windows(run, pool)
            if not run.open.any():
                return
        _descend(run, state, aims, pool, share, rounds=1)
        run.offer(state.plan(problem))
        if not run.open.any():
            return
        for name in (*RIVALS, "top_k") if problem.max_off_node is not None else RIVALS:
            if not run.late(RIVAL_SHARE) and run.quota is None:  # they fill all slots
                try:
                    run.offer(POLICIES[name](problem))
                except PolicyNotApplicable:
                    continue
        assert run.kept is not None
        if problem.windows == 1 and not weighted and problem.node_groups is None:
            _take_better(state, run.kept.plan)
        if weighted and problem.windows == 1 and pours(problem):
            join_ranks(run)
        _descend(run, state, aims, pool, share)
        if problem.windows > 1 and not weighted and not fixed:
            run.offer(state.plan(problem))
            if run.quota is not None:
                adopt(state, run.kept.plan, _affordable(state, run.kept.plan))
            all_windows(run, state, pool, np.arange(problem.layers))
        elif fixed:
            run.offer(state.plan(problem))
            under_rule(run, state, pool)
        if weighted and problem.windows > 1:  # what is good with equal shares is better with others
            run.offer(state.plan(problem))
            adopt(state, run.kept.plan, _affordable(state, run.kept.plan))
            all_windows(run, state, pool, np.arange(problem.layers), EVEN_SHARE)
        if weighted:
            run.offer(state.plan(problem))
            adopt(state, run.kept.plan, _affordable(state, run.kept.plan))
            unlimited = np.full(problem.layers, 1 << 40)
            _polish(run, state, unlimited, pool)
    finally:  # also when interrupted
        run.offer(state.plan(problem))


def _holding(run: Run, plan: Plan) -> State:
    """A state that holds a plan's placement in all layers."""
    state = State.of(run.problem, run.seed, run.quota)
    adopt(state, plan, np.arange(run.problem.layers))
    return state


def _aims(run: Run, state: State) -> Aims:
    """Aims at the targets within the gap."""
    return Aims(run.problem, state, run.targets * (1 + run.limits.gap) / state.unit)


def _near_start(run: Run, state: State, start: Plan, pool: ThreadPoolExecutor) -> None:
    """Take layers that the start plan is best in, or that few steps bring within the gap."""
    near = _holding(run, start)
    layers = np.arange(run.problem.layers)
    _take_better(state, start)
    slots = run.problem.cluster.total_slots
    target = _aims(run, near).target
    moves = Moves(near, np.full(layers.size, slots))
    moves.mend(_broken(near))
    moves.improve(layers, np.ones_like(layers), target, pool, run.workers)  # greedy, no kicks
    near_plan = near.plan(run.problem)
    run.offer(near_plan)
    adopt(state, near_plan, np.flatnonzero(near.makespan <= target))


def _broken(state: State) -> IntArray:
    """Layers whose placement breaks a pin, a bar or a limit of replicas."""
    held, barred, pinned = ((state.on & bit) > 0 for bit in (HELD, BARRED, PINNED))
    misplaced = ((held & barred) | (pinned & ~held)).any(axis=(1, 2))
    miscounted = ((state.copies < state.least) | (state.copies > state.most)).any(axis=1)
    return np.flatnonzero(misplaced | miscounted)


def _near_start_in_windows(run: Run, pool: ThreadPoolExecutor) -> None:
    """Several windows: only changes that help, from the best so far, in layers above the gap."""
    assert run.best is not None
    near = _holding(run, run.best.plan)
    every = Windows(run.problem, near)
    weight, slots = run.problem.window_weight, run.problem.cluster.total_slots
    for _ in range(32):
        layers = np.flatnonzero(run.open)
        if layers.size == 0 or run.late(NEAR_SHARE) or run.work >= NEAR_SHARE * run.steps:
            return
        for mine in chunks(np.full(layers.size, slots * (10 + run.problem.windows))):
            cold = np.zeros((mine.size, 2))
            every.improve(layers[mine], slots, cold, weight, pool, run.workers)
        run.work += slots * layers.size * run.problem.windows
        run.offer(near.plan(run.problem))


def _bar_nodes(problem: Problem, state: State, node_of: IntArray) -> None:
    """Keep each expert group [layers, groups] on its node."""
    assert problem.node_groups is not None
    assert problem.cluster.nodes is not None
    groups = problem.node_groups.of(problem.experts)
    elsewhere = node_of[:, None, groups] != problem.cluster.nodes[None, :, None]
    state.on[:, :, : problem.experts] |= np.where(elsewhere, BARRED, 0).astype(np.uint8)


def stay_on_nodes(problem: Problem, state: State, current: Plan) -> None:
    """Keep each expert group on the node where a plan has it."""
    assert problem.node_groups is not None
    assert problem.cluster.nodes is not None
    groups = problem.node_groups.of(problem.experts)
    node = problem.cluster.nodes[current.rank_of_slot]
    node_of = np.zeros((problem.layers, int(groups.max()) + 1), dtype=np.int64)
    layer, slot = np.nonzero(current.slots >= 0)
    node_of[layer, groups[current.slots[layer, slot]]] = node[slot]
    _bar_nodes(problem, state, node_of)


def _take_better(state: State, plan: Plan) -> None:
    """Continue from `plan` in the layers where it beats the state under even routing."""
    held = plan.by_rank(plan.slots)
    share = np.where(held >= 0, 1.0, 0.0)
    layer = np.arange(plan.layers)[:, None, None]
    share *= state.load[layer, np.maximum(held, 0)] / plan.replicas[layer, np.maximum(held, 0)]
    makespan = ((state.base + share.sum(axis=2)) / state.speed).max(axis=1)
    better = np.flatnonzero(makespan < state.makespan * (1 - 1e-12))
    adopt(state, plan, np.intersect1d(better, _affordable(state, plan)))


def _affordable(state: State, plan: Plan) -> IntArray:
    """Layers in which the plan has no more replicas than the state may."""
    quota = state.cap.sum() - state.least[:, -1]
    return np.flatnonzero(plan.replicas.sum(axis=1) <= quota)


def _descend(
    run: Run,
    state: State,
    aims: Aims,
    pool: ThreadPoolExecutor,
    share: float,
    rounds: int | None = None,
) -> None:
    """Exchange search in rounds: steps go to the open layers, most to the largest gaps.

    Uses at most `share` of time and work. Fewer than the slots times 32 steps a layer are not
    worth a round; rounds grow to 100,000 steps a layer and more.
    """
    problem = run.problem
    slots = problem.cluster.total_slots
    per_layer = 32 * slots
    weight = state.unit * problem.layer_weight
    done = 0
    while not run.late(share) and done != rounds:
        target = aims.aim
        excess = (state.makespan - target) * weight
        layers = np.flatnonzero(excess > 0)
        layers = layers[np.argsort(-excess[layers], kind="stable")]
        left = run.steps * share - run.work
        if layers.size == 0 or left <= 0:
            return
        # half of the steps alike, half by the time that a layer can still save
        part = 0.5 / layers.size + 0.5 * excess[layers] / excess[layers].sum()
        budget = np.ceil(part * min(per_layer * layers.size, left)).astype(np.int64)
        for mine in chunks(budget):
            before = int(state.work.sum())
            improve(state, layers[mine], budget[mine], target[layers[mine]], pool, run.workers)
            run.work += int(state.work.sum()) - before
            run.report(state)
            if run.late(share):
                return
        if aims.limited:
            run.offer(state.plan(problem))
            aims.follow()
            if run.kept is not None and problem.node_groups is None:
                _take_better(state, run.kept.plan)
        per_layer = min(2 * per_layer, 100_000 + 64 * slots)
        done += 1


def _few_moves(run: Run, current: Plan, allowance: IntArray, pool: ThreadPoolExecutor) -> None:
    """Steps from the current plan within its budget of moves; a total goes where it buys most."""
    problem = run.problem
    if evaluate(problem, current.with_split(None)).legal:
        run.offer(current.with_split(None))
    rules = problem.max_moves
    state = _holding(run, current)
    if problem.node_groups is not None:
        stay_on_nodes(problem, state, current)
    aims = _aims(run, state)
    moves = Moves(state, allowance)
    broken = _broken(state)
    if broken.size:
        moves.mend(broken)
    total = rules.total if rules is not None else None
    per_layer = 64 * problem.cluster.total_slots
    weighted = problem.routing == "weighted"
    share = WEIGHTED_SHARE if weighted else 1.0 if problem.windows == 1 else MOVES_SHARE
    left = run.steps * share
    try:
        while not run.late(share) and left > 0:
            target = aims.aim
            layers = np.flatnonzero(state.makespan > target)
            if layers.size == 0:
                break
            budget = np.full(layers.size, int(min(per_layer, np.ceil(left / layers.size))))
            for mine in chunks(budget):
                before = int(state.work.sum())
                moves.improve(layers[mine], budget[mine], target[layers[mine]], pool, run.workers)
                run.work += int(state.work.sum()) - before
                left = run.steps * share - run.work
                run.report(state)
                if run.late(share):
                    break
            if total is not None:
                moves.share_out(total, state.unit * problem.layer_weight, target, pool)
                total = None
            if aims.limited:
                run.offer(state.plan(problem))
                aims.follow()
            per_layer = min(4 * per_layer, 4_000_000)
    finally:
        if total is not None:
            moves.share_out(total, state.unit * problem.layer_weight, aims.aim, pool)
        run.offer(state.plan(problem))
    try:
        if weighted:
            _polish(run, state, moves.allowance, pool)
        elif problem.windows > 1 and problem.routing == "even":
            layers = np.arange(problem.layers)
            all_windows(run, state, pool, layers, allowance=moves.allowance)
    finally:
        run.offer(state.plan(problem))


def _share_replicas(run: Run) -> None:
    """Replicas of each layer under a budget over all, by what each reaches with so many.

    Layers are solved apart with more and more replicas; the best way to share the budget is then
    found exactly (see `budget`), and its plan offered.
    """
    problem, budget = run.problem, run.problem.replica_budget
    assert budget is not None
    need = np.maximum(problem.pinned.sum(axis=2), 1).sum(axis=1)
    usable = int(np.minimum(problem.cluster.slots, problem.experts).sum())
    most = min(usable, int(problem.most_replicas.sum())) - need
    spare = budget - int(need.sum())
    if spare >= most.sum():
        return
    rules: list[Constraint] = []
    for rule in problem.constraints:
        if isinstance(rule, MaxMoves) and rule.total is not None:  # layers apart
            least = rule.total if rule.per_layer is None else min(rule.total, rule.per_layer)
            rules.append(MaxMoves(rule.current, per_layer=least))
        elif not isinstance(rule, ReplicaBudget):
            rules.append(rule)
    apart = replace(problem, constraints=rules)
    extra = points(min(int(most.max()), spare))
    cost = np.full((problem.layers, extra.size), np.inf)
    slots = np.full((extra.size, problem.layers, problem.cluster.total_slots), EMPTY)
    for turn, more in enumerate(extra):
        limits = part(run, BUDGET_SHARE, extra.size - turn)
        one = Run(
            apart, run.bound, limits, time.perf_counter(), run.seed, run.workers, None,
            quota=need + np.minimum(more, most),
        )  # fmt: skip
        search(one, None)
        run.work += one.work
        if one.kept is not None:
            run.offer(one.kept.plan)
            slots[turn] = one.kept.plan.slots
            reached = problem.mean(one.kept.makespan) * problem.layer_weight
            cost[:, turn] = np.where(one.over(one.kept) > 0, np.inf, reached)
    given, of = allot(cost, np.minimum(extra, most[:, None]), spare)
    run.quota = need + given
    layers = np.arange(problem.layers)
    if np.isfinite(cost[layers, of]).all():
        best, rank_slots = slots[of, layers], problem.cluster.slots
        run.offer(Plan(slots=best, rank_slots=rank_slots, experts=problem.experts))


def _polish(run: Run, state: State, allowance: IntArray, pool: ThreadPoolExecutor) -> None:
    """Weighted routing: change single slots of the open layers, priced at their best shares."""
    problem = run.problem
    polish = Polish(problem, state, allowance)
    slots = problem.cluster.total_slots
    trials = 16
    while not run.late():
        bound = (run.bound.per_layer * polish.weight[:, None]).sum(axis=0)
        target = bound * (1 + run.limits.gap)
        layers = np.flatnonzero(polish.cost > target)
        left = (run.steps - run.work) / max(layers.size * slots, 1)
        if layers.size == 0 or left < 1:
            return
        trials = int(min(trials, left))
        for mine in chunks(np.full(layers.size, trials * slots)):
            polish.improve(layers[mine], trials, target[layers[mine]], pool, run.workers)
            run.work += trials * slots * mine.size
            run.report(state)
            if run.late():
                return
        trials = min(2 * trials, 1024)
        if problem.objective != "mean" and problem.windows > 1:
            run.offer(state.plan(problem))
            steps = at_best_shares(problem, state.plan(problem)).step_seconds
            risk = problem.risk_weight(steps)
            polish.weight = frozen(polish.weight + RISK_STEP * (risk - polish.weight))
            polish.cost[:] = np.inf
            trials = min(trials, 64)
            if run.closed:
                return
