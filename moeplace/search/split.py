"""Best shares for a placement that stays as it is (weighted routing)."""

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen, sum_by
from moeplace.constraints import CAPACITY_SLACK
from moeplace.errors import ProblemError
from moeplace.evaluate import Evaluation, check_fits, evaluate
from moeplace.plan import Plan, by_rank
from moeplace.problem import Problem, check_problem
from moeplace.search.state import ceiling

#: Tangents tried for the shares under latency planes or tables.
TANGENTS = 6


def resplit(problem: Problem, plan: Plan) -> Plan:
    """Shares that minimise every layer's makespan in every window, placement unchanged.

    Exact under linear speeds: a parametric maximum flow finds the least T at which all tokens
    reach ranks that hold their experts (discrete Newton: each minimum cut names the ranks that
    are too slow and gives the next T). Where token capacities leave no room, some tokens break
    them. Under latency planes or tables the same on each rank's tangent, from even shares on,
    the best of a few.
    Shares are per window when the problem has several.

    Raises
    ------
    ProblemError
        If the routing is not weighted: the engine would ignore shares.
    PlanError
        If the plan does not fit the problem.
    """
    check_problem(problem)
    if problem.routing != "weighted":
        raise ProblemError(
            f"Shares cannot be chosen under {problem.routing} routing: the engine shares by its "
            'own rule. Set routing="weighted" if it can follow shares.'
        )
    check_fits(problem, plan)
    if problem.cluster.nonlinear:
        split = _tangents(problem, plan)
    else:
        speeds = np.broadcast_to(problem.cluster.speeds, problem.base.shape)
        split = _flow(problem, plan, problem.base, speeds, np.zeros(1))
    return plan.with_split(split[0] if problem.windows == 1 else split)


def _flow(
    problem: Problem, plan: Plan, base: FloatArray, speeds: FloatArray, lift: FloatArray
) -> FloatArray:
    """Best shares [windows, layers, slots] by base load and speeds [windows, layers, ranks].

    `lift` is what the base load is above the true one, so that capacities are too.
    """
    from moeplace.search.flow import shares

    split = np.empty((problem.windows, *plan.slots.shape))
    begin = np.concatenate([[0], plan.rank_slots.cumsum()])
    most = frozen(ceiling(problem) + np.broadcast_to(lift, base.shape))
    shares(problem.tokens, frozen(base), frozen(speeds), most, begin, plan.slots, split)
    return split


def _tangents(problem: Problem, plan: Plan) -> FloatArray:
    """Shares [windows, layers, slots] under planes or a table: flows on tangents, damped.

    At its tokens n and activations a rank takes t + s n next to n, so it counts as one of speed
    1 / s whose base load takes t longer. The best makespan seen is kept, even shares included.
    """
    cluster = problem.cluster
    priced = evaluate(problem, plan.with_split(None))
    replicas = plan.replicas[np.arange(plan.layers)[:, None], np.maximum(plan.slots, 0)]
    even = np.where(plan.slots >= 0, 1.0 / np.maximum(replicas, 1), 0.0)
    now = np.broadcast_to(even, (problem.windows, *even.shape)).copy()
    best, least = now.copy(), _penalised(problem, priced)
    total = priced.rank_tokens.sum(axis=2, keepdims=True)
    for _ in range(TANGENTS):
        tokens = np.maximum(priced.rank_tokens, 0.01 * total / problem.ranks)  # none is idle
        tokens = np.where(total > 0, tokens, 1.0)
        active = cluster.activated(np.maximum(_carried(problem, plan, now), 0.0))
        seconds = cluster.seconds(tokens, active)
        slope = (cluster.seconds(1.01 * tokens, active) - seconds) / (0.01 * tokens)
        slope = np.maximum(slope, 1e-3 * (seconds / tokens).max(axis=2, keepdims=True))
        start = seconds - slope * tokens
        lift = (start - start.min(axis=2, keepdims=True)) / slope
        new = _flow(problem, plan, problem.base + lift, 1.0 / slope, lift)
        for mixed in (new, 0.5 * (now + new)):
            split = mixed[0] if problem.windows == 1 else mixed
            priced = evaluate(problem, plan.with_split(split))
            cost = _penalised(problem, priced)
            better = cost < least
            best[better], least[better] = mixed[better], cost[better]
        now = mixed
    return best


def _carried(problem: Problem, plan: Plan, split: FloatArray) -> FloatArray:
    """Tokens of each replica, by rank."""
    held = np.broadcast_to(np.maximum(plan.slots, 0), split.shape)
    return np.asarray(plan.by_rank(np.take_along_axis(problem.tokens, held, axis=2) * split))


def _penalised(problem: Problem, priced: Evaluation) -> FloatArray:
    """Makespan [windows, layers], far longer where capacities are broken."""
    over = np.maximum(priced.rank_tokens / np.maximum(problem.capacity, 1e-9) - 1, 0.0)
    over = np.where(over > CAPACITY_SLACK, over, 0.0).sum(axis=2)
    return np.asarray(priced.makespan * (1 + 1e6 * over))


def at_best_shares(problem: Problem, plan: Plan) -> Evaluation:
    """Price of a placement: at its best shares if the routing can follow shares."""
    return evaluate(problem, resplit(problem, plan) if problem.routing == "weighted" else plan)


def layer_makespan(problem: Problem, layer: int, slots: IntArray) -> FloatArray:
    """Makespan [windows] of one layer's slots [slots] at their best shares.

    Infinite where token capacities leave no room.
    """
    from moeplace.search.flow import shares

    tokens, base = frozen(problem.tokens[:, layer]), frozen(problem.base[:, layer])
    rank_slots = problem.cluster.slots
    split = np.empty((problem.windows, 1, slots.size))
    begin = np.concatenate([[0], rank_slots.cumsum()])
    speeds = np.broadcast_to(problem.cluster.speeds, base[:, None].shape)
    most = np.broadcast_to(ceiling(problem), speeds.shape)
    held = slots[None].copy()
    held.setflags(write=False)
    shares(
        frozen(tokens[:, None]), frozen(base[:, None]), frozen(speeds), frozen(most), begin, held,
        split,
    )  # fmt: skip
    carried = split[:, 0] * tokens[:, np.maximum(slots, 0)]
    on_rank = np.repeat(np.arange(rank_slots.size), rank_slots)
    total = base + sum_by(carried, on_rank, rank_slots.size)
    activated = problem.cluster.activated(np.maximum(by_rank(carried, rank_slots), 0.0))
    makespan = problem.cluster.seconds(total, activated).max(axis=1)
    over = (total > problem.capacity * (1 + CAPACITY_SLACK)).any(axis=1)
    return np.where(over, np.inf, makespan)
