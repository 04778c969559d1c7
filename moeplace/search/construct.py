"""Replica counts and speed-aware capped LPT, compiled, for all layers.

Counts: one more replica to the expert with the largest load per replica, until the slots are
used up; optimal for the largest replica. LPT: replicas in descending value, each to the rank
that would end it earliest among those with a free slot and no copy (Graham 1969; on uniform
machines Gonzalez, Ibarra and Sahni 1977).
"""

import numpy as np
from numba import njit

from moeplace._check import IntArray
from moeplace.plan import EMPTY, Plan
from moeplace.search.state import BARRED, HELD, PINNED, State


@njit(cache=True, nogil=True, error_model="numpy")
def ascending(values):  # type: ignore[no-untyped-def]
    """Positions in ascending order, stably; sorting is slow to compile, so it stands once."""
    return np.argsort(values, kind="mergesort")


@njit(cache=True, nogil=True, error_model="numpy")
def sort_rank(slot, value, size, share):  # type: ignore[no-untyped-def]
    """Refresh a rank's values and sort its slots by them, stably; return their sum."""
    total = 0.0
    for i in range(size):
        e = slot[i]
        v = share[e]
        j = i
        while j > 0 and value[j - 1] > v:
            value[j] = value[j - 1]
            slot[j] = slot[j - 1]
            j -= 1
        value[j] = v
        slot[j] = e
    for i in range(size):
        total += value[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _count(load, pins, most, slots, copies):  # type: ignore[no-untyped-def]
    """Replicas of each expert: the pinned ones, at least one, then by load per replica."""
    experts = most.size
    used = 0
    for e in range(experts):
        copies[e] = max(1, pins[e])
        used += copies[e]
    share = load[:experts] / copies[:experts]
    heap = ascending(-share)  # descending order is a heap
    while used < slots:
        e = heap[0]
        if share[e] <= 0.0:
            return  # only experts without tokens are left: their slots stay EMPTY
        if copies[e] >= most[e]:
            share[e] = 0.0
        else:
            copies[e] += 1
            used += 1
            share[e] = load[e] / copies[e]
        i = 0
        while True:
            child = 2 * i + 1
            if child >= experts:
                break
            a = heap[child]
            if child + 1 < experts:
                b = heap[child + 1]
                if share[b] > share[a] or (share[b] == share[a] and b < a):
                    child += 1
                    a = b
            if share[a] > share[e] or (share[a] == share[e] and a < e):
                heap[i] = a
                heap[child] = e
                i = child
            else:
                break


@njit(cache=True, nogil=True, error_model="numpy")
def _put(g, e, slot, used, on):  # type: ignore[no-untyped-def]
    slot[g, used[g]] = e
    used[g] += 1
    on[g, e] |= HELD


@njit(cache=True, nogil=True, error_model="numpy")
def _take(g, e, slot, used, on):  # type: ignore[no-untyped-def]
    for k in range(used[g]):
        if slot[g, k] == e:
            used[g] -= 1
            slot[g, k] = slot[g, used[g]]
            slot[g, used[g]] = on.shape[1] - 1
            on[g, e] &= ~np.uint8(HELD)
            return


@njit(cache=True, nogil=True, error_model="numpy")
def _make_room(e, cap, slot, used, on, copies):  # type: ignore[no-untyped-def]
    """Free a slot for the only copy of `e` by a shortest chain of moves between full ranks.

    Breadth first from the ranks where `e` may lie: a rank passes one of its experts on to the
    next. The chain ends where a slot is free, or a copy beyond an expert's first can be given
    up. If no chain exists, the ranks reached are full of experts that can lie nowhere else, so
    no plan obeys the pins and forbids: returns False.
    """
    ranks = cap.size
    via = np.full(ranks, -2)  # rank that hands over to this one, -1 at the start
    passed = np.zeros(ranks, dtype=np.int64)  # the expert handed over
    queue = np.empty(ranks, dtype=np.int64)
    head = 0
    tail = 0
    for g in range(ranks):
        if on[g, e] == 0:
            via[g] = -1
            queue[tail] = g
            tail += 1
    while head < tail:
        g = queue[head]
        head += 1
        end = used[g] < cap[g]
        if not end:
            for k in range(used[g]):
                x = slot[g, k]
                if copies[x] > 1 and not on[g, x] & PINNED:
                    _take(g, x, slot, used, on)
                    copies[x] -= 1
                    end = True
                    break
        if end:
            while via[g] != -1:
                h = via[g]
                x = passed[g]
                _take(h, x, slot, used, on)
                _put(g, x, slot, used, on)
                g = h
            _put(g, e, slot, used, on)
            return True
        for k in range(used[g]):
            x = slot[g, k]
            if on[g, x] & PINNED:
                continue
            for h in range(ranks):
                if via[h] == -2 and on[h, x] == 0:
                    via[h] = g
                    passed[h] = x
                    queue[tail] = h
                    tail += 1
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def _construct(  # type: ignore[no-untyped-def]
    load, base, speeds, cap, least, limit, slot, value, tokens, copies, on
):
    """Counts and LPT for each layer; returns the first layer without a legal placement, or -1."""
    layers, ranks, experts = load.shape[0], cap.size, load.shape[1] - 1
    used = np.empty(ranks, dtype=np.int64)
    pins = np.empty(experts, dtype=np.int64)
    most = np.empty(experts, dtype=np.int64)
    share = np.zeros(experts + 1)
    total = cap.sum()
    for layer in range(layers):
        mine = on[layer]
        speed = speeds[layer]
        pins[:] = 0
        most[:] = 0
        for g in range(ranks):
            used[g] = 0
            for e in range(experts):
                if not mine[g, e] & BARRED:
                    most[e] += 1
                if mine[g, e] & PINNED:
                    pins[e] += 1
        for e in range(experts):
            most[e] = min(most[e], limit[e])
        c = copies[layer]
        _count(load[layer], pins, most, total - least[layer, experts], c)
        t = base[layer].copy()
        for e in range(experts):
            share[e] = load[layer, e] / c[e]
        for g in range(ranks):
            for e in range(experts):
                if mine[g, e] & PINNED:
                    if mine[g, e] & BARRED or used[g] == cap[g]:
                        return layer
                    _put(g, e, slot[layer], used, mine)
                    t[g] += share[e]
        for e in ascending(-share[:experts]):
            for copy in range(pins[e], c[e]):
                best = -1
                soonest = np.inf
                for g in range(ranks):
                    if used[g] < cap[g] and mine[g, e] == 0:
                        end = (t[g] + share[e]) / speed[g]
                        if end < soonest:
                            best = g
                            soonest = end
                if best >= 0:
                    _put(best, e, slot[layer], used, mine)
                    t[best] += share[e]
                elif copy > 0:
                    c[e] = copy  # no rank left for it: give the copies back
                    break
                elif not _make_room(e, cap, slot[layer], used, mine, c):
                    return layer
        c[experts] = total
        for e in range(experts):
            share[e] = load[layer, e] / c[e]
            c[experts] -= c[e]
        for g in range(ranks):
            tokens[layer, g] = base[layer, g] + sort_rank(
                slot[layer, g], value[layer, g], cap[g], share
            )
    return -1


def construct(state: State) -> int:
    """Fill an empty state; return the first layer that pins and forbids leave no plan, or -1."""
    return int(
        _construct(
            state.load,
            state.base,
            state.speed,
            state.cap,
            state.least,
            state.most,
            state.slot,
            state.value,
            state.tokens,
            state.copies,
            state.on,
        )
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _adopt(layers, load, base, cap, slot, value, tokens, copies, on):  # type: ignore[no-untyped-def]
    """Recompute all that follows from `slot` and its copies."""
    experts = load.shape[1] - 1
    share = np.zeros(experts + 1)
    for layer in layers:
        copies[layer] = 0
        for g in range(cap.size):
            for e in range(experts):
                on[layer, g, e] &= ~np.uint8(HELD)
            for k in range(cap[g]):
                e = slot[layer, g, k]
                copies[layer, e] += 1
                if e != experts:
                    on[layer, g, e] |= HELD
        for e in range(experts):
            share[e] = load[layer, e] / copies[layer, e]
        for g in range(cap.size):
            tokens[layer, g] = base[layer, g] + sort_rank(
                slot[layer, g], value[layer, g], cap[g], share
            )


def adopt(state: State, plan: Plan, layers: IntArray) -> None:
    """Continue from a legal plan's placement in `layers`."""
    experts = state.load.shape[1] - 1
    held = plan.by_rank(plan.slots)[layers]
    held = np.where(held == EMPTY, experts, held)
    # free slots last, so that those beyond what a rank can use are cut off
    held = np.take_along_axis(held, np.argsort(held == experts, axis=2, kind="stable"), axis=2)
    state.slot[layers] = held[:, :, : state.slot.shape[2]]
    refresh(state, layers)


def refresh(state: State, layers: IntArray) -> None:
    """Recompute all that follows from the slots of `layers`."""
    _adopt(
        layers,
        state.load,
        state.base,
        state.cap,
        state.slot,
        state.value,
        state.tokens,
        state.copies,
        state.on,
    )
