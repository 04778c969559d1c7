"""The true optimum of tiny problems, by trying every placement: what all methods are held against.

It shares no code with the package but the problem and its constraints. Experts are placed one
after another, each on every set of ranks that has room (so slots may stay EMPTY), and a branch
is cut only where its cost so far, which never falls as experts are added, is already reached
elsewhere.

Time of a fixed placement, per window, with b_g the base load and v_g the speed of rank g:

* even routing: max over ranks g of (b_g + sum of w_e / copies of e over the experts on g) / v_g;
* weighted routing: max over sets R of ranks of (base load of R + tokens of the experts that lie
  inside R only) / (speed of R). This is the best split: by max-flow / min-cut, tokens fit in
  time T if and only if no set of ranks must run more than it can by T. `split_optimum` says
  the same with a linear program; a test holds the two together.

Token capacities: no rank (even) or set of ranks (weighted) may have to run more tokens than its
capacity. By T a set R can run the least, over its parts A, of T x (speed of A) + (capacity of the
rest), so under weighted routing its time is the largest over A of (what it must run - capacity of
the rest) / (speed of A).
"""

import math
from itertools import product

import numpy as np
from scipy.optimize import linprog

from moeplace.constraints import (
    CAPACITY_SLACK,
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.plan import EMPTY
from moeplace.problem import Problem

#: A branch must be better by more than this share: less is rounding.
SLACK = 1.0 + 1e-12

Key = tuple[float, ...]


def optimum(problem: Problem) -> float:
    """Least objective over all legal plans; infinity if constraints leave none.

    Layers are solved apart and their undominated times (and moves and replicas, under a total
    budget of these) combined. For a mean over windows without such a budget that is one time a
    layer; for the worst window and CVaR it is the times of all windows.
    """
    known = {Pin, Forbid, MaxMoves, NodeGroups, TokenCapacity, MaxReplicas, ReplicaBudget}
    unknown = {type(c) for c in problem.constraints} - known
    assert not unknown, f"the oracle knows no {unknown}"
    assert problem.cluster.planes is None, "the oracle knows no latency planes"
    fronts = [_Search(problem, layer).front() for layer in range(problem.layers)]
    if not all(fronts):
        return math.inf
    budget = problem.max_moves
    limit = math.inf if budget is None or budget.total is None else budget.total
    most = math.inf if problem.replica_budget is None else problem.replica_budget
    totals: list[Key] = [(0.0,) * len(fronts[0][0])]
    for weight, front in zip(problem.layer_weight.tolist(), fronts, strict=True):
        sums: list[Key] = []
        for (*times, moves, held), (*more, moved, copies) in product(totals, front):
            if moves + moved <= limit and held + copies <= most:
                time = [t + weight * k for t, k in zip(times, more, strict=True)]
                _keep(sums, (*time, moves + moved, held + copies))
        totals = sums
    return min((_combined(problem, times) for *times, _, _ in totals), default=math.inf)


def _combined(problem: Problem, steps: list[float]) -> float:
    """Objective of the step times of all windows, or of what they already combine to."""
    if len(steps) == 1 or problem.objective != "cvar":
        return max(steps)
    weights, tail = problem.window_weight.tolist(), 1 - problem.cvar_alpha
    return min(
        t + math.fsum(p * max(z - t, 0.0) for p, z in zip(weights, steps, strict=True)) / tail
        for t in steps
    )


def split_optimum(problem: Problem, layer: int, masks: list[int]) -> list[float]:
    """Least time [windows] of one layer for a fixed placement, by a linear program.

    `masks` holds the ranks of each expert, bit g for rank g. Variables: T, then the tokens
    of each replica; minimise T where every expert's tokens are run and no rank passes T.
    """
    ranks, speeds = problem.ranks, problem.cluster.speeds
    full = np.isfinite(problem.capacity)
    pairs = [(e, g) for e, mask in enumerate(masks) for g in range(ranks) if mask >> g & 1]
    served = np.zeros((len(masks), 1 + len(pairs)))
    load = np.zeros((ranks, 1 + len(pairs)))
    load[:, 0] = -speeds
    for column, (e, g) in enumerate(pairs, start=1):
        served[e, column] = load[g, column] = 1.0
    cost = np.zeros(1 + len(pairs))
    cost[0] = 1.0
    times = []
    for window in range(problem.windows):
        tokens, base = problem.tokens[window, layer], problem.base[window, layer]
        most = load[full] * (np.arange(load.shape[1]) > 0)
        found = linprog(
            cost,
            A_ub=np.concatenate([load, most]),
            b_ub=np.append(-base, (problem.capacity - base)[full]),
            A_eq=served,
            b_eq=tokens,
            method="highs",
        )
        assert found.status in (0, 2), found.message
        times.append(math.inf if found.status == 2 else float(found.fun))
    return times


class _Search:
    """All placements of one layer.

    `sets` are the ranks (even routing) or sets of ranks (weighted) that may set the time; the
    last one is all ranks, whose time is the fluid bound. A placement's time is the maximum of
    tokens [windows, sets] / speed [sets]; putting expert e on `mask` adds w_e * share[mask].
    """

    def __init__(self, problem: Problem, layer: int) -> None:
        cluster, ranks = problem.cluster, problem.ranks
        every = (1 << ranks) - 1
        if problem.routing == "even":
            sets = [1 << g for g in range(ranks)] + [every]
        else:
            sets = list(range(1, every + 1))
        capped = problem.routing == "weighted" and bool(np.isfinite(problem.capacity).any())
        part = [(s, a) for s in sets for a in sets if a == s or (capped and a & ~s == 0)]
        sets = [s for s, _ in part]
        inside = np.array([[s >> g & 1 for s in sets] for g in range(ranks)], dtype=float)
        self.share = np.zeros((every + 1, len(sets)))
        for mask in range(1, every + 1):
            if problem.routing == "even":
                self.share[mask] = [(mask & s).bit_count() / mask.bit_count() for s in sets]
            else:
                self.share[mask] = [mask & ~s == 0 for s in sets]
        whole = np.array(sets) == every  # all tokens lie inside all ranks from the start
        self.share[:, whole] = 0.0
        faster = np.array([[a >> g & 1 for _, a in part] for g in range(ranks)], dtype=float)
        self.speed = cluster.speeds @ faster
        capacity = problem.capacity * (1 + CAPACITY_SLACK)
        capacity = np.minimum(capacity, 1e18)  # so that 0 ranks of it are none
        self.rest = capacity @ (inside - faster)
        self.most = capacity @ inside
        self.tokens = problem.tokens[:, layer]
        self.start = problem.base[:, layer] @ inside
        self.start[:, whole] += self.tokens.sum(axis=1)[:, None]
        self.problem = problem
        self.weight = problem.window_weight
        self.mean = problem.objective == "mean"
        self.limit = problem.most_replicas.tolist()
        self.counted = problem.replica_budget is not None
        self.scalar = self.mean or problem.layers == 1
        self.order = np.argsort(-self.tokens.sum(axis=0), kind="stable").tolist()
        allowed, pinned = problem.allowed[layer], problem.pinned[layer]
        bits = 1 << np.arange(ranks)
        self.allowed, self.pinned = (allowed @ bits).tolist(), (pinned @ bits).tolist()
        self.slots = cluster.slots.tolist()
        self.budget = problem.max_moves
        had = np.zeros(allowed.shape, dtype=np.bool_)
        if self.budget is not None:
            current = self.budget.current
            for expert, rank in zip(current.slots[layer], current.rank_of_slot, strict=True):
                if expert != EMPTY:
                    had[expert, rank] = True
        self.had = (had @ bits).tolist()
        assert cluster.nodes is not None
        self.nodes = [int((cluster.nodes == n) @ bits) for n in np.unique(cluster.nodes)]
        groups = problem.node_groups
        self.group = range(problem.experts) if groups is None else groups.of(problem.experts)
        self.one_node = groups is not None
        alike = [
            (
                cluster.speeds[g],
                self.slots[g],
                *problem.base[:, layer, g],
                *allowed[:, g],
                *pinned[:, g],
                *had[:, g],
                problem.capacity[g],
                self.one_node and cluster.nodes[g],
            )
            for g in range(ranks)
        ]
        self.alike = [alike.index(one) for one in alike]
        self.masks = sorted(range(1, every + 1), key=int.bit_count)
        self.found: list[Key] = []

    def front(self) -> list[Key]:
        """Undominated keys: one time, or [windows] where layers are coupled; then moves, replicas.

        These are 0 unless all layers share a budget of them.
        """
        self._place(0, [0] * len(self.slots), self.start, 0, 0)
        return self.found

    def _place(
        self, depth: int, held: list[int], tokens: np.ndarray, moves: int, copies: int
    ) -> None:
        budget = self.budget
        if budget is not None and budget.per_layer is not None and moves > budget.per_layer:
            return
        counted = moves if budget is not None and budget.total is not None else 0
        if (tokens > self.most * (1 + 1e-13)).any():
            return
        key = (*self._times(tokens), counted, copies if self.counted else 0)
        if _covered(self.found, key):
            return
        if depth == len(self.order):
            _keep(self.found, key)
            return
        expert = self.order[depth]
        full = sum(1 << g for g, h in enumerate(held) if h.bit_count() >= self.slots[g])
        for mask in self.masks:
            if mask & full or mask & ~self.allowed[expert] or self.pinned[expert] & ~mask:
                continue
            if mask.bit_count() > self.limit[expert]:
                continue
            if not self._first_of_its_kind(mask, held):
                continue
            if self.one_node and not self._on_one_node(mask, expert, held):
                continue
            after = [h | (mask >> g & 1) << expert for g, h in enumerate(held)]
            added = np.outer(self.tokens[:, expert], self.share[mask])
            received = (mask & ~self.had[expert]).bit_count()
            number = copies + mask.bit_count()
            self._place(depth + 1, after, tokens + added, moves + received, number)

    def _on_one_node(self, mask: int, expert: int, held: list[int]) -> bool:
        """Whether the expert's group, with these ranks for the expert, stays on one node."""
        members = sum(1 << e for e, g in enumerate(self.group) if g == self.group[expert])
        used = mask | sum(1 << g for g, h in enumerate(held) if h & members)
        return any(used & ~node == 0 for node in self.nodes)

    def _first_of_its_kind(self, mask: int, held: list[int]) -> bool:
        """Of ranks that are alike so far, the first ones are taken: the rest is relabelling."""
        taken: dict[tuple[int, int], int] = {}
        for g, kind in enumerate(zip(self.alike, held, strict=True)):
            here = mask >> g & 1
            if here > taken.get(kind, 1):
                return False
            taken[kind] = here
        return True

    def _times(self, tokens: np.ndarray) -> Key:
        times = ((tokens - self.rest) / self.speed).max(axis=1)
        if self.mean:
            return (math.fsum(times * self.weight),)
        return (_combined(self.problem, times.tolist()),) if self.scalar else tuple(times.tolist())


def _covered(front: list[Key], key: Key) -> bool:
    return any(all(a <= b * SLACK for a, b in zip(other, key, strict=True)) for other in front)


def _keep(front: list[Key], key: Key) -> None:
    """Add a key to a front of undominated ones."""
    if not _covered(front, key):
        front[:] = [other for other in front if not _covered([key], other)] + [key]
