"""The portfolio behind `solve(method="auto")`: which planner runs when, under which limits."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray, frozen
from moeplace.bounds import Bound, layer_floor, lower_bound, mean_bound
from moeplace.constraints import (
    CAPACITY_SLACK,
    Constraint,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.dispatch import FIXED
from moeplace.errors import PlanError, PolicyNotApplicable
from moeplace.evaluate import Evaluation, evaluate
from moeplace.hardware import Cluster
from moeplace.latency import Planes
from moeplace.loads import LoadHistogram
from moeplace.nodes_bound import affordable, share_groups
from moeplace.plan import EMPTY, Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, Routing
from moeplace.result import Limits, Progress
from moeplace.search.aims import Aims
from moeplace.search.budget import allot, points
from moeplace.search.construct import adopt, construct
from moeplace.search.deal import deal
from moeplace.search.groups import grouped
from moeplace.search.improve import improve
from moeplace.search.latency import TrueTimes
from moeplace.search.moves import Moves
from moeplace.search.nodes import assign
from moeplace.search.polish import Polish
from moeplace.search.ruled import Ruled, local, undrawn
from moeplace.search.split import at_best_shares, layer_makespan, resplit
from moeplace.search.state import BARRED, HELD, PINNED, State, to_slots
from moeplace.search.window import window
from moeplace.search.windows import Windows

#: What is tried besides our own search, on layers where that leaves a gap.
RIVALS = ("contiguous", "eplb", "vibe", "eplb_lpt")
#: No rival is tried later than this share of the time limit.
RIVAL_SHARE = 0.3
#: Search steps for each layer if neither time nor work is limited.
DEFAULT_WORK = 2_000_000
#: Search steps between two looks at the clock, a few milliseconds.
STRIDE = 400_000
#: With fewer slots a rank than this, too few ways to deal them out suit more than two windows.
FEW_SLOTS = 8
#: Rounds of the search over several windows, and its first threshold: this over the slots, times
#: the cost (what one exchange changes shrinks with the number of slots); few slots have few ways
#: around a bad place, so their first threshold is at least the third number over their square.
ROUNDS, HEAT, FEW_HEAT = 20, 0.18, 7.0
#: The first threshold under latency planes or tables: this over the slots of a rank.
TRUE_HEAT = 0.1
#: The same threshold under a fixed dispatch rule, and search steps that a trial there counts as.
RULED_HEAT, RULED_STEPS = 0.6, 8
#: Share of time and work that a problem of several windows spends on the mean load, and the share
#: after which the experts of two ranks are dealt out anew; steps that a trial of that counts as.
MEAN_SHARE, DEAL_AFTER, DEAL_STEPS = 0.15, 0.5, 8_000
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
#: How far the weights of windows move, each round, to those that decide the CVaR.
RISK_STEP = 0.3
#: Rules that the sliding window and groups of ranks can obey.
POURED = (TokenCapacity, MaxReplicas, ReplicaBudget)


@dataclass
class Run:
    """One call of `solve`: its limits and the best legal plan so far."""

    problem: Problem
    bound: Bound
    limits: Limits
    began: float
    seed: int
    workers: int
    progress: Callable[[Progress], None] | None
    best: Evaluation | None = None
    work: int = 0
    reported: float = 0.0
    from_start: bool = False  # then layers within the gap stay as they are: fewer moves
    quota: IntArray | None = None  # most replicas in each layer [layers], if that is limited
    nearest: Evaluation | None = None  # its tokens break rules; until one is legal

    def late(self, share: float = 1.0) -> bool:
        """Whether the time, or a share of it, is up."""
        limit = self.limits.time
        return limit is not None and self.seconds >= limit * share

    @property
    def seconds(self) -> float:
        """Wall time since the call."""
        return time.perf_counter() - self.began

    @cached_property
    def steps(self) -> float:
        """Search steps allowed over all layers."""
        if self.limits.work is not None:
            return float(self.limits.work)
        return DEFAULT_WORK * self.problem.layers if self.limits.time is None else float("inf")

    @cached_property
    def targets(self) -> FloatArray:
        """Bound [layers] on the makespan of the mean load, on which the search works."""
        if self.problem.windows == 1:
            return np.asarray(self.bound.per_layer[0])
        return mean_bound(self.problem)

    @property
    def open(self) -> BoolArray:
        """Layers [layers] whose best makespan is above the gap, by the mean over windows."""
        if self.best is None:
            return np.ones(self.problem.layers, dtype=np.bool_)
        coupled = self.problem.objective != "mean"
        if coupled and self.best.objective <= self.bound.total * (1 + self.limits.gap):
            return np.zeros(self.problem.layers, dtype=np.bool_)
        reached = self.problem.mean(self.best.makespan)
        bound = layer_floor(self.problem, self.bound)
        return np.asarray(reached > bound * (1 + self.limits.gap))

    @property
    def kept(self) -> Evaluation | None:
        """The best legal plan, or the one whose tokens come nearest to where they may go."""
        return self.nearest if self.best is None else self.best

    def over(self, priced: Evaluation) -> FloatArray:
        """Tokens in each layer [layers] where they may not go, over all windows.

        Above the ranks' capacities, and off their node beyond `MaxOffNode`.
        """
        capacity = self.problem.capacity * (1 + CAPACITY_SLACK)
        over = np.asarray(np.maximum(priced.rank_tokens - capacity, 0.0).sum(axis=(0, 2)))
        excess = priced.off_node_excess
        if excess is None:
            return over
        return np.asarray(over + (excess * self.problem.tokens.sum(axis=2)).sum(axis=0))

    @property
    def closed(self) -> bool:
        """Whether the objective is within the gap."""
        most = self.bound.total * (1 + self.limits.gap)
        return self.best is not None and self.best.objective <= most

    def offer(self, plan: Plan, name: str = "") -> None:
        """Keep the plan where it is better, layer by layer; an illegal one is passed over.

        Layers do not constrain each other (totals of moves and replicas aside), so under the mean
        over windows the best of two plans is the better one in each layer. The worst window and
        CVaR couple layers: there, the better of the two plans, or of their layers mixed, is kept.
        Until a plan obeys token capacities and `MaxOffNode` in all layers, the mixed one is kept as
        `nearest`.

        Raises
        ------
        PlanError
            If the plan is illegal and has a `name`, i.e. is the user's.
        """
        problem = self.problem
        new = at_best_shares(problem, plan) if plan.split is None else evaluate(problem, plan)
        if not new.legal and name:
            raise PlanError(f"{name} breaks a rule of the problem: {new.violations[0]}.")
        if not self._near(new):
            return
        if self.quota is not None and (plan.replicas.sum(axis=1) > self.quota).any():
            return
        old = self.kept
        if old is None:
            self._keep([new])
            return
        better = self._better(new, old)
        if not (new.legal and old.legal):
            more, less = self.over(new), self.over(old)
            better = (more < less) | (more == less) & better
        if self.from_start:
            better &= self.open
        candidates = [old, new] if not self.from_start else [old]
        if better.all():
            candidates.append(new)
        elif better.any():
            candidates.append(evaluate(problem, _mix(better, new.plan, old.plan)))
        self._keep(candidates)

    def _better(self, new: Evaluation, old: Evaluation) -> BoolArray:
        """Layers [layers] to be taken from the new plan: where windows cost less, all in all.

        If layers are coupled, one after the other, where the objective falls.
        """
        problem = self.problem
        if problem.objective == "mean":
            return np.asarray(problem.mean(new.makespan) < problem.mean(old.makespan))
        change = (new.makespan - old.makespan) * problem.layer_weight
        steps, least = old.step_seconds, old.objective
        better = np.zeros(problem.layers, dtype=np.bool_)
        for layer in range(problem.layers):
            tried = steps + change[:, layer]
            total = float((tried * problem.risk_weight(tried)).sum())
            if total < least * (1 - 1e-12):
                steps, least, better[layer] = tried, total, True
        return better

    def _near(self, priced: Evaluation) -> bool:
        """Whether a plan breaks no rule but token capacities and `MaxOffNode`."""
        over = priced.rank_tokens > self.problem.capacity * (1 + CAPACITY_SLACK)
        known = np.count_nonzero(over)
        if priced.off_node_excess is not None:
            known += np.count_nonzero(priced.off_node_excess)
        return len(priced.violations) == known

    def _keep(self, candidates: list[Evaluation]) -> None:
        legal = [priced for priced in candidates if priced.legal]
        if legal:
            self.best = min(legal, key=lambda priced: priced.objective)
            return
        near = [priced for priced in candidates if self._near(priced)]
        self.nearest = min(near, key=lambda priced: (self.over(priced) > 0).sum())

    def report(self, state: State) -> None:
        """Tell the callback of the best plan and the bound, at most ten times a second.

        Where the state's makespans are not the price (several windows, shares, an engine's rule,
        latency models) its plan is priced, twice a second; shares are dear, so there the best plan
        that was kept is told.
        """
        problem, now = self.problem, time.perf_counter()
        apart = problem.windows > 1 or problem.routing != "even" or problem.cluster.nonlinear
        if self.progress is None or now - self.reported < (0.5 if apart else 0.1):
            return
        self.reported = now
        makespan, bound = state.makespan * state.unit, self.targets
        price = float((makespan * problem.layer_weight).sum())
        least = float((bound * problem.layer_weight).sum())
        done = makespan <= bound * (1 + self.limits.gap)
        if apart:
            least, found = self.bound.total, self.kept
            if problem.routing != "weighted" or found is None:
                tried = state.plan(problem)
                new = at_best_shares(problem, tried) if found is None else evaluate(problem, tried)
                if found is None or (new.legal and new.objective < found.objective):
                    found = new
            price, floor = found.objective, layer_floor(problem, self.bound)
            done = problem.mean(found.makespan) <= floor * (1 + self.limits.gap)
        elif self.best is not None:
            price = min(price, self.best.objective)
        self.progress(
            Progress(
                seconds=self.seconds,
                objective=price,
                lower_bound=min(least, price),
                layers_done=int(done.sum()),
                layers=problem.layers,
            )
        )


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
    run = Run(problem, lower_bound(problem), limits, time.perf_counter(), 0, 1, None)
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
            if _pours(run.problem) and not run.problem.cluster.nonlinear:
                _pour(run)
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
    if _pours(problem):
        _pour(run)
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
        if weighted and problem.windows == 1 and _pours(problem):
            _join_ranks(run)
        _descend(run, state, aims, pool, share)
        if problem.windows > 1 and not weighted and not fixed:
            run.offer(state.plan(problem))
            if run.quota is not None:
                adopt(state, run.kept.plan, _affordable(state, run.kept.plan))
            all_windows(run, state, pool, np.arange(problem.layers))
        elif fixed:
            run.offer(state.plan(problem))
            _under_rule(run, state, pool)
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
        for mine in _chunks(np.full(layers.size, slots * (10 + run.problem.windows))):
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


def _pours(problem: Problem) -> bool:
    """Whether the sliding window applies."""
    poured = all(isinstance(rule, POURED) for rule in problem.constraints)
    return problem.routing == "weighted" and poured


def _pour(run: Run) -> None:
    """Weighted routing: the sliding window, which often reaches the bound exactly."""
    problem = run.problem
    slots, split, placed = window(problem, run.targets * (1 + 2e-12))
    placed &= _within_limits(run, slots)
    if placed.all():
        plan = Plan(
            slots=slots,
            rank_slots=problem.cluster.slots,
            experts=problem.experts,
            split=split if problem.windows == 1 else None,
        )
        run.offer(plan)
    elif placed.any() and problem.windows == 1:
        state = State.of(problem, run.seed, run.quota)
        construct(state)
        rest = resplit(problem, state.plan(problem))
        assert rest.split is not None
        run.offer(
            Plan(
                slots=np.where(placed[:, None], slots, rest.slots),
                rank_slots=rest.rank_slots,
                experts=rest.experts,
                split=np.where(placed[:, None], split, rest.split),
            )
        )


def _join_ranks(run: Run) -> None:
    """Weighted routing with few spare slots: ranks in groups, the makespan aimed at bisected."""
    problem, steps = run.problem, 64 * run.problem.cluster.total_slots
    assert run.kept is not None
    weight = problem.window_weight
    slots = run.kept.plan.slots.copy()
    over = run.over(run.kept) > 0
    for layer in np.flatnonzero(run.open).tolist():
        best = np.inf if over[layer] else (run.kept.makespan[:, layer] * weight).sum()
        low, high, width = 0.0, np.inf, 0.0  # above the bound: failed, reached, the next try
        for _ in range(12):
            if run.late() or high - low < run.limits.gap:
                break
            goal = run.targets[layer] * (1 + width)
            found = grouped(problem, layer, goal, run.seed, steps)
            run.work += steps
            reached = np.inf
            if found is not None:
                tried = to_slots(found[0][None], problem.cluster.slots)[0]
                if _within_limits(run, tried[None])[0]:
                    reached = (layer_makespan(problem, layer, tried) * weight).sum()
            if reached < best:
                best, slots[layer] = reached, tried
            if reached <= goal * (1 + run.limits.gap):
                high = width
            else:
                low = width
            if high == 0.0:
                break
            width = max(3 * low, 1e-3) if high == np.inf else (low + high) / 2
    run.offer(Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts))


def _within_limits(run: Run, slots: IntArray) -> BoolArray:
    """Which layers, of slots [layers or 1, slots], obey the limits of replicas."""
    copies = np.zeros((slots.shape[0], run.problem.experts), dtype=np.int64)
    layer, slot = np.nonzero(slots >= 0)
    np.add.at(copies, (layer, slots[layer, slot]), 1)
    few = np.asarray((copies <= run.problem.most_replicas).all(axis=1))
    return few if run.quota is None else few & (copies.sum(axis=1) <= run.quota)


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
        for mine in _chunks(budget):
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


def _chunks(budget: IntArray) -> list[IntArray]:
    """Positions of `budget` in calls of about STRIDE steps, so that clock and Ctrl-C are heeded."""
    call = budget.cumsum() // STRIDE
    return np.split(np.arange(budget.size), np.flatnonzero(np.diff(call)) + 1)


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
            for mine in _chunks(budget):
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


def part(run: Run, share: float, parts: int) -> Limits:
    """One of `parts` equal parts of what is left of a share of time and work."""
    time, work = run.limits.time, None
    if time is not None:
        time = max(time * share - run.seconds, 0.0) / parts
    if run.steps < float("inf"):
        work = int(max(run.steps * share - run.work, 0) / parts)
    return Limits(time=time, work=work, gap=run.limits.gap)


def true_targets(run: Run) -> FloatArray:
    """Mean makespans [layers] at which layers are done; 0 where windows are not just averaged."""
    if run.problem.objective != "mean":
        return np.zeros(run.problem.layers)
    return layer_floor(run.problem, run.bound) * (1 + run.limits.gap)


def _under_rule(run: Run, state: State, pool: ThreadPoolExecutor) -> None:
    """A fixed dispatch rule: anneal; under sglang-static thrice, later where most is left to gain.

    There the best counts are far apart, and one start seldom suits all layers.
    """
    problem = run.problem
    assert run.kept is not None
    even, weight = run.kept.plan, problem.layer_weight
    tries = [(even, 1, 1.0)]
    if problem.routing == "sglang-static":
        fewer = undrawn(problem, even)
        tries = [(fewer, 1, 0.5), (even, 2, 0.75), (fewer, 4, 1.0)]
        near = local(problem)
        if near is not None and problem.max_off_node is not None:
            tries = [(fewer, 1, 0.3), (near, 1, 0.65), (near, 2, 1.0)]
        elif near is not None:
            tries[1] = (near, 2, 0.75)
    for start, part, share in tries:
        left = (layer_floor(problem, run.bound) - problem.mean(run.kept.makespan)) * weight
        left = np.where(run.over(run.kept) > 0, -np.inf, left)
        layers = np.argsort(left, kind="stable")
        layers = layers[: -(-layers.size // part)]
        adopt(state, start, layers)
        all_windows(run, state, pool, layers, share)
        run.offer(state.plan(problem))


def all_windows(
    run: Run,
    state: State,
    pool: ThreadPoolExecutor,
    layers: IntArray,
    share: float = 1.0,
    allowance: IntArray | None = None,
) -> None:
    """One placement for all windows, or a fixed dispatch rule: anneal under the true price.

    Under latency planes or tables by the true times, with any number of windows. Windows that
    decide move the weights there. `allowance` [layers]: copies that each layer may receive.
    """
    problem = run.problem
    slots = problem.cluster.total_slots
    every: Windows | Ruled | TrueTimes
    if problem.cluster.nonlinear:
        every, effort = TrueTimes(problem, state, allowance, true_targets(run)), 1
        hottest = TRUE_HEAT * problem.ranks / slots
    elif problem.routing in FIXED:
        every, hottest, effort = Ruled(problem, state), RULED_HEAT / slots, RULED_STEPS
    else:
        every, hottest, effort = Windows(problem, state, allowance), max(HEAT, FEW_HEAT / slots), 1
        hottest /= slots
    effort *= problem.windows  # search steps of a trial
    weight = problem.window_weight.copy()
    if problem.objective == "worst":
        weight = np.full(problem.windows, 1.0 / problem.windows)
    trials, began, begun_work = 200, run.seconds, run.work
    whole, dealt = share, isinstance(every, Windows) and allowance is None
    if problem.windows > 2 and state.cap.max() < FEW_SLOTS:
        dealt = False
    if dealt:
        share *= DEAL_AFTER
    for turn in range(ROUNDS):
        if run.late(share) or run.work >= run.steps * share:
            return
        if run.steps < float("inf"):
            left = (run.steps * share - begun_work) / (layers.size * effort * ROUNDS)
            trials = max(int(left), 1)
        cooling = np.array([1 - turn / ROUNDS, 1 - (turn + 1) / ROUNDS])
        heat = np.tile(hottest * cooling, (layers.size, 1))
        for mine in _chunks(np.full(layers.size, trials * (10 + effort))):
            every.improve(layers[mine], trials, heat[mine], weight, pool, run.workers)
            run.report(state)
            if run.late(share):
                break
        run.work += trials * layers.size * effort
        if isinstance(every, TrueTimes) and (every.cost <= every.target).all():
            return
        if isinstance(every, Ruled) and problem.max_off_node is not None:
            run.offer(state.plan(problem))
            every.charge(layers, problem.max_off_node)
        if problem.objective != "mean" or np.isfinite(problem.capacity).any():
            run.offer(state.plan(problem))
        if problem.objective == "worst":
            steps = evaluate(problem, state.plan(problem)).step_seconds
            weight /= 1 + 20 * (1 - steps / steps.max())  # no exp: its last bit differs by CPU
            weight /= weight.sum()
        elif problem.objective == "cvar":
            steps = evaluate(problem, state.plan(problem)).step_seconds
            weight += RISK_STEP * (problem.risk_weight(steps) - weight)  # no jumps to and fro
        if problem.objective != "worst" and run.closed:
            return
        if run.limits.time is not None:
            spent = run.seconds - began
            began += spent
            left_time = run.limits.time * share - began
            pace = trials / max(spent, 1e-9)
            trials = max(int(min(pace * left_time / (ROUNDS - turn), 8.0 * trials)), 100)
    if dealt and isinstance(every, Windows):
        _deal_out(run, every, weight, pool, whole)


def _deal_out(
    run: Run, every: Windows, weight: FloatArray, pool: ThreadPoolExecutor, share: float
) -> None:
    """Deal the experts of two ranks out anew, again and again; most where most is above the bound.

    Where windows decide unequally, those that have time to spare get higher aims.
    """
    problem, state = run.problem, every.state
    bound = run.bound.per_layer  # [windows, layers]
    steps = bound @ problem.layer_weight
    risk = problem.risk_weight(steps)
    spare = np.divide(steps[risk > 0].min(), steps, out=np.ones_like(steps), where=steps > 0)
    aims = bound * np.maximum(spare, 1.0)[:, None] / state.unit
    aims[aims <= 0] = 1.0
    trials = 50
    while not run.late(share) and run.work < run.steps * share:
        run.offer(state.plan(problem))
        if run.closed:
            return
        assert run.kept is not None
        adopt(state, run.kept.plan, np.arange(problem.layers))
        above = weight @ (run.kept.makespan - aims * state.unit) * problem.layer_weight
        layers = np.flatnonzero(above > 0)
        if layers.size == 0:
            return
        layers = layers[np.argsort(-above[layers], kind="stable")]
        some = np.full(layers.size, trials) * (0.5 + 0.5 * above[layers] / above[layers].mean())
        left = (run.steps * share - run.work) / (DEAL_STEPS * some.sum())
        some = np.ceil(some * min(left, 1.0)).astype(np.int64)
        targets = (weight @ aims)[layers] * (1 + run.limits.gap)
        if problem.objective != "mean":
            targets[:] = 0.0
        for mine in _chunks(some * DEAL_STEPS):
            deal(every, layers[mine], some[mine], targets[mine], aims, weight, pool, run.workers)
            if run.late(share):
                break
        run.work += int(some.sum()) * DEAL_STEPS
        trials = min(2 * trials, 1_000)


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
        for mine in _chunks(np.full(layers.size, trials * slots)):
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


def _mix(take: BoolArray, new: Plan, old: Plan) -> Plan:
    """Layers of `new` where `take` [layers] is true, of `old` elsewhere."""
    split = None
    if new.split is not None and old.split is not None:
        split = np.where(take[:, None], new.split, old.split)
    return Plan(
        slots=np.where(take[:, None], new.slots, old.slots),
        rank_slots=old.rank_slots,
        experts=old.experts,
        split=split,
    )
