"""A bound for tiny layers: every placement tried, in whole numbers, by a compiled search."""

import numpy as np
from numba import njit

from moeplace._check import IntArray
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
def _excludes(load, same, room, free, allowed, pinned, most, alike, masks, at, limit):  # type: ignore[no-untyped-def]
    """1 if no placement keeps every rank within its `room`, 0 if one does, -1 if undecided.

    `masks` are (ranks as bits, their number), `at` the mask of each expert; the rest [experts],
    [ranks]. Equal experts take masks in order.
    """
    ranks = room.size
    experts = load.size
    rest = np.zeros(experts + 1, dtype=np.int64)
    for e in range(experts - 1, -1, -1):
        rest[e] = rest[e + 1] + load[e]
    at[:] = -1
    placed = np.zeros(experts, dtype=np.bool_)
    order = np.empty(ranks, dtype=np.int64)
    depth = 0
    nodes = 0
    while depth >= 0:
        if placed[depth]:
            share = load[depth] // masks[at[depth], 1]
            for g in range(ranks):
                if masks[at[depth], 0] >> g & 1:
                    room[g] += share
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
        mask = masks[at[depth], 0]
        share = load[depth] // masks[at[depth], 1]
        fits = mask & ~allowed[depth] == 0 and pinned[depth] & ~mask == 0
        fits = fits and masks[at[depth], 1] <= most[depth]
        for g in range(ranks):
            if fits and mask >> g & 1:
                fits = free[g] > 0 and room[g] >= share
                for h in range(g):  # of ranks that are alike so far, the first are taken
                    if alike[h] == alike[g] and room[h] == room[g] and free[h] == free[g]:
                        fits = fits and mask >> h & 1 == 1
        if not fits:
            continue
        placed[depth] = True
        total = 0
        slots = 0
        n = 0
        for g in range(ranks):
            if mask >> g & 1:
                room[g] -= share
                free[g] -= 1
            if free[g] > 0:
                total += room[g]
                slots += free[g]
                i = n
                while i > 0 and room[order[i - 1]] < room[g]:
                    order[i] = order[i - 1]
                    i -= 1
                order[i] = g
                n += 1
        if depth == experts - 1:
            return 0
        if total + n < rest[depth + 1]:  # each room may have lost a part to rounding
            continue
        needed = 0
        for e in range(depth + 1, experts):
            c = 1  # the fewest copies: c of them are no larger than the c-th roomiest rank allows
            while c <= n and room[order[c - 1]] < load[e] // c:
                c += 1
            needed += c if c <= n else slots + 1
            if needed > slots:
                break
        if needed <= slots:
            depth += 1
    return 1


class Exhaustive:
    """One layer in one window under even routing, small enough for every placement to be tried.

    Proof: experts by load, each on every set of ranks with slots and room left for its share;
    a branch ends only where the tokens or the copies that are left cannot fit. Ranks that are
    alike so far may be exchanged, so the first of them are taken; equal experts likewise. Shares
    and room are rounded down, which relaxes (room exceeds every sum of shares that real room
    does); pins, forbids, capacities and most replicas are kept, other rules left out, which
    relaxes further.
    """

    def __init__(self, problem: Problem, window: int, layer: int) -> None:
        cluster = problem.cluster
        self.holds = np.flatnonzero(cluster.slots > 0)
        self.fits = (
            problem.routing == "even" and self.holds.size <= RANKS and problem.experts <= EXPERTS
        )
        load, base = problem.tokens[window, layer], problem.base[window, layer]
        order = np.argsort(-load, kind="stable")
        total = float(load.sum() + base.sum())
        self.scale = GRID / total if total > LEAST else 1.0  # all of it counts as nothing then
        self.load = np.floor(load[order] * self.scale).astype(np.int64)
        self.base = np.floor(base * self.scale)[self.holds]
        self.free = np.minimum(cluster.slots, problem.experts)[self.holds].astype(np.int64)
        allowed = problem.allowed[layer][np.ix_(order, self.holds)]
        self.capacity = problem.capacity[self.holds] * (1 + CAPACITY_SLACK)
        self.most = problem.most_replicas[order]
        if not self.fits:
            return
        self.problem, self.layer, self.order = problem, layer, order
        pinned = problem.pinned[layer][np.ix_(order, self.holds)]
        self.pinned = (pinned << np.arange(self.holds.size)).sum(axis=1).astype(np.int64)
        self.allowed = (allowed << np.arange(self.holds.size)).sum(axis=1).astype(np.int64)
        self.same = np.append(False, self.load[1:] == self.load[:-1])
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
                self.base[g],
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
        """Whether no plan ends within `seconds`; None if not decided within so many nodes."""
        return self.search(seconds, nodes)[0]

    def search(self, seconds: float, nodes: int) -> tuple[bool | None, IntArray | None]:
        """The same, and slots [slots] of a placement that does end, if one was found."""
        if not self.fits:
            return None, None
        reach = self.problem.cluster.tokens_by(np.array([seconds]))[self.holds]
        room = np.minimum(reach, self.capacity) * self.scale * (1 + 1e-12)
        room = np.minimum(room, GRID * 4) - self.base
        if (room < 0).any():
            return True, None
        at = np.empty(self.load.size, dtype=np.int64)
        answer = _excludes(
            self.load, self.same, np.floor(room).astype(np.int64), self.free.copy(), self.allowed,
            self.pinned, self.most, self.alike, self.masks, at, nodes,
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
