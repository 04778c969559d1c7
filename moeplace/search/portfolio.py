"""The portfolio behind `solve(method="auto")`: which planner runs when, under which limits."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.bounds import Bound, layer_floor, lower_bound, mean_bound
from moeplace.constraints import Constraint, MaxMoves, MaxOffNode, NodeGroups
from moeplace.dispatch import FIXED
from moeplace.errors import PlanError, PolicyNotApplicable
from moeplace.evaluate import Evaluation, evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, Routing
from moeplace.result import Limits, Progress
from moeplace.search.construct import adopt, construct
from moeplace.search.groups import grouped
from moeplace.search.improve import improve
from moeplace.search.moves import Moves
from moeplace.search.nodes import assign
from moeplace.search.polish import Polish
from moeplace.search.ruled import Ruled, undrawn
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
#: Rounds of the search over several windows, and its first threshold: this over the slots, times
#: the cost (what one exchange changes shrinks with the number of slots).
ROUNDS, HEAT = 20, 0.18
#: The same threshold under a fixed dispatch rule, and search steps that a trial there counts as.
RULED_HEAT, RULED_STEPS = 0.6, 8
#: Share of time and work that a problem of several windows spends on the mean load.
MEAN_SHARE = 0.15
#: Share of both that is spent near a start plan, if that does not bring all within the gap.
NEAR_SHARE = 0.3
#: Share of both for the search under even routing, if the routing is weighted.
WEIGHTED_SHARE = 0.3


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
        """Bound [layers] on the makespan of the mean load by speeds, on which the search works."""
        if self.problem.windows == 1 and self.problem.cluster.planes is None:
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

    def offer(self, plan: Plan, name: str = "") -> None:
        """Keep the plan where it is better, layer by layer; an illegal one is passed over.

        Layers do not constrain each other (a total of moves aside), so under the mean over
        windows the best of two plans is the better one in each layer. The worst window couples
        layers: there, the better of the two plans, or of their layers mixed, is kept.

        Raises
        ------
        PlanError
            If the plan is illegal and has a `name`, i.e. is the user's.
        """
        problem = self.problem
        new = at_best_shares(problem, plan) if plan.split is None else evaluate(problem, plan)
        if not new.legal:
            if name:
                raise PlanError(f"{name} breaks a rule of the problem: {new.violations[0]}.")
            return
        if self.best is None:
            self.best = new
            return
        old = self.best
        better = problem.mean(new.makespan) < problem.mean(old.makespan)
        if self.from_start:
            better &= self.open
        candidates = [old, new] if not self.from_start else [old]
        if better.all():
            candidates.append(new)
        elif better.any():
            candidates.append(evaluate(problem, _mix(better, new.plan, old.plan)))
        self.best = min((c for c in candidates if c.legal), key=lambda priced: priced.objective)

    def report(self, state: State) -> None:
        """Tell the callback where the search stands, at most ten times a second."""
        now = time.perf_counter()
        if self.progress is None or now - self.reported < 0.1:
            return
        self.reported = now
        makespan, bound = state.makespan * state.unit, self.targets
        self.progress(
            Progress(
                seconds=self.seconds,
                objective=float((makespan * self.problem.layer_weight).sum()),
                lower_bound=float((bound * self.problem.layer_weight).sum()),
                layers_done=int((makespan <= bound * (1 + self.limits.gap)).sum()),
                layers=self.problem.layers,
            )
        )


@cache
def rehearse(
    weighted: bool, several: bool, near: bool, grouped: bool, rule: Routing = "even"
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
    """
    tokens = np.array([[9.0, 7, 5, 3, 1], [1, 3, 5, 7, 9]])[: 1 + several, None]
    cluster = Cluster(speeds=np.array([1, 0.9, 1.1]), slots=np.full(3, 2), nodes=np.arange(3))
    current = Plan(slots=[[0, 1, 2, 3, 4, -1]], rank_slots=cluster.slots, experts=5)  # type: ignore[arg-type]
    rules: list[Constraint] = [MaxMoves(current, per_layer=2)] if near else []
    rules += [NodeGroups(np.array([0, 0, 1, 1, 2]))] if grouped else []
    problem = Problem(
        LoadHistogram(tokens=tokens),
        cluster,
        routing="weighted" if weighted else rule,
        constraints=rules,
    )
    limits = Limits(work=20_000, gap=0.0)
    run = Run(problem, lower_bound(problem), limits, time.perf_counter(), 0, 1, None)
    search(run, None)
    if near:  # a start plan is left where it does not do
        rehearse(weighted, several, False, grouped, rule)


def search(run: Run, start: Plan | None) -> None:
    """Leave the best legal plan found within the limits in `run.best`, if there is one."""
    if start is not None:
        run.offer(start, "The start plan")
        run.from_start = True
    with ThreadPoolExecutor(run.workers) as pool:
        if run.problem.max_moves is not None:
            _few_moves(run, run.problem.max_moves.current, run.problem.max_moves.allowance(), pool)
        else:
            _afresh(run, start, pool)


