"""Stages for weighted routing: the sliding window, and groups of ranks."""

import numpy as np

from moeplace._check import BoolArray, IntArray
from moeplace.constraints import (
    MaxReplicas,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.construct import construct
from moeplace.search.groups import grouped
from moeplace.search.run import Run
from moeplace.search.split import layer_makespan, resplit
from moeplace.search.state import State, to_slots
from moeplace.search.window import window

#: Rules that the sliding window and groups of ranks can obey.
POURED = (TokenCapacity, MaxReplicas, ReplicaBudget)


def pours(problem: Problem) -> bool:
    """Whether the sliding window applies."""
    poured = all(isinstance(rule, POURED) for rule in problem.constraints)
    return problem.routing == "weighted" and poured


def pour(run: Run) -> None:
    """Weighted routing: the sliding window, which often reaches the bound exactly."""
    problem = run.problem
    slots, split, placed = window(problem, run.targets * (1 + 2e-12))
    placed &= within_limits(run, slots)
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


def join_ranks(run: Run) -> None:
    """Weighted routing with few spare slots: ranks in groups, the makespan aimed at bisected."""
    problem, steps = run.problem, 64 * run.problem.cluster.total_slots
    assert run.kept is not None
    weight = problem.window_weight
    slots = run.kept.plan.slots.copy()
    best = np.where(run.over(run.kept) > 0, np.inf, problem.mean(run.kept.makespan))
    # above the bounds [layers]: failed, reached, the next try
    low, high, width = np.zeros((3, problem.layers))
    high += np.inf
    for _ in range(12):
        for layer in np.flatnonzero(run.open & (high - low >= run.limits.gap)).tolist():
            if run.late():
                break
            goal = run.targets[layer] * (1 + width[layer])
            reached = np.inf
            found = grouped(problem, layer, goal, run.seed, steps)
            if found is not None:
                run.work += steps
                tried = to_slots(found[0][None], problem.cluster.slots)[0]
                if within_limits(run, tried[None])[0]:
                    reached = float((layer_makespan(problem, layer, tried) * weight).sum())
            if reached < best[layer]:
                best[layer], slots[layer] = reached, tried
            if reached <= goal * (1 + run.limits.gap):
                high[layer] = width[layer]
            else:
                low[layer] = width[layer]
            ahead = max(3 * low[layer], 1e-3)
            width[layer] = ahead if high[layer] == np.inf else (low[layer] + high[layer]) / 2
    run.offer(Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts))


def within_limits(run: Run, slots: IntArray) -> BoolArray:
    """Which layers, of slots [layers or 1, slots], obey the limits of replicas."""
    copies = np.zeros((slots.shape[0], run.problem.experts), dtype=np.int64)
    layer, slot = np.nonzero(slots >= 0)
    np.add.at(copies, (layer, slots[layer, slot]), 1)
    few = np.asarray((copies <= run.problem.most_replicas).all(axis=1))
    return few if run.quota is None else few & (copies.sum(axis=1) <= run.quota)
