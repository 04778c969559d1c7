"""Expert groups on nodes, few enough for every way to share them out.

A node with some groups is a problem of its own: their experts on its ranks. The layer ends no
earlier than its slowest node, so the best way to share the groups out, each node at its lower
bound, is a lower bound for all; and a good way to begin.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem

#: Most groups, and most pairs of a node and a set of groups that it may hold.
GROUPS, PAIRS = 10, 600
#: Time limit for each layer from which on it is tried: several times what it takes.
SECONDS = 0.012


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """The best way to share groups out over nodes.

    Attributes
    ----------
    bound : array [windows, layers]
        No plan gives the layer a smaller makespan in that window.
    node_of : array [windows, layers, groups]
        The way that reaches it.
    """

    bound: FloatArray
    node_of: IntArray


def affordable(problem: Problem, seconds: float | None) -> bool:
    """Whether `share_groups` is of use and takes a small part of so many seconds."""
    return problem.node_groups is not None and (
        seconds is None or seconds >= SECONDS * problem.layers
    )


@lru_cache(maxsize=2)  # bound and search ask for the same
def share_groups(problem: Problem) -> Shared | None:
    """Bound and assignment under `NodeGroups`; None if there are too many ways.

    Any routing. Proof: the replicas of a group lie on one node, so its tokens run there. For
    every node and every set of groups that fits its slots, `lower_bound` of these experts on the
    node's ranks holds for the node. Over all ways to give each group to one node, the least of
    the largest node bound is found exactly, by dynamic programming over sets of groups.
    """
    from moeplace.bounds import lower_bound

    assert problem.node_groups is not None
    assert problem.cluster.nodes is not None
    groups = problem.node_groups.of(problem.experts)
    number = int(groups.max()) + 1
    names, node = np.unique(problem.cluster.nodes, return_inverse=True)
    nodes = names.size
    if number > GROUPS or nodes > number * PAIRS:
        return None
    size = np.bincount(groups, minlength=number)
    sets = np.arange(1 << number)
    members = (sets[:, None] >> np.arange(number)) & 1
    experts = members @ size
    pairs = list(_pairs(problem, node, nodes, experts))
    if len(pairs) > PAIRS:
        return None
    shape = (problem.windows, problem.layers)
    cost = np.full((nodes, sets.size, *shape), np.inf)
    for at in range(nodes):
        base = problem.cluster.seconds(problem.base)[:, :, node == at]
        cost[at, 0] = base.max(axis=2) if base.shape[2] else 0.0
    for at, chosen in pairs:
        inside = np.flatnonzero(members[chosen][groups])
        cost[at, chosen] = lower_bound(_alone(problem, inside, node == at)).per_layer
    best = np.full((nodes + 1, sets.size, *shape), np.inf)
    best[0, 0] = 0.0
    taken = np.zeros((nodes + 1, sets.size, *shape), dtype=np.int64)
    for at in range(nodes):
        for chosen in range(sets.size):
            part = chosen
            while True:  # every part of `chosen` for this node, none included
                value = np.maximum(best[at, chosen ^ part], cost[at, part])
                better = value < best[at + 1, chosen]
                best[at + 1, chosen] = np.where(better, value, best[at + 1, chosen])
                taken[at + 1, chosen] = np.where(better, part, taken[at + 1, chosen])
                if part == 0:
                    break
                part = (part - 1) & chosen
    node_of = np.zeros((*shape, number), dtype=np.int64)
    window, layer = np.indices(shape)
    left = np.full(shape, sets.size - 1)
    for at in range(nodes, 0, -1):
        part = taken[at, left, window, layer]
        node_of[((part[..., None] >> np.arange(number)) & 1) == 1] = names[at - 1]
        left = left ^ part
    bound = best[nodes, -1]
    return Shared(bound=np.where(np.isfinite(bound), bound, 0.0), node_of=node_of)


def _pairs(
    problem: Problem, node: IntArray, nodes: int, experts: IntArray
) -> Iterator[tuple[int, int]]:
    """Nodes and sets of groups that fit their slots."""
    for at in range(nodes):
        slots = np.minimum(problem.cluster.slots[node == at], experts[:, None]).sum(axis=1)
        for chosen in np.flatnonzero((experts > 0) & (slots >= experts)).tolist():
            yield at, chosen


def _alone(
    problem: Problem, experts: IntArray, ranks: "np.ndarray[tuple[int], np.dtype[np.bool_]]"
) -> Problem:
    """Some experts on the ranks of a node, other rules left out."""
    cluster, loads = problem.cluster, problem.loads
    every = np.broadcast_to(problem.base_load, problem.base.shape)
    return Problem(
        LoadHistogram(tokens=loads.tokens[:, :, experts], passes=loads.passes, phase=loads.phase),
        cluster.of(ranks),
        routing=problem.routing,
        base_load=every[:, :, ranks],
        window_weight=problem.window_weight,
    )