def _afresh(run: Run, start: Plan | None, pool: ThreadPoolExecutor) -> None:
    """Exact window, construction and search, rivals where a gap is left, then all windows."""
    problem = run.problem
    if run.best is not None and not run.open.any():
        return
    if problem.routing == "weighted" and not problem.constraints:
        _pour(run)
        if run.best is not None and not run.open.any():
            return
    state = State.of(problem, run.seed)
    if problem.node_groups is not None:
        groups = problem.node_groups.of(problem.experts)
        node_of = assign(problem, groups, run.seed)
        if node_of is None:
            return
        _bar_nodes(problem, state, node_of)
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
        _descend(run, state, pool, share, rounds=1)
        run.offer(state.plan(problem))
        if not run.open.any():
            return
        local = any(isinstance(rule, MaxOffNode) for rule in problem.constraints)
        for name in (*RIVALS, "top_k") if local else RIVALS:
            if not run.late(RIVAL_SHARE):
                try:
                    run.offer(POLICIES[name](problem))
                except PolicyNotApplicable:
                    continue
        if run.best is None:
            return
        if problem.windows == 1 and not weighted and problem.node_groups is None:
            _take_better(run, state, run.best.plan)
        if weighted and not problem.constraints:
            _join_ranks(run)
        _descend(run, state, pool, share)
        if problem.windows > 1 and not weighted and not fixed:
            run.offer(state.plan(problem))
            _all_windows(run, state, pool, np.arange(problem.layers))
        elif fixed:
            run.offer(state.plan(problem))
            _under_rule(run, state, pool)
        if weighted:
            run.offer(state.plan(problem))
            adopt(state, run.best.plan, np.arange(problem.layers))
            unlimited = np.full(problem.layers, 1 << 40)
            _polish(run, state, unlimited, pool)
    finally:  # also when interrupted
        run.offer(state.plan(problem))


def _holding(run: Run, plan: Plan) -> State:
    """A state that holds a plan's placement in all layers."""
    state = State.of(run.problem, run.seed)
    adopt(state, plan, np.arange(run.problem.layers))
    return state


def _near_start(run: Run, state: State, start: Plan, pool: ThreadPoolExecutor) -> None:
    """Take layers that the start plan is best in, or that few steps bring within the gap."""
    near = _holding(run, start)
    layers = np.arange(run.problem.layers)
    _take_better(run, state, start)
    slots = run.problem.cluster.total_slots
    moves = Moves(near, np.full(layers.size, slots))
    target = run.targets * (1 + run.limits.gap) / near.unit
    moves.improve(layers, np.ones_like(layers), target, pool, run.workers)  # greedy, no kicks
    near_plan = near.plan(run.problem)
    run.offer(near_plan)
    adopt(state, near_plan, np.flatnonzero(near.makespan <= target))


def _broken(state: State) -> IntArray:
    """Layers whose placement breaks a pin or a bar."""
    held, barred, pinned = ((state.on & bit) > 0 for bit in (HELD, BARRED, PINNED))
    return np.flatnonzero(((held & barred) | (pinned & ~held)).any(axis=(1, 2)))


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


def _take_better(run: Run, state: State, plan: Plan) -> None:
    """Continue from `plan` in the layers where it beats the state under even routing."""
    held = plan.by_rank(plan.slots)
    share = np.where(held >= 0, 1.0, 0.0)
    layer = np.arange(plan.layers)[:, None, None]
    share *= state.load[layer, np.maximum(held, 0)] / plan.replicas[layer, np.maximum(held, 0)]
    makespan = ((state.base + share.sum(axis=2)) / state.speed).max(axis=1)
    adopt(state, plan, np.flatnonzero(makespan < state.makespan * (1 - 1e-12)))


def _pour(run: Run) -> None:
    """Weighted routing: the sliding window, which often reaches the bound exactly."""
    problem = run.problem
    slots, split, placed = window(problem, run.targets * (1 + 2e-12))
    if placed.all():
        plan = Plan(
            slots=slots,
            rank_slots=problem.cluster.slots,
            experts=problem.experts,
            split=split if problem.windows == 1 else None,
        )
        run.offer(plan)
    elif placed.any() and problem.windows == 1:
        state = State.of(problem, run.seed)
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
    assert run.best is not None
    weight = problem.window_weight
    slots = run.best.plan.slots.copy()
    for layer in np.flatnonzero(run.open).tolist():
        best = (run.best.makespan[:, layer] * weight).sum()
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


