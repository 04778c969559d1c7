"""Compiled local search under even routing: exchanges out of the slowest rank, and kicks.

One layer's search: exchange one slot of the slowest rank with one of another rank, over all
other ranks, where it lowers the larger of the two times most; when nothing helps, the same
with pairs of slots; when nothing helps, kick (move a replica, or exchange at random), descend
again, and keep the outcome if it is not worse. A layer ends at its target.

Sources: interchange for makespan, Finn and Horowitz 1979; multi-exchange neighbourhoods,
Frangioni, Necciari and Scutella 2004; iterated local search, Lourenco, Martin and Stuetzle 2003.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.search.construct import sort_rank
from moeplace.search.state import HELD, PINNED, State

#: Pairs of slots are exchanged on ranks of at most this many slots.
MOST_PAIRED = 96
#: Odds of the kicks: move a replica, exchange close values of the slowest rank, any exchange.
KICKS = (4, 4, 2)
#: An exchange must lower the larger time by this factor: rounding alone never counts.
LESS = 1.0 - 1e-12


@njit(cache=True, nogil=True)
def random_below(stream, layer, n):  # type: ignore[no-untyped-def]
    """A whole number below n (xorshift64*, Vigna 2016)."""
    x = stream[layer]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    stream[layer] = x
    return np.int64(((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)) % np.uint64(n))


@njit(cache=True, nogil=True)
def _pairs(size, value, first, second, sums):  # type: ignore[no-untyped-def]
    """All pairs of a rank's slots in ascending order of their sum; returns their number."""
    n = 0
    for i in range(size):
        for j in range(i + 1, size):
            sums[n] = value[i] + value[j]
            n += 1
    order = np.argsort(sums[:n], kind="mergesort")
    i = 0
    j = 1
    index_i = np.empty(n, dtype=np.int32)
    index_j = np.empty(n, dtype=np.int32)
    for p in range(n):
        index_i[p] = i
        index_j[p] = j
        j += 1
        if j == size:
            i += 1
            j = i + 1
    held = sums[:n].copy()
    for p in range(n):
        sums[p] = held[order[p]]
        first[p] = index_i[order[p]]
        second[p] = index_j[order[p]]
    return n


@njit(cache=True, nogil=True)
def _swap(slot, on, g, i, h, j):  # type: ignore[no-untyped-def]
    """Exchange slot i of rank g with slot j of rank h (values are refreshed later)."""
    a = slot[g, i]
    b = slot[h, j]
    empty = on.shape[1] - 1
    slot[g, i] = b
    slot[h, j] = a
    if a != empty:
        on[g, a] &= ~np.uint8(HELD)
        on[h, a] |= HELD
    if b != empty:
        on[h, b] &= ~np.uint8(HELD)
        on[g, b] |= HELD


@njit(cache=True, nogil=True)
def _single(g, slot, value, tokens, speed, cap, on):  # type: ignore[no-untyped-def]
    """Best exchange of one slot of rank g: (time, other rank, slot, other slot, steps)."""
    tg = tokens[g]
    vg = speed[g]
    best = tg / vg * LESS
    found_h = -1
    found_i = 0
    found_j = 0
    steps = 0
    for h in range(speed.size):
        th = tokens[h]
        vh = speed[h]
        if h == g or cap[h] == 0 or (tg + th) / (vg + vh) >= best:
            continue
        ideal = (tg / vg - th / vh) / (1.0 / vg + 1.0 / vh)
        size = cap[h]
        near = 0
        steps += cap[g]
        for i in range(cap[g]):
            a = slot[g, i]
            want = value[g, i] - ideal
            while near < size and value[h, near] <= want:
                near += 1
            if on[h, a] != 0 or on[g, a] & PINNED:
                continue
            for j in range(near, size):  # less than ideal: g stays the slower
                end = (tg - value[g, i] + value[h, j]) / vg
                if end >= best:
                    break
                b = slot[h, j]
                if on[g, b] == 0 and not on[h, b] & PINNED:
                    best = end
                    found_h = h
                    found_i = i
                    found_j = j
                    break
            for j in range(near - 1, -1, -1):  # at least ideal: h becomes the slower
                end = (th + value[g, i] - value[h, j]) / vh
                if end >= best:
                    break
                b = slot[h, j]
                if on[g, b] == 0 and not on[h, b] & PINNED:
                    best = end
                    found_h = h
                    found_i = i
                    found_j = j
                    break
    return best, found_h, found_i, found_j, steps


@njit(cache=True, nogil=True)
def _free(g, h, i, j, slot, on):  # type: ignore[no-untyped-def]
    """Whether slots i and j of rank g may both go to rank h."""
    a = slot[g, i]
    b = slot[g, j]
    return on[h, a] == 0 and on[h, b] == 0 and not (on[g, a] | on[g, b]) & PINNED


