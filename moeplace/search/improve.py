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
from moeplace.search.construct import ascending, sort_rank
from moeplace.search.state import HELD, OLD, PINNED, State

#: Pairs of slots are exchanged on ranks of at most this many slots.
MOST_PAIRED = 96
#: Odds of the kicks: move a replica, exchange close values of the slowest rank, any exchange.
KICKS = (4, 4, 2)
#: One kick in so many is followed by another before the descent; one in two after so many
#: descents without success, which only small layers see within a call.
DEEPER, STUCK = 4, 200
#: Then one in so many outcomes is kept although it is worse; the best is remembered.
STRAY = 50
#: An exchange is taken at once if it leaves so little of what is above the target.
ENOUGH = 0.1
#: An exchange must lower the larger time by this factor: rounding alone never counts.
LESS = 1.0 - 1e-12


@njit(cache=True, nogil=True, error_model="numpy")
def random_below(stream, layer, n):  # type: ignore[no-untyped-def]
    """A whole number below n (xorshift64*, Vigna 2016)."""
    x = stream[layer]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    stream[layer] = x
    return np.int64(((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)) % np.uint64(n))


@njit(cache=True, nogil=True, error_model="numpy")
def _pairs(size, value, first, second, sums):  # type: ignore[no-untyped-def]
    """All pairs of a rank's slots in ascending order of their sum; returns their number."""
    n = 0
    for i in range(size):
        for j in range(i + 1, size):
            sums[n] = value[i] + value[j]
            n += 1
    order = ascending(sums[:n])
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


@njit(cache=True, nogil=True, error_model="numpy")
def arrives(on, g, e):  # type: ignore[no-untyped-def]
    """Copies received if rank g takes expert e (or EMPTY), against the current plan."""
    return 0 if e == on.shape[1] - 1 or on[g, e] & OLD else 1


@njit(cache=True, nogil=True, error_model="numpy")
def swap(slot, on, g, i, h, j):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True, error_model="numpy")
def _single(g, enough, slot, value, tokens, speed, cap, on):  # type: ignore[no-untyped-def]
    """Best exchange of one slot of rank g: (time, other rank, slot, other slot, steps)."""
    tg = tokens[g]
    vg = speed[g]
    best = tg / vg * LESS
    found_h = -1
    found_i = 0
    found_j = 0
    steps = 0
    ranks = speed.size
    for turn in range(1, ranks):
        if best <= enough:
            break
        h = g + turn if g + turn < ranks else g + turn - ranks
        th = tokens[h]
        vh = speed[h]
        if cap[h] == 0 or tg + th >= best * (vg + vh):
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


@njit(cache=True, nogil=True, error_model="numpy")
def _free(g, h, i, j, slot, on):  # type: ignore[no-untyped-def]
    """Whether slots i and j of rank g may both go to rank h."""
    a = slot[g, i]
    b = slot[g, j]
    return on[h, a] == 0 and on[h, b] == 0 and not (on[g, a] | on[g, b]) & PINNED


@njit(cache=True, nogil=True, error_model="numpy")
def _double(g, enough, slot, tokens, speed, cap, on, first, second, sums, number):  # type: ignore[no-untyped-def]
    """Best exchange of two slots of rank g for two of another: as `_single`, on pairs."""
    tg = tokens[g]
    vg = speed[g]
    best = tg / vg * LESS
    found_h = -1
    found_i = 0
    found_j = 0
    steps = 0
    mine = sums[g]
    ranks = speed.size
    for turn in range(1, ranks):
        if best <= enough:
            break
        h = g + turn if g + turn < ranks else g + turn - ranks
        th = tokens[h]
        vh = speed[h]
        if number[h] == 0 or tg + th >= best * (vg + vh):
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


@njit(cache=True, nogil=True, error_model="numpy")
def _put_back(touched, n_touched, kept, cap, slot, on, count, share, load):  # type: ignore[no-untyped-def]
    """Give the first `n_touched` ranks in `touched` their slots in `kept` again."""
    empty = count.size - 1
    for n in range(n_touched):
        r = touched[n]
        for k in range(cap[r]):
            e = slot[r, k]
            count[e] -= 1
            if e != empty:
                on[r, e] &= ~np.uint8(HELD)
    for n in range(n_touched):
        r = touched[n]
        for k in range(cap[r]):
            e = kept[r, k]
            slot[r, k] = e
            count[e] += 1
            if e != empty:
                on[r, e] |= HELD
    for n in range(n_touched):
        r = touched[n]
        for k in range(cap[r]):
            e = slot[r, k]
            share[e] = load[e] / max(count[e], 1)