def _descend(
    run: Run, state: State, pool: ThreadPoolExecutor, share: float, rounds: int | None = None
) -> None:
    """Exchange search in rounds: steps go to the open layers, most to the largest gaps.

    Uses at most `share` of time and work. Fewer than the slots times 32 steps a layer are not
    worth a round; rounds grow to 100,000 steps a layer and more.
    """
    problem = run.problem
    target = run.targets * (1 + run.limits.gap) / state.unit
    slots = problem.cluster.total_slots
    per_layer = 32 * slots
    weight = state.unit * problem.layer_weight
    done = 0
    while not run.late(share) and done != rounds:
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
    if problem.node_groups is not None:  # groups stay on the nodes where they are
        groups = problem.node_groups.of(problem.experts)
        assert problem.cluster.nodes is not None
        node = problem.cluster.nodes[current.rank_of_slot]
        node_of = np.zeros((problem.layers, int(groups.max()) + 1), dtype=np.int64)
        layer, slot = np.nonzero(current.slots >= 0)
        node_of[layer, groups[current.slots[layer, slot]]] = node[slot]
        _bar_nodes(problem, state, node_of)
    target = run.targets * (1 + run.limits.gap) / state.unit
    moves = Moves(state, allowance)
    broken = _broken(state)
    if broken.size:
        moves.mend(broken)
    total = rules.total if rules is not None else None
    per_layer = 64 * problem.cluster.total_slots
    share = WEIGHTED_SHARE if problem.routing == "weighted" else 1.0
    left = run.steps * share
    try:
        while not run.late(share) and left > 0:
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
            per_layer = min(4 * per_layer, 4_000_000)
    finally:
        if total is not None:
            moves.share_out(total, state.unit * problem.layer_weight, target, pool)
        run.offer(state.plan(problem))
    if problem.routing == "weighted":
        try:
            _polish(run, state, moves.allowance, pool)
        finally:
            run.offer(state.plan(problem))


def _under_rule(run: Run, state: State, pool: ThreadPoolExecutor) -> None:
    """A fixed dispatch rule: anneal; under sglang-static thrice, later where most is left to gain.

    There the best counts are far apart, and one start seldom suits all layers.
    """
    problem = run.problem
    assert run.best is not None
    even = run.best.plan
    tries = [(even, 1, 1.0)]
    if problem.routing == "sglang-static":
        fewer = undrawn(problem, even)
        tries = [(fewer, 1, 0.5), (even, 2, 0.75), (fewer, 4, 1.0)]
    for start, part, share in tries:
        left = layer_floor(problem, run.bound) - problem.mean(run.best.makespan)
        layers = np.argsort(left * problem.layer_weight, kind="stable")
        layers = layers[: -(-layers.size // part)]
        adopt(state, start, layers)
        _all_windows(run, state, pool, layers, share)
        run.offer(state.plan(problem))


def _all_windows(
    run: Run, state: State, pool: ThreadPoolExecutor, layers: IntArray, share: float = 1.0
) -> None:
    """One placement for all windows, or a fixed dispatch rule: anneal under the true price.

    The worst window moves the weights there.
    """
    problem = run.problem
    every: Windows | Ruled = Windows(problem, state)
    hot, effort = HEAT, problem.windows  # search steps of a trial
    if problem.routing in FIXED:
        every, hot, effort = Ruled(problem, state), RULED_HEAT, RULED_STEPS * problem.windows
    weight = problem.window_weight.copy()
    if problem.objective == "worst":
        weight = np.full(problem.windows, 1.0 / problem.windows)
    trials, began, begun_work = 200, run.seconds, run.work
    for turn in range(ROUNDS):
        if run.late(share) or run.work >= run.steps * share:
            return
        if run.steps < float("inf"):
            left = (run.steps * share - begun_work) / (layers.size * effort * ROUNDS)
            trials = max(int(left), 1)
        cooling = np.array([1 - turn / ROUNDS, 1 - (turn + 1) / ROUNDS])
        heat = np.tile(hot / problem.cluster.total_slots * cooling, (layers.size, 1))
        for mine in _chunks(np.full(layers.size, trials * (10 + effort))):
            every.improve(layers[mine], trials, heat[mine], weight, pool, run.workers)
            if run.late(share):
                break
        run.work += trials * layers.size * effort
        if problem.objective == "worst":
            run.offer(state.plan(problem))
            steps = evaluate(problem, state.plan(problem)).step_seconds
            weight /= 1 + 20 * (1 - steps / steps.max())  # no exp: its last bit differs by CPU
            weight /= weight.sum()
        elif run.best is not None and run.best.objective <= run.bound.total * (1 + run.limits.gap):
            return
        if run.limits.time is not None:
            spent = run.seconds - began
            began += spent
            left_time = run.limits.time * share - began
            pace = trials / max(spent, 1e-9)
            trials = max(int(min(pace * left_time / (ROUNDS - turn), 8.0 * trials)), 100)


def _polish(run: Run, state: State, allowance: IntArray, pool: ThreadPoolExecutor) -> None:
    """Weighted routing: change single slots of the open layers, priced at their best shares."""
    problem = run.problem
    polish = Polish(problem, state, allowance)
    target = problem.mean(run.bound.per_layer) * (1 + run.limits.gap)
    slots = problem.cluster.total_slots
    trials = 16
    while not run.late():
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