@njit(cache=True, nogil=True)
def _double(g, slot, tokens, speed, cap, on, first, second, sums, number):  # type: ignore[no-untyped-def]
    """Best exchange of two slots of rank g for two of another: as `_single`, on pairs."""
    tg = tokens[g]
    vg = speed[g]
    best = tg / vg * LESS
    found_h = -1
    found_i = 0
    found_j = 0
    steps = 0
    mine = sums[g]
    for h in range(speed.size):
        th = tokens[h]
        vh = speed[h]
        if h == g or number[h] == 0 or (tg + th) / (vg + vh) >= best:
            continue
        ideal = (tg / vg - th / vh) / (1.0 / vg + 1.0 / vh)
        theirs = sums[h]
        size = number[h]
        near = 0
        steps += number[g]
        for i in range(number[g]):
            want = mine[i] - ideal
            while near < size and theirs[near] <= want:
                near += 1
            checked = False
            for j in range(near, size):
                end = (tg - mine[i] + theirs[j]) / vg
                if end >= best:
                    break
                if not checked:
                    if not _free(g, h, first[g, i], second[g, i], slot, on):
                        break
                    checked = True
                if _free(h, g, first[h, j], second[h, j], slot, on):
                    best = end
                    found_h = h
                    found_i = i
                    found_j = j
                    break
            for j in range(near - 1, -1, -1):
                end = (th + mine[i] - theirs[j]) / vh
                if end >= best:
                    break
                if not checked:
                    if not _free(g, h, first[g, i], second[g, i], slot, on):
                        break
                    checked = True
                if _free(h, g, first[h, j], second[h, j], slot, on):
                    best = end
                    found_h = h
                    found_i = i
                    found_j = j
                    break
    return best, found_h, found_i, found_j, steps


