"""A bound for tiny layers: every placement tried, in whole numbers, by a compiled search."""

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.constraints import CAPACITY_SLACK
from moeplace.plan import EMPTY
from moeplace.problem import Problem

#: Largest number of ranks with slots, and of experts.
RANKS, EXPERTS = 10, 32
#: Tokens are multiplied to whole numbers of this size for all of a layer's load.
GRID = float(1 << 44)
#: Less than this in all is no load: its grid would overflow.
LEAST = 1e-250
#: Nodes of the search when a bound is checked again.
THOROUGH = 2_000_000_000


@njit(cache=True, nogil=True, error_model="numpy")
def _excludes(  # type: ignore[no-untyped-def]
    load, same, room, full, pace, least, price, free, allowed, pinned, most, alike, masks, at, limit
):
    """1 if no placement keeps every rank within its `room`, 0 if one does, -1 if undecided.

    `load` [windows, experts], `room` [windows, ranks]. Nor may the sum over windows of the slowest
    rank's (full - room) x pace, or `least`, be above `price`. `masks` are (ranks as bits, their
    number), `at` the mask of each expert; the rest [experts], [ranks]. Equal experts take masks
    in order.
    """
    windows, ranks = room.shape
    experts = load.shape[1]
    rest = np.zeros((windows, experts + 1), dtype=np.int64)
    for w in range(windows):
        for e in range(experts - 1, -1, -1):
            rest[w, e] = rest[w, e + 1] + load[w, e]
    at[:] = -1
    placed = np.zeros(experts, dtype=np.bool_)
    order = np.empty(ranks, dtype=np.int64)
    depth = 0
    nodes = 0
    while depth >= 0:
        if placed[depth]:
            for g in range(ranks):
                if masks[at[depth], 0] >> g & 1:
                    for w in range(windows):
                        room[w, g] += load[w, depth] // masks[at[depth], 1]
                    free[g] += 1
            placed[depth] = False
        elif at[depth] < 0 and same[depth]:
            at[depth] = at[depth - 1] - 1
        at[depth] += 1
        if at[depth] == masks.shape[0]:
            at[depth] = -1
            depth -= 1
            continue
        nodes += 1
        if nodes > limit:
            return -1
        mask, copies = masks[at[depth], 0], masks[at[depth], 1]
        fits = mask & ~allowed[depth] == 0 and pinned[depth] & ~mask == 0
        fits = fits and copies <= most[depth]
        for g in range(ranks):
            if fits and mask >> g & 1:
                fits = free[g] > 0
                for w in range(windows):
                    fits = fits and room[w, g] >= load[w, depth] // copies
                for h in range(g):  # of ranks that are alike so far, the first are taken
                    if alike[h] == alike[g] and free[h] == free[g]:
                        equal = True
                        for w in range(windows):
                            equal = equal and room[w, h] == room[w, g]
                        fits = fits and (not equal or mask >> h & 1 == 1)
        if not fits:
            continue
        placed[depth] = True
        slots = 0
        for g in range(ranks):
            if mask >> g & 1:
                for w in range(windows):
                    room[w, g] -= load[w, depth] // copies
                free[g] -= 1
            slots += free[g]
        dear = 0.0
        for w in range(windows):
            slowest = least[w]
            for g in range(ranks):
                slowest = max(slowest, (full[w, g] - room[w, g]) * pace[w, g])
            dear += slowest
        if dear > price:
            continue
        if depth == experts - 1:
            return 0
        for w in range(windows):
            total = 0
            n = 0
            for g in range(ranks):
                if free[g] > 0:
                    total += room[w, g]
                    i = n
                    while i > 0 and room[w, order[i - 1]] < room[w, g]:
                        order[i] = order[i - 1]
                        i -= 1
                    order[i] = g
                    n += 1
            if total + n < rest[w, depth + 1]:  # each room may have lost a part to rounding
                fits = False
                break
            needed = 0
            for e in range(depth + 1, experts):
                c = 1  # fewest copies: c of them are no larger than the c-th roomiest rank allows
                while c <= n and room[w, order[c - 1]] < load[w, e] // c:
                    c += 1
                needed += c if c <= n else slots + 1
                if needed > slots:
                    fits = False
                    break
            if not fits:
                break
        if fits:
            depth += 1
    return 1


