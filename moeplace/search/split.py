"""Best shares for a placement that stays as it is (weighted routing)."""

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen, sum_by
from moeplace.constraints import CAPACITY_SLACK
from moeplace.errors import ProblemError
from moeplace.evaluate import Evaluation, check_fits, evaluate
from moeplace.plan import Plan, by_rank
from moeplace.problem import Problem
from moeplace.search.state import ceiling


def resplit(problem: Problem, plan: Plan) -> Plan:
    """Shares that minimise every layer's makespan in every window, placement unchanged.

    Exact: a parametric maximum flow finds the least T at which all tokens reach ranks that hold
    their experts (discrete Newton: each minimum cut names the ranks that are too slow and gives
    the next T). Where token capacities leave no room, some tokens break them.
    Shares are per window when the problem has several.

    Raises
    ------
    ProblemError
        If the routing is not weighted: the engine would ignore shares.
    PlanError
        If the plan does not fit the problem.
    """
    from moeplace.search.flow import shares

    if problem.routing != "weighted":
        raise ProblemError(
            f"Shares cannot be chosen under {problem.routing} routing: the engine shares by its "
            'own rule. Set routing="weighted" if it can follow shares.'
        )
    check_fits(problem, plan)
    split = np.empty((problem.windows, *plan.slots.shape))
    begin = np.concatenate([[0], plan.rank_slots.cumsum()])
    speeds = problem.cluster.speeds
    shares(problem.tokens, problem.base, speeds, ceiling(problem), begin, plan.slots, split)
    return plan.with_split(split[0] if problem.windows == 1 else split)


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
    speeds = problem.cluster.speeds
    held = slots[None].copy()
    held.setflags(write=False)
    shares(tokens[:, None], base[:, None], speeds, ceiling(problem), begin, held, split)
    carried = split[:, 0] * tokens[:, np.maximum(slots, 0)]
    on_rank = np.repeat(np.arange(rank_slots.size), rank_slots)
    total = base + sum_by(carried, on_rank, rank_slots.size)
    activated = problem.cluster.activated(np.maximum(by_rank(carried, rank_slots), 0.0))
    makespan = problem.cluster.seconds(total, activated).max(axis=1)
    over = (total > problem.capacity * (1 + CAPACITY_SLACK)).any(axis=1)
    return np.where(over, np.inf, makespan)