@njit(cache=True, nogil=True)
def _improve(  # type: ignore[no-untyped-def]
    layers,
    budgets,
    targets,
    load,
    base,
    speed,
    cap,
    slots,
    values,
    token,
    copies,
    ons,
    stream,
    works,
    pairs_too,
    kicks,
):
    """Search each of `layers` until its target or budget of steps."""
    ranks = cap.size
    experts = load.shape[1] - 1
    most = slots.shape[2]
    paired = pairs_too and most <= MOST_PAIRED
    pairs = most * (most - 1) // 2 if paired else 1
    first = np.empty((ranks, pairs), dtype=np.int32)
    second = np.empty((ranks, pairs), dtype=np.int32)
    sums = np.empty((ranks, pairs))
    number = np.zeros(ranks, dtype=np.int64)
    stale = np.ones(ranks, dtype=np.bool_)
    share = np.zeros(experts + 1)
    kept = np.empty((ranks, most), dtype=np.int64)  # slots before a kick, of the ranks touched
    touched = np.empty(ranks, dtype=np.int64)
    is_touched = np.zeros(ranks, dtype=np.bool_)
    holders = np.empty(ranks, dtype=np.int64)
    for turn in range(layers.size):
        layer = layers[turn]
        target = targets[turn]
        slot = slots[layer]
        value = values[layer]
        tokens = token[layer]
        on = ons[layer]
        count = copies[layer]
        for e in range(experts):
            share[e] = load[layer, e] / count[e]
        stale[:] = True
        left = budgets[turn]
        before = np.inf  # makespan before the kick
        kicked_a = -1  # experts whose copies the kick changed
        kicked_b = -1
        n_touched = 0
        while True:
            # descend
            g = 0
            while True:
                g = 0
                for h in range(1, ranks):
                    if tokens[h] / speed[h] > tokens[g] / speed[g]:
                        g = h
                if tokens[g] / speed[g] <= target or left <= 0:
                    break
                _, h, i, j, steps = _single(g, slot, value, tokens, speed, cap, on)
                left -= steps + ranks
                double = False
                if h < 0 and paired:
                    for r in range(ranks):
                        if stale[r] and (
                            r == g
                            or (tokens[g] + tokens[r]) / (speed[g] + speed[r])
                            < tokens[g] / speed[g] * LESS
                        ):
                            number[r] = _pairs(cap[r], value[r], first[r], second[r], sums[r])
                            stale[r] = False
                            left -= 4 * number[r]
                    _, h, i, j, steps = _double(
                        g, slot, tokens, speed, cap, on, first, second, sums, number
                    )
                    left -= steps
                    double = True
                if h < 0:
                    break
                if before < np.inf:
                    for r in (g, h):
                        if not is_touched[r]:
                            is_touched[r] = True
                            touched[n_touched] = r
                            n_touched += 1
                            kept[r] = slot[r]
                if double:
                    a, b = first[g, i], second[g, i]
                    c, d = first[h, j], second[h, j]
                    _swap(slot, on, g, a, h, c)
                    _swap(slot, on, g, b, h, d)
                else:
                    _swap(slot, on, g, i, h, j)
                for r in (g, h):
                    tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
                    stale[r] = True
            slowest = tokens[g] / speed[g]
            # keep the outcome of the kick, or go back
            if slowest > before:
                if kicked_a >= 0:
                    count[kicked_a] += 1
                    share[kicked_a] = load[layer, kicked_a] / count[kicked_a]
                if kicked_b >= 0:
                    count[kicked_b] -= 1
                    share[kicked_b] = load[layer, kicked_b] / count[kicked_b]
                for n in range(n_touched):
                    r = touched[n]
                    for k in range(cap[r]):
                        on[r, slot[r, k]] &= ~np.uint8(HELD)
                for n in range(n_touched):
                    r = touched[n]
                    for k in range(cap[r]):
                        slot[r, k] = kept[r, k]
                        if slot[r, k] != experts:
                            on[r, slot[r, k]] |= HELD
                    tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
                    stale[r] = True
                slowest = before
                for r in range(ranks):
                    if tokens[r] / speed[r] >= slowest:
                        g = r
                        break
            for n in range(n_touched):
                is_touched[touched[n]] = False
            n_touched = 0
            if slowest <= target or left <= 0:
                break
            # kick
            before = slowest
            kicked_a = -1
            kicked_b = -1
            left -= ranks
            if kicks[2] == 0:
                break
            dice = random_below(stream, layer, kicks[2])
            if dice < kicks[0]:
                r = random_below(stream, layer, ranks)
                if cap[r] == 0:
                    continue
                k = random_below(stream, layer, cap[r])
                a = slot[r, k]
                if a != experts and (count[a] < 2 or on[r, a] & PINNED):
                    continue
                b = -1
                for _ in range(3):  # the hottest of three that fit
                    e = random_below(stream, layer, experts)
                    if on[r, e] == 0 and share[e] > 0 and (b < 0 or share[e] > share[b]):
                        b = e
                if b < 0:
                    continue
                n_holders = 0
                for h in range(ranks):
                    if h == r or (a != experts and on[h, a] & HELD) or on[h, b] & HELD:
                        holders[n_holders] = h
                        n_holders += 1
                for n in range(n_holders):
                    h = holders[n]
                    is_touched[h] = True
                    touched[n_touched] = h
                    n_touched += 1
                    kept[h] = slot[h]
                slot[r, k] = b
                on[r, b] |= HELD
                count[b] += 1
                share[b] = load[layer, b] / count[b]
                kicked_b = b
                if a != experts:
                    on[r, a] &= ~np.uint8(HELD)
                    count[a] -= 1
                    share[a] = load[layer, a] / count[a]
                    kicked_a = a
            else:
                r = g if dice < kicks[1] else random_below(stream, layer, ranks)
                h = random_below(stream, layer, ranks)
                if cap[r] == 0 or cap[h] == 0 or r == h:
                    continue
                k = random_below(stream, layer, cap[r])
                j = random_below(stream, layer, cap[h])
                if dice < kicks[1]:  # one of the closest in value
                    j = np.searchsorted(value[h, : cap[h]], value[r, k])
                    j = min(max(j - 2 + random_below(stream, layer, 4), 0), cap[h] - 1)
                a = slot[r, k]
                b = slot[h, j]
                if on[h, a] != 0 or on[r, b] != 0 or (on[r, a] | on[h, b]) & PINNED:
                    continue
                for n in (r, h):
                    is_touched[n] = True
                    touched[n_touched] = n
                    n_touched += 1
                    kept[n] = slot[n]
                _swap(slot, on, r, k, h, j)
            for n in range(n_touched):
                r = touched[n]
                tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
                stale[r] = True
        works[layer] += budgets[turn] - left


def improve(
    state: State,
    layers: IntArray,
    budgets: IntArray,
    targets: FloatArray,
    pool: ThreadPoolExecutor | None = None,
    workers: int = 1,
    pairs: bool = True,
    kicks: tuple[int, int, int] = KICKS,
) -> None:
    """Search `layers` with `budgets` steps each, until `targets` (in units of `state.unit`).

    Layers do not see each other, so their outcome is the same on any number of threads. `pairs`
    and `kicks` switch steps of the search off, for the ablation.
    """
    odds = np.cumsum(kicks)

    def run(part: slice) -> None:
        _improve(
            layers[part],
            budgets[part],
            targets[part],
            state.load,
            state.base,
            state.speed,
            state.cap,
            state.slot,
            state.value,
            state.tokens,
            state.copies,
            state.on,
            state.random,
            state.work,
            pairs,
            odds,
        )

    if pool is None:
        run(slice(None))
    else:
        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))
