"""An expert in every slot: what most engines' files need."""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.evaluate import check_fits, evaluate
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares


def fill(problem: Problem, plan: Plan) -> Plan:
    """The plan with a replica in every EMPTY slot, as long as the problem's rules allow one.

    Each slot takes the expert whose further replica costs the layer least, by the even rule. A
    replica may cost time: another share of its tokens on a slow rank, another activation. The
    plan is returned as it is if one with more replicas breaks a rule that it obeys. Shares are
    chosen anew under weighted routing.

    Raises
    ------
    PlanError
        If the plan does not fit the problem.
    """
    check_fits(problem, plan)
    if not (plan.slots == EMPTY).any():
        return plan
    slots, rank_of = np.array(plan.slots), plan.rank_of_slot
    budget = problem.replica_budget
    spare = slots.size if budget is None else budget - int((slots != EMPTY).sum())
    for layer, slot in np.argwhere(slots == EMPTY):
        rank = rank_of[slot]
        count = np.bincount(slots[layer][slots[layer] != EMPTY], minlength=problem.experts)
        may = problem.allowed[layer, :, rank] & (count < problem.most_replicas)
        may[slots[layer][(rank_of == rank) & (slots[layer] != EMPTY)]] = False
        if spare <= 0 or not may.any():
            continue
        experts = np.flatnonzero(may)
        costs = _costs(problem, layer, slots[layer], rank_of, count, int(rank), experts)
        slots[layer, slot] = experts[int(np.argmin(costs))]
        spare -= 1
    full = Plan(slots=slots, rank_slots=plan.rank_slots, experts=plan.experts)
    priced = at_best_shares(problem, full)
    broken = not priced.legal and evaluate(problem, plan).legal
    return plan if broken else priced.plan


def _costs(
    problem: Problem,
    layer: int,
    row: IntArray,
    rank_of: IntArray,
    count: IntArray,
    rank: int,
    experts: IntArray,
) -> FloatArray:
    """Mean makespan [experts] of the layer if `rank` gets one more replica of each."""
    held = np.zeros((problem.experts, problem.ranks))
    used = row != EMPTY
    held[row[used], rank_of[used]] = 1.0
    loads = problem.tokens[:, layer]  # [windows, experts]
    each = loads / np.maximum(count, 1)
    tokens = problem.base[:, layer] + each @ held  # [windows, ranks]
    active = -np.expm1(-each) @ held
    less = loads[:, experts] / (count[experts] + 1)  # [windows, candidates]
    change = (less - each[:, experts])[:, :, None] * held[experts]
    change[:, :, rank] += less
    busy = (np.expm1(-each) - np.expm1(-(loads / (count + 1))))[:, experts, None] * held[experts]
    busy[:, :, rank] -= np.expm1(-less)
    seconds = problem.cluster.seconds(tokens[:, None] + change, active[:, None] + busy)
    return np.asarray(problem.mean(seconds.max(axis=2)))
