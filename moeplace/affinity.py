"""Experts that fire together on one node: fewer copies of a token cross between nodes.

A token goes once to each node that holds one of its experts, so experts that it chooses together
are better on one node (group-aware placement). `gather` exchanges experts between nodes to that
end, and holds every layer's makespan within a gap of the plan's.
"""

from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem, check_problem
from moeplace.topology import checked_trace

#: Exchanges tried for each slot of a layer.
TRIALS = 1000


def coactivation(problem: Problem, trace: Any) -> FloatArray:
    """How many tokens of a trace choose both of two experts, [layers, experts, experts].

    Parameters
    ----------
    problem : Problem
    trace : array-like [tokens, layers, k]

    Raises
    ------
    ProblemError
        If the trace does not fit the problem.
    """
    check_problem(problem)
    trace = checked_trace(problem, trace)
    experts = problem.experts
    count = np.zeros((problem.layers, experts, experts))
    for layer in range(problem.layers):
        chosen = trace[:, layer]
        for first in range(trace.shape[2]):
            for second in range(first):
                pair = chosen[:, first] * experts + chosen[:, second]
                both = np.bincount(pair, minlength=experts**2).reshape(experts, experts)
                count[layer] += both + both.T
        np.fill_diagonal(count[layer], 0.0)
    return count


def gather(
    problem: Problem, plan: Plan, together: FloatArray, *, gap: float = 1e-3, seed: int = 0
) -> Plan:
    """Exchange experts between nodes so that more of those chosen together share one.

    Only experts with one replica move, two at a time between nodes: their load goes with them
    under every dispatch rule. An exchange is made if more pairs then share a node and no rank
    takes longer, in any window, than (1 + gap) times the plan's slowest. Where the outcome would
    break a rule that the plan obeys, the plan itself is returned.

    Parameters
    ----------
    problem : Problem
    plan : Plan
    together : array [layers, experts, experts]
        As `coactivation` gives it.
    gap : float
        How much longer each layer may take in each window.
    seed : int

    Returns
    -------
    Plan
        With the plan's shares, which go with their experts.

    Raises
    ------
    ProblemError
        If `together` has another shape or the gap is negative.
    PlanError
        If the plan does not fit the problem.
    """
    check_problem(problem)
    from moeplace.search.together import exchange  # compiled: imported to be used

    given = np.ascontiguousarray(together, dtype=np.float64)
    shape = (problem.layers, problem.experts, problem.experts)
    if given.shape != shape:
        raise ProblemError(f"Co-activation must have the shape {shape}, got {given.shape}.")
    if not gap >= 0:
        raise ProblemError(f"The gap must be at least 0, got {gap!r}.")
    if problem.cluster.planes is not None:
        raise ProblemError("Experts are gathered at linear speeds only: this cluster has planes.")
    before = evaluate(problem, plan)
    node = np.array(problem.cluster.node_of)
    slots, rank = np.array(plan.slots), np.array(plan.rank_of_slot)
    stream = np.random.SeedSequence(seed).generate_state(problem.layers, np.uint64)
    stream |= np.uint64(1)
    limit = before.makespan[:, :, None] * (1 + gap) * problem.cluster.speeds
    moves = (plan.replicas == 1)[:, :, None] & ~problem.pinned  # [layers, experts, ranks]
    for layer in range(problem.layers):
        exchange(
            layer, TRIALS * rank.size, slots[layer], rank, node, given[layer],
            np.array(moves[layer]), np.array(problem.allowed[layer]),
            np.array(plan.replicas[layer]),
            np.array(problem.tokens[:, layer]), np.array(before.rank_tokens[:, layer]),
            np.array(limit[:, layer]), stream,
        )  # fmt: skip
    found = Plan(
        slots=slots,
        rank_slots=plan.rank_slots,
        experts=plan.experts,
        split=plan.split,  # what moved is whole
        allow_duplicates=plan.allow_duplicates,
    )
    return plan if before.legal and not evaluate(problem, found).legal else found