@njit(cache=True, nogil=True, error_model="numpy")
def _choose(  # type: ignore[no-untyped-def]
    replica, close, g, slot, value, cap, least, most, on, count, share, stream, layer, kick, touched
):
    """A random change; returns how many ranks, listed in `touched`, it changes (0: none found).

    `kick` is (rank, slot, other rank, its slot, -) for an exchange, of close values out of the
    slowest rank g if `close`; or (rank, slot, -1, -1, expert or EMPTY that takes the slot) if
    `replica`.
    """
    ranks = cap.size
    empty = count.size - 1
    if not replica:
        r = g if close else random_below(stream, layer, ranks)
        h = random_below(stream, layer, ranks)
        if cap[r] == 0 or cap[h] == 0 or r == h:
            return 0
        k = random_below(stream, layer, cap[r])
        j = random_below(stream, layer, cap[h])
        if close:
            j = np.int64(np.searchsorted(value[h, : cap[h]], value[r, k]))
            j = min(max(j - 2 + random_below(stream, layer, 4), 0), cap[h] - 1)
        a = slot[r, k]
        b = slot[h, j]
        if on[h, a] != 0 or on[r, b] != 0 or (on[r, a] | on[h, b]) & PINNED:
            return 0
        kick[:] = (r, k, h, j, -1)
        touched[0] = r
        touched[1] = h
        return 2
    r = random_below(stream, layer, ranks)
    if cap[r] == 0:
        return 0
    k = random_below(stream, layer, cap[r])
    a = slot[r, k]
    if count[a] <= least[a] or on[r, a] & PINNED:
        return 0
    b = -1
    for _ in range(3):  # the hottest of three that fit
        e = random_below(stream, layer, empty)
        fits = on[r, e] == 0 and share[e] > 0 and count[e] < most[e]
        if fits and (b < 0 or share[e] > share[b]):
            b = e
    if b < 0 or random_below(stream, layer, 8) == 0:
        if a == empty:
            return 0
        b = empty  # only give the copy up
    n = 0
    for h in range(ranks):
        if h == r or (a != empty and on[h, a] & HELD) or on[h, b] & HELD:
            touched[n] = h
            n += 1
    kick[:] = (r, k, -1, -1, b)
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def _improve(  # type: ignore[no-untyped-def]
    layers,
    budgets,
    targets,
    load,
    base,
    speeds,
    cap,
    leasts,
    limit,
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
    best_slot = np.empty((ranks, most), dtype=np.int64)
    kept = np.empty((ranks, most), dtype=np.int64)  # slots before a kick, of the ranks touched
    touched = np.empty(ranks, dtype=np.int64)
    is_touched = np.zeros(ranks, dtype=np.bool_)
    holders = np.empty(ranks, dtype=np.int64)
    kick = np.empty(5, dtype=np.int64)
    for turn in range(layers.size):
        layer = layers[turn]
        target = targets[turn]
        speed = speeds[layer]
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
        n_touched = 0
        fails = 0
        best = np.inf  # before the search went astray
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
                enough = target + ENOUGH * (tokens[g] / speed[g] - target)
                _, h, i, j, steps = _single(g, enough, slot, value, tokens, speed, cap, on)
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
                        g, enough, slot, tokens, speed, cap, on, first, second, sums, number
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
                    swap(slot, on, g, a, h, c)
                    swap(slot, on, g, b, h, d)
                else:
                    swap(slot, on, g, i, h, j)
                for r in (g, h):
                    tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
                    stale[r] = True
            slowest = tokens[g] / speed[g]
            # keep the outcome of the kick, or go back
            astray = fails >= STUCK and slowest > before and random_below(stream, layer, STRAY) == 0
            if astray and before < best:  # leave a dead end, remember the way back
                best = before
                best_slot[:] = slot
                for n in range(n_touched):
                    best_slot[touched[n]] = kept[touched[n]]
            if slowest > before and not astray:
                _put_back(touched, n_touched, kept, cap, slot, on, count, share, load[layer])
                for n in range(n_touched):
                    r = touched[n]
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
            if kicks[2] == 0:
                break
            fails = fails + 1 if slowest >= before else 0
            before = slowest
            depth = 1
            again = DEEPER if fails < STUCK else 2
            while depth < 8 and random_below(stream, layer, again) == 0:
                depth += 1
            while depth > 0 and left > 0:
                left -= ranks
                dice = random_below(stream, layer, kicks[2])
                n = _choose(
                    dice < kicks[0], dice < kicks[1], g, slot, value, cap, leasts[layer], limit,
                    on, count, share, stream, layer, kick, holders,
                )  # fmt: skip
                if n == 0:
                    continue
                depth -= 1
                for m in range(n):
                    r = holders[m]
                    if not is_touched[r]:
                        is_touched[r] = True
                        touched[n_touched] = r
                        n_touched += 1
                        kept[r] = slot[r]
                r, k, h = kick[0], kick[1], kick[2]
                j, b = kick[3], kick[4]
                if h >= 0:
                    swap(slot, on, r, k, h, j)
                else:
                    a = slot[r, k]
                    slot[r, k] = b
                    count[b] += 1
                    count[a] -= 1
                    if b != experts:
                        on[r, b] |= HELD
                        share[b] = load[layer, b] / count[b]
                    if a != experts:
                        on[r, a] &= ~np.uint8(HELD)
                        share[a] = load[layer, a] / count[a]
                for m in range(n):
                    r = holders[m]
                    tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
                    stale[r] = True
        if best < slowest:
            for r in range(ranks):
                touched[r] = r
            _put_back(touched, ranks, best_slot, cap, slot, on, count, share, load[layer])
            for r in range(ranks):
                tokens[r] = base[layer, r] + sort_rank(slot[r], value[r], cap[r], share)
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
            state.least,
            state.most,
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