class Exhaustive:
    """One layer under even routing, small enough for every placement to be tried.

    In one window (its makespan), or in all together under linear speeds (the sum of weight x
    makespan, weights [windows] by default those of the mean).
    Proof: experts by load, each on every set of ranks with slots and room left for its share;
    a branch ends only where the tokens or the copies that are left cannot fit, or the makespans
    of what is placed are too dear already. Ranks that are alike so far may be exchanged, so the
    first of them are taken; equal experts likewise. Shares and room are rounded down, which
    relaxes (room exceeds every sum of shares that real room does); pins, forbids, capacities and
    most replicas are kept, other rules left out, which relaxes further.
    """

    def __init__(
        self, problem: Problem, window: int | None, layer: int, weight: FloatArray | None = None
    ) -> None:
        cluster = problem.cluster
        self.holds = np.flatnonzero(cluster.slots > 0)
        chosen = np.arange(problem.windows) if window is None else np.array([window])
        self.fits = (
            problem.routing == "even"
            and self.holds.size <= RANKS
            and problem.experts <= EXPERTS
            and (chosen.size == 1 or not cluster.nonlinear)
        )
        if not self.fits:
            return
        tokens, base = problem.tokens[chosen, layer], problem.base[chosen, layer]
        totals = tokens.sum(axis=1) + base.sum(axis=1)
        order = np.argsort(
            -(tokens / np.maximum(totals, LEAST)[:, None]).sum(axis=0), kind="stable"
        )
        # without load all of it counts as nothing
        self.scale = np.where(totals > LEAST, GRID / np.maximum(totals, LEAST), 1.0)
        self.load = np.floor(tokens[:, order] * self.scale[:, None]).astype(np.int64)
        self.base = np.floor(base * self.scale[:, None])[:, self.holds]
        self.free = np.minimum(cluster.slots, problem.experts)[self.holds].astype(np.int64)
        allowed = problem.allowed[layer][np.ix_(order, self.holds)]
        self.capacity = problem.capacity[self.holds] * (1 + CAPACITY_SLACK)
        self.most = problem.most_replicas[order]
        self.problem, self.layer, self.order = problem, layer, order
        if weight is None:
            weight = problem.window_weight if window is None else np.ones(1)
        self.weight = weight
        self.fluid = problem.fluid[chosen, layer]
        pinned = problem.pinned[layer][np.ix_(order, self.holds)]
        self.pinned = (pinned << np.arange(self.holds.size)).sum(axis=1).astype(np.int64)
        self.allowed = (allowed << np.arange(self.holds.size)).sum(axis=1).astype(np.int64)
        self.same = np.append(False, (self.load[:, 1:] == self.load[:, :-1]).all(axis=0))
        self.same[1:] &= self.allowed[1:] == self.allowed[:-1]
        self.same[1:] &= self.pinned[1:] == self.pinned[:-1]
        self.same[1:] &= self.most[1:] == self.most[:-1]
        latency = np.concatenate([*cluster.knots[:2], cluster.knots[2][:, None]], axis=1)
        latency = latency[self.holds]
        kinds = [
            (
                latency[g].tobytes(),
                self.capacity[g],
                self.free[g],
                self.base[:, g].tobytes(),
                allowed[:, g].tobytes(),
                pinned[:, g].tobytes(),
            )
            for g in range(self.holds.size)
        ]
        self.alike = np.array([kinds.index(kind) for kind in kinds], dtype=np.int64)
        masks = np.arange(1, 1 << self.holds.size)
        count = np.array([int(mask).bit_count() for mask in masks])
        usable = count <= int(problem.most_replicas.max())
        masks, count = masks[usable], count[usable]
        by_count = np.argsort(count, kind="stable")
        self.masks = np.stack([masks[by_count], count[by_count]], axis=1).astype(np.int64)

    def refutes(self, seconds: float, nodes: int = THOROUGH) -> bool | None:
        """Whether no plan costs at most `seconds`; None if not decided within so many nodes."""
        return self.search(seconds, nodes)[0]

    def search(self, seconds: float, nodes: int) -> tuple[bool | None, IntArray | None]:
        """The same, and slots [slots] of a placement that does end, if one was found."""
        if not self.fits:
            return None, None
        # the other windows cost at least their fluid bounds
        least = self.weight * self.fluid * (1 - 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = (seconds - (least.sum() - least)) / self.weight
        if (self.weight > 0)[left < 0].any():
            return True, None
        left = np.where(self.weight > 0, left, np.inf)[:, None]
        cluster, each = self.problem.cluster, self.scale[:, None]
        reach = cluster.tokens_by(left) if cluster.nonlinear else left * cluster.speeds
        room = np.minimum(reach[:, self.holds], self.capacity) * each * (1 + 1e-12)
        room = np.minimum(room, GRID * 4) - self.base
        if (room < 0).any():
            return True, None
        room = np.floor(room).astype(np.int64)
        pace = self.weight[:, None] / (cluster.speeds[self.holds] * each) * (1 - 1e-12)
        if self.weight.size == 1 and self.weight[0] == 1:  # room says it all
            pace, least, seconds = np.zeros_like(pace), np.zeros_like(least), 0.0
        at = np.empty(self.load.shape[1], dtype=np.int64)
        answer = _excludes(
            self.load, self.same, room, self.base + room, pace, least, seconds, self.free.copy(),
            self.allowed, self.pinned, self.most, self.alike, self.masks, at, nodes,
        )  # fmt: skip
        if answer != 0:
            return (True if answer == 1 else None), None
        slots = np.full(self.problem.cluster.total_slots, EMPTY)
        begin = np.concatenate([[0], self.problem.cluster.slots.cumsum()])[self.holds]
        for expert, mask in zip(self.order.tolist(), self.masks[at, 0].tolist(), strict=True):
            for n in range(self.holds.size):
                if mask >> n & 1:
                    slots[begin[n]] = expert
                    begin[n] += 1
        return False, slots
