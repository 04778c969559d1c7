"""Losing ranks: what is left of a problem and a plan, and plans that survive a loss."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.bounds import lower_bound
from moeplace.constraints import Constraint, Forbid, MaxMoves, MaxReplicas, Pin, TokenCapacity
from moeplace.errors import ProblemError
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares
from moeplace.solve import solve


def unserved(plan: Plan, gone: Any) -> int:
    """Experts, over all layers, of which no replica is left without the ranks `gone` [ranks]."""
    left = np.where(np.asarray(gone)[plan.rank_of_slot], EMPTY, plan.slots)
    held = np.zeros((plan.layers, plan.experts + 1), dtype=np.bool_)
    np.put_along_axis(held, np.where(left == EMPTY, plan.experts, left), True, axis=1)
    return int((~held[:, :-1]).sum())


def without(problem: Problem, gone: Any) -> Problem:
    """The problem on the ranks that are left; rules on lost ranks go with them.

    Raises
    ------
    ProblemError
        If the experts do not fit on what is left.
    """
    left = np.flatnonzero(~np.asarray(gone))
    cluster = problem.cluster
    assert cluster.nodes is not None
    rules: list[Constraint] = []
    for rule in problem.constraints:
        if isinstance(rule, Pin | Forbid):
            if rule.rank in left:
                at = int(np.searchsorted(left, rule.rank))
                rules.append(replace(rule, rank=at))
        elif isinstance(rule, TokenCapacity):
            rules.append(TokenCapacity(rule.of(problem.ranks)[left]))
        elif not isinstance(rule, MaxMoves):
            rules.append(rule)
    changed = replace(
        cluster,
        speeds=cluster.speeds[left],
        slots=cluster.slots[left],
        nodes=cluster.nodes[left],
    )
    base = np.asarray(problem.base_load)[..., left]
    return replace(problem, cluster=changed, base_load=base, constraints=rules)


def halves(speeds: FloatArray, group: IntArray) -> Any:
    """Ranks [ranks] of one of two sides, groups kept whole, about equally fast."""
    names = np.unique(group)
    power = np.array([speeds[group == name].sum() for name in names])
    side = np.zeros(speeds.size, dtype=np.bool_)
    sums, counts = [0.0, 0.0], [0, 0]
    most = math.ceil(names.size / 2)
    for index in np.argsort(-power, kind="stable"):
        here = int(sums[1] < sums[0])
        if counts[here] == most:
            here = 1 - here
        sums[here] += power[index]
        counts[here] += 1
        side |= (group == names[index]) & bool(here)
    return side


def twice(problem: Problem, side: Any, how: dict[str, Any]) -> Plan:
    """A plan in which every expert lies on both sides: a plan for half the load on each.

    Under even routing a side gets half of an expert's tokens only if both hold as many replicas
    of it, so the second side is planned layer by layer within the first one's counts.

    Parameters
    ----------
    side : array of bool [ranks]
        The ranks of one side.
    how : dict
        For `solve`: time_limit and work_limit (one may be None) and what else it takes.

    Raises
    ------
    ProblemError
        If one side cannot hold all experts, or a rule leaves it no plan.
    """
    half = replace(problem, loads=problem.loads.scale(0.5))
    one, two = without(half, ~side), without(half, side)
    first = solve(one, **how)
    if first.evaluation is None:
        raise ProblemError(f"no plan for one side: {first.reason}")
    slots = np.full((problem.layers, problem.cluster.total_slots), EMPTY)
    on = np.repeat(side, problem.cluster.slots)
    slots[:, on] = first.plan.slots
    slots[:, ~on] = _matched(two, first.plan.replicas, how)
    return Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)


def twice_bound(problem: Problem) -> float:
    """Lower bound on the price of plans in which every expert has two replicas at least.

    No expert has more than two and all spare ones. Under even routing without spare ones every
    slot holds half an expert: a problem of twice as many experts of half the load.
    """
    spare = problem.cluster.total_slots - 2 * problem.experts
    rules = [rule for rule in problem.constraints if not isinstance(rule, MaxReplicas)]
    limited = replace(problem, constraints=[*rules, MaxReplicas(max(spare, 0) + 2)])
    bound = lower_bound(limited, prices=False).total
    if spare == 0 and problem.routing == "even":
        tokens = np.tile(problem.loads.tokens / 2, (1, 1, 2))
        halved = replace(problem.loads, tokens=tokens)
        bound = max(bound, lower_bound(replace(problem, loads=halved, constraints=[])).total)
    return bound


def _matched(problem: Problem, counts: IntArray, how: dict[str, Any]) -> IntArray:
    if problem.routing == "weighted":
        second = solve(problem, **how)
        if second.evaluation is None:
            raise ProblemError(f"no plan for one side: {second.reason}")
        return second.plan.slots
    rows = []
    limits = [rule for rule in problem.constraints if isinstance(rule, MaxReplicas)]
    time_limit, work_limit = how["time_limit"], how["work_limit"]
    part = how | {
        "time_limit": None if time_limit is None else time_limit / problem.layers,
        "work_limit": None if work_limit is None else -(-work_limit // problem.layers),
    }
    for layer in range(problem.layers):
        loads = replace(problem.loads, tokens=problem.loads.tokens[:, layer : layer + 1])
        base = np.broadcast_to(problem.base_load, (problem.windows, problem.layers, problem.ranks))[
            :, layer : layer + 1
        ]
        rules: list[Constraint] = [MaxReplicas(np.maximum(counts[layer], 1))]
        for rule in problem.constraints:
            if isinstance(rule, Pin | Forbid):
                if rule.layer in (None, layer):
                    rules.append(replace(rule, layer=None))
            elif rule not in limits:
                rules.append(rule)
        alone = replace(problem, loads=loads, base_load=base, layer_weight=None, constraints=rules)
        found = solve(alone, **part)
        if found.evaluation is None:
            raise ProblemError(f"no plan for one side of layer {layer}: {found.reason}")
        rows.append(found.plan.slots[0])
    return np.array(rows)


def emptied(problem: Problem, plan: Plan, gone: Any) -> Plan:
    """The plan without the replicas of some ranks: others take their tokens."""
    slots = np.where(np.asarray(gone)[plan.rank_of_slot], EMPTY, plan.slots)
    left = Plan(slots=slots, rank_slots=plan.rank_slots, experts=plan.experts)
    return at_best_shares(problem, left).plan
