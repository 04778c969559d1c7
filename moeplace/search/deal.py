"""Compiled search over several windows: the experts of two ranks dealt out between them anew.

Exchanges of one or two slots are too few for several windows at once. Two ranks of nine slots
can share their experts in 48,620 ways, and among so many some are right in all windows. They are
found in microseconds: half of the experts in all ways, the other half too, and of the second only
those whose sum in one window fits (meet in the middle, Horowitz and Sahni 1974).

A rank costs the square of what its times are above an aim. Once none is above, the aim is lowered.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.search.improve import random_below
from moeplace.search.state import HELD, OLD, PINNED
from moeplace.search.windows import OVER, Windows, restore

#: Slots of two ranks that are dealt out at once: both halves in 2^9 ways.
DEALT = 18
#: What is left of an aim's distance from the bound once it is reached.
LOWER = 0.8
#: One trial in so many changes any two ranks, that the search comes out of dead ends.
ASIDE = 4
#: The cost that counts as none, and the least distance of an aim from the bound.
NOTHING, NEAREST = 1e-300, 1e-12


@njit(cache=True, nogil=True, error_model="numpy")
def _time(g, load, base, speed, cap, slot, count, time):  # type: ignore[no-untyped-def]
    """Recompute the times of rank g in all rows."""
    for v in range(load.shape[0]):
        tokens = base[v, g]
        for k in range(cap[g]):
            tokens += load[v, slot[g, k]] / max(count[slot[g, k]], 1)
        time[v, g] = tokens / speed[v, g]


@njit(cache=True, nogil=True, error_model="numpy")
def _cost(weight, floor, time):  # type: ignore[no-untyped-def]
    total = 0.0
    for v in range(weight.size):
        total += weight[v] * max(time[v].max() - floor[v], 0.0)
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _drawn(g, h, cap, slot, on, which, stream, layer):  # type: ignore[no-untyped-def]
    """Slots of rank g whose experts may go to rank h, in random order; returns their number."""
    n = 0
    for k in range(cap[g]):
        e = slot[g, k]
        if on[g, e] & PINNED == 0 and on[h, e] & ~np.uint8(OLD) == 0:
            j = random_below(stream, layer, n + 1)
            which[n] = which[j]
            which[j] = k
            n += 1
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def _sums(share, bits, sums):  # type: ignore[no-untyped-def]
    """Sums [ways, rows] of all subsets of `share` [experts, rows], and their sizes."""
    sums[0] = 0.0
    bits[0] = 0
    for n in range(share.shape[0]):
        for m in range(1 << n):
            bits[1 << n | m] = bits[m] + 1
            for v in range(share.shape[1]):
                sums[1 << n | m, v] = sums[m, v] + share[n, v]


@njit(cache=True, nogil=True, error_model="numpy")
def _best(  # type: ignore[no-untyped-def]
    rest, total, most_g, most_h, per_g, per_h, row, cost, take, begin, bits, first, ways, bits_b,
    second, ways_b,
):  # fmt: skip
    """Cheapest way below `cost`, as subsets (of the first half, of the second) that rank g takes.

    (-1, -1) if there is none. Per row: `rest` are g's tokens that stay, `total` both ranks' tokens,
    `most_g` and `most_h` what they carry at no cost, `per_g` and `per_h` cost per token above.
    `row` is the row by whose sums the second half is looked up; `take` are the experts for g.
    """
    span = 2 * second[ways_b - 1, row] + NOTHING  # of the sums of one size
    key = bits_b[:ways_b] * span + second[:ways_b, row]
    order = np.argsort(key)
    key = key[order]
    found_a = -1
    found_b = -1
    root = np.sqrt(cost)
    for step in range(ways):
        a = (begin + step) & (ways - 1)
        need = take - bits[a]
        if need < 0:
            continue
        already = rest[row] + first[a, row]
        least = total[row] - most_h[row] - root / per_h[row] - already
        at = np.searchsorted(key, need * span + max(least, 0.0))
        while at < ways_b:
            b = order[at]
            at += 1
            if bits_b[b] != need or second[b, row] > most_g[row] + root / per_g[row] - already:
                break
            tried = 0.0
            for v in range(rest.size):
                tokens = rest[v] + first[a, v] + second[b, v]
                x = max(tokens - most_g[v], 0.0) * per_g[v]
                y = max(total[v] - tokens - most_h[v], 0.0) * per_h[v]
                tried += x * x + y * y
            if tried < cost * (1 - 1e-9):
                cost = tried
                root = np.sqrt(cost)
                found_a = a
                found_b = b
                if cost == 0.0:
                    return found_a, found_b
    return found_a, found_b


@njit(cache=True, nogil=True, error_model="numpy")
def _above(time, aim, lowers, width, allowed, above):  # type: ignore[no-untyped-def]
    """Ranks above what is `allowed` [rows] into `above`; returns their number."""
    n = 0
    for v in range(aim.size):
        allowed[v] = aim[v] * (1 + width) if lowers[v] else aim[v]
    for g in range(time.shape[1]):
        for v in range(aim.size):
            if time[v, g] > allowed[v]:
                above[n] = g
                n += 1
                break
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def _deal(  # type: ignore[no-untyped-def]
    layers, trials, targets, weight, aims, lowers, floor, loads, bases, speeds, cap, slots, copies,
    ons, stream, costs,
):  # fmt: skip
    """Search each of `layers` for so many trials, or until its cost is within its target.

    `aims` [rows, layers]: times that no plan beats; `lowers` [rows]: whether a row's aim is to be
    approached (True), or kept as it is (a capacity). Other arrays as in `windows`.
    """
    rows, ranks, most = weight.size, cap.size, slots.shape[2]
    half = 1 << (DEALT // 2)
    time = np.empty((rows, ranks))
    mine = np.empty(most, dtype=np.int64)
    theirs = np.empty(most, dtype=np.int64)
    dealt = np.empty(DEALT, dtype=np.int64)
    share = np.empty((DEALT, rows))
    first = np.empty((half, rows))
    second = np.empty((half, rows))
    bits = np.empty(half, dtype=np.int64)
    bits_b = np.empty(half, dtype=np.int64)
    rest, total, most_g, most_h, per_g, per_h = np.empty((6, rows))
    allowed = np.empty(rows)
    above = np.empty(ranks, dtype=np.int64)
    for turn in range(layers.size):
        layer = layers[turn]
        slot, on, count = slots[layer], ons[layer], copies[layer]
        load, base, speed = loads[:, layer], bases[:, layer], speeds[:, layer]
        aim = aims[:, layer]
        empty = on.shape[1] - 1
        for g in range(ranks):
            _time(g, load, base, speed, cap, slot, count, time)
        best = _cost(weight, floor, time)
        best_slot = slot.copy()
        reached = 0.0
        least = 0.0
        for v in range(rows):
            if lowers[v]:
                reached += weight[v] * time[v].max()
                least += weight[v] * aim[v]
        width = LOWER * max(reached / least - 1, NEAREST)
        n_above = _above(time, aim, lowers, width, allowed, above)
        for _ in range(trials[turn]):
            while n_above == 0 and width > NEAREST:
                width *= LOWER
                n_above = _above(time, aim, lowers, width, allowed, above)
            if n_above == 0 or best <= targets[turn]:
                break
            g = above[random_below(stream, layer, n_above)]
            if random_below(stream, layer, ASIDE) == 0:
                g = random_below(stream, layer, ranks)
            h = random_below(stream, layer, ranks)
            if g == h:
                continue
            n_g = _drawn(g, h, cap, slot, on, mine, stream, layer)
            n_h = _drawn(h, g, cap, slot, on, theirs, stream, layer)
            n_g = min(n_g, max(DEALT // 2, DEALT - n_h))
            n_h = min(n_h, DEALT - n_g)
            if n_g == 0 or n_h == 0:
                continue
            n = n_g + n_h
            for k in range(n_g):
                dealt[k] = slot[g, mine[k]]
            for k in range(n_h):
                dealt[n_g + k] = slot[h, theirs[k]]
            for k in range(n):  # mixed, so that both halves hold some of both ranks
                j = random_below(stream, layer, n)
                dealt[k], dealt[j] = dealt[j], dealt[k]
            cost = 0.0
            row = 0
            highest = 0.0
            for v in range(rows):
                for k in range(n):
                    share[k, v] = load[v, dealt[k]] / max(count[dealt[k]], 1)
                rest[v] = time[v, g] * speed[v, g]
                total[v] = rest[v] + time[v, h] * speed[v, h]
                for k in range(n_g):
                    rest[v] -= load[v, slot[g, mine[k]]] / max(count[slot[g, mine[k]]], 1)
                most_g[v] = allowed[v] * speed[v, g]
                most_h[v] = allowed[v] * speed[v, h]
                per_g[v] = 1 / (aim[v] * speed[v, g])
                per_h[v] = 1 / (aim[v] * speed[v, h])
                x = max(time[v, g] - allowed[v], 0.0) / aim[v]
                y = max(time[v, h] - allowed[v], 0.0) / aim[v]
                cost += x * x + y * y
                if x * x + y * y > highest:
                    highest = x * x + y * y
                    row = v
            n_a = n // 2
            _sums(share[:n_a], bits, first)
            _sums(share[n_a:n], bits_b, second)
            begin = random_below(stream, layer, 1 << n_a)
            a, b = _best(
                rest, total, most_g, most_h, per_g, per_h, row, max(cost, NOTHING), n_g, begin,
                bits, first, 1 << n_a, bits_b, second, 1 << (n - n_a),
            )  # fmt: skip
            if a < 0:
                continue
            for k in range(n):
                on[g, dealt[k]] &= ~np.uint8(HELD)
                on[h, dealt[k]] &= ~np.uint8(HELD)
            i = 0
            j = 0
            for k in range(n):
                e = dealt[k]
                if (a | b << n_a) >> k & 1:
                    slot[g, mine[i]] = e
                    on[g, e] |= HELD
                    i += 1
                else:
                    slot[h, theirs[j]] = e
                    on[h, e] |= HELD
                    j += 1
            on[g, empty] &= ~np.uint8(HELD)
            on[h, empty] &= ~np.uint8(HELD)
            _time(g, load, base, speed, cap, slot, count, time)
            _time(h, load, base, speed, cap, slot, count, time)
            n_above = _above(time, aim, lowers, width, allowed, above)
            now = _cost(weight, floor, time)
            if now < best * (1 - 1e-9):
                best = now
                best_slot[:] = slot
        restore(slot, on, cap, count, best_slot)
        costs[layer] = best


def deal(
    every: Windows,
    layers: IntArray,
    trials: IntArray,
    targets: FloatArray,
    aims: FloatArray,
    weight: FloatArray,
    pool: ThreadPoolExecutor,
    workers: int,
) -> None:
    """Deal out pairs of ranks in `layers`: `trials` [layers] each, or until their targets.

    `aims` [windows, layers] are makespans that no plan beats, or more where a window may take more,
    in units of the state. Layers are left at their best cost by `weight` [windows], never above
    where they began.
    """
    state, windows = every.state, weight.size
    extra = every.floor.size - windows  # rows of capacities: their aim is 1
    lowers = np.arange(every.floor.size) < windows
    aims = np.concatenate([aims, np.ones((extra, aims.shape[1]))])
    weight = np.append(weight, np.full(extra, OVER))

    def run(part: slice) -> None:
        _deal(
            layers[part], trials[part], targets[part], weight, aims, lowers, every.floor,
            every.load, every.base, every.speed, state.cap, state.slot, state.copies, state.on,
            state.random, every.cost,
        )  # fmt: skip

    list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))
