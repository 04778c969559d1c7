"""Compiled search over several windows with one placement (even routing).

A layer costs the weighted sum over windows of its slowest rank's time. Trials exchange a slot
of the slowest rank of a random window with a random one, or move a replica; a trial costs
O(windows), since the three slowest ranks of each window are kept. Trials that cost less than a
threshold are accepted; the threshold falls to zero over the search (Dueck and Scheuer 1990).

Token capacities add a row to each window: its "speeds" are the capacities, so its "time" is the
largest part of a capacity that a rank uses, and only what is above 1 costs.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.problem import Problem
from moeplace.search.improve import arrives, random_below, swap
from moeplace.search.state import HELD, OLD, PINNED, State, ceiling

#: Cost of a whole capacity too much, in fluid bounds: no gain of time is worth breaking one.
OVER = 1000.0
#: Chance that a trial starts at the row of a capacity rather than at the time of a window.
OVER_CHANCE = 0.25
#: A capacity of next to nothing counts as this share of a rank's part of the fluid bound.
LEAST_CAPACITY = 1e-6


@njit(cache=True, nogil=True, error_model="numpy")
def three(time, top):  # type: ignore[no-untyped-def]
    """The three slowest ranks of a window into `top`, -1 where there are fewer."""
    top[:] = -1
    for g in range(time.size):
        if top[0] < 0 or time[g] > time[top[0]]:
            top[2] = top[1]
            top[1] = top[0]
            top[0] = g
        elif top[1] < 0 or time[g] > time[top[1]]:
            top[2] = top[1]
            top[1] = g
        elif top[2] < 0 or time[g] > time[top[2]]:
            top[2] = g


@njit(cache=True, nogil=True, error_model="numpy")
def drawn(stream, layer, steps):  # type: ignore[no-untyped-def]
    """A window, by the cumulated weights `steps` [windows]."""
    dice = random_below(stream, layer, 1 << 30) / float(1 << 30) * steps[-1]
    return min(np.searchsorted(steps, dice, side="right"), steps.size - 1)


@njit(cache=True, nogil=True, error_model="numpy")
def restore(slot, on, cap, count, best):  # type: ignore[no-untyped-def]
    """Put a layer's slots, marks and counts back to `best`."""
    empty = on.shape[1] - 1
    for g in range(cap.size):
        for k in range(cap[g]):
            on[g, slot[g, k]] &= ~np.uint8(HELD)
    count[:] = 0
    for g in range(cap.size):
        for k in range(cap[g]):
            e = best[g, k]
            slot[g, k] = e
            count[e] += 1
            if e != empty:
                on[g, e] |= HELD


@njit(cache=True, nogil=True, error_model="numpy")
def _price(weight, floor, load, base, speed, cap, slot, count, time, top):  # type: ignore[no-untyped-def]
    """Recompute rank times [rows, ranks] of a layer and what it costs."""
    total = 0.0
    empty = load.shape[1] - 1
    for w in range(weight.size):
        for g in range(cap.size):
            tokens = base[w, g]
            for k in range(cap[g]):
                e = slot[g, k]
                if e != empty:
                    tokens += load[w, e] / count[e]
            time[w, g] = tokens / speed[w, g]
        three(time[w], top[w])
        total += weight[w] * max(time[w, top[w, 0]] - floor[w], 0.0)
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _anneal(  # type: ignore[no-untyped-def]
    layers, trials, heat, weight, chance, floor, allowances, loads, bases, speeds, cap, leasts,
    limit, slots, copies, ons, stream, works, costs,
):  # fmt: skip
    windows = weight.size
    ranks = cap.size
    empty = loads.shape[2] - 1
    time = np.empty((windows, ranks))
    top = np.empty((windows, 3), dtype=np.int64)
    best_slot = np.empty_like(slots[0])
    steps = np.cumsum(chance)
    any_old = ~np.uint8(OLD)
    for turn in range(layers.size):
        layer = layers[turn]
        slot = slots[layer]
        on = ons[layer]
        count = copies[layer]
        load = loads[:, layer]
        base = bases[:, layer]
        speed = speeds[:, layer]
        least = leasts[layer]
        room = allowances[layer]
        for g in range(ranks):
            for k in range(cap[g]):
                room -= arrives(on, g, slot[g, k])
        now = _price(weight, floor, load, base, speed, cap, slot, count, time, top)
        best = now
        best_slot[:] = slot
        scale = 0.0
        for w in range(windows):
            if floor[w] == 0.0:
                scale += weight[w] * time[w, top[w, 0]]
        start = heat[turn, 0] * scale
        slope = (heat[turn, 1] - heat[turn, 0]) * scale / trials
        accepted = 0
        for trial in range(trials):
            threshold = start + slope * trial
            w = drawn(stream, layer, steps)
            g = top[w, 0]
            h = random_below(stream, layer, ranks)
            if cap[h] == 0 or cap[g] == 0:
                continue
            if random_below(stream, layer, 4) > 0:
                i = random_below(stream, layer, cap[g])
                j = random_below(stream, layer, cap[h])
                a = slot[g, i]
                b = slot[h, j]
                if h == g or (on[h, a] | on[g, b]) & any_old or (on[g, a] | on[h, b]) & PINNED:
                    continue
                new = arrives(on, h, a) + arrives(on, g, b)
                new -= arrives(on, g, a) + arrives(on, h, b)
                if new > room:
                    continue
                delta = 0.0
                for v in range(windows):
                    d = load[v, a] / max(count[a], 1) - load[v, b] / max(count[b], 1)
                    most = max(time[v, g] - d / speed[v, g], time[v, h] + d / speed[v, h])
                    for n in range(3):
                        r = top[v, n]
                        if r < 0:
                            break
                        if r != g and r != h:
                            most = max(most, time[v, r])
                            break
                    past = max(time[v, top[v, 0]] - floor[v], 0.0)
                    delta += weight[v] * (max(most - floor[v], 0.0) - past)
                if delta >= threshold:
                    continue
                for v in range(windows):
                    d = load[v, a] / max(count[a], 1) - load[v, b] / max(count[b], 1)
                    time[v, g] -= d / speed[v, g]
                    time[v, h] += d / speed[v, h]
                    three(time[v], top[v])
                swap(slot, on, g, i, h, j)
            else:  # rank h gives up a copy or a free slot for one of an expert on g
                k = random_below(stream, layer, cap[h])
                a = slot[h, k]
                if h == g:  # or the slowest rank for any other expert, or for none
                    b = random_below(stream, layer, empty + 1)
                else:
                    b = slot[g, random_below(stream, layer, cap[g])]
                if on[h, b] & any_old or count[b] >= limit[b] or a == b:
                    continue
                if count[a] <= least[a] or on[h, a] & PINNED:
                    continue
                new = arrives(on, h, b) - arrives(on, h, a)
                if new > room:
                    continue
                delta = 0.0
                for v in range(windows):
                    more_b = load[v, b] / (count[b] + 1) if b != empty else 0.0
                    fall = load[v, b] / count[b] - more_b if b != empty else 0.0
                    less_a = load[v, a] / count[a] if a != empty else 0.0
                    rise = load[v, a] / (count[a] - 1) - less_a if a != empty else 0.0
                    most = 0.0
                    for r in range(ranks):
                        t = time[v, r]
                        if r == h:
                            t += (more_b - less_a) / speed[v, r]
                        else:
                            if on[r, b] & HELD:
                                t -= fall / speed[v, r]
                            if a != empty and on[r, a] & HELD:
                                t += rise / speed[v, r]
                        most = max(most, t)
                    past = max(time[v, top[v, 0]] - floor[v], 0.0)
                    delta += weight[v] * (max(most - floor[v], 0.0) - past)
                if delta >= threshold:
                    continue
                slot[h, k] = b
                count[b] += 1
                count[a] -= 1
                if b != empty:
                    on[h, b] |= HELD
                if a != empty:
                    on[h, a] &= ~np.uint8(HELD)
                now = _price(weight, floor, load, base, speed, cap, slot, count, time, top)
                delta = 0.0
            now += delta
            room -= new
            accepted += 1
            if accepted % 256 == 0:  # rounding of the updates does not add up
                now = _price(weight, floor, load, base, speed, cap, slot, count, time, top)
            if now < best * (1 - 1e-9):
                best = now
                best_slot[:] = slot
        works[layer] += trials
        restore(slot, on, cap, count, best_slot)
        costs[layer] = _price(weight, floor, load, base, speed, cap, slot, count, time, top)


class Windows:
    """All windows of a problem, for a state's placement to be improved on.

    Parameters
    ----------
    problem : Problem
    state : State
        Its placement is the start; `slot`, `copies`, `on`, `random` and `work` change. Its
        values and tokens (of the mean load) are not kept up to date.
    allowance : int array [layers], optional
        Copies that each layer may receive beyond the ranks' experts marked OLD.
    """

    def __init__(self, problem: Problem, state: State, allowance: IntArray | None = None) -> None:
        scale = state.unit[:, None]
        self.load = np.zeros((problem.windows, problem.layers, problem.experts + 1))
        self.load[:, :, :-1] = problem.tokens / scale
        self.base = problem.base / scale
        shape = self.base.shape
        self.speed = np.broadcast_to(problem.cluster.speeds, shape).copy()
        self.floor = np.zeros(problem.windows)
        if np.isfinite(problem.capacity).any():  # a second row for each window
            self.load, self.base = np.tile(self.load, (2, 1, 1)), np.tile(self.base, (2, 1, 1))
            least = LEAST_CAPACITY * problem.cluster.speeds
            room = np.broadcast_to(np.maximum(ceiling(problem) / scale, least), shape)
            self.speed = np.concatenate([self.speed, room])
            self.floor = np.append(self.floor, self.floor + 1)
        unlimited = np.full(problem.layers, 1 << 40)
        self.allowance = unlimited if allowance is None else allowance
        self.state = state
        self.cost = np.zeros(problem.layers)

    def improve(
        self,
        layers: IntArray,
        trials: int,
        heat: FloatArray,
        weight: FloatArray,
        pool: ThreadPoolExecutor,
        workers: int,
    ) -> None:
        """Anneal `layers`, `trials` each, threshold falling over `heat` [layers, 2] x cost.

        Layers are left at their best cost by `weight` [windows], never above where they began.
        """
        state = self.state
        rows = self.floor.size - weight.size
        chance = np.append(weight, np.full(rows, OVER_CHANCE / max(rows, 1)))
        weight = np.append(weight, np.full(rows, OVER))

        def run(part: slice) -> None:
            _anneal(
                layers[part], trials, heat[part], weight, chance, self.floor, self.allowance,
                self.load, self.base, self.speed, state.cap, state.least, state.most, state.slot,
                state.copies, state.on, state.random, state.work, self.cost,
            )  # fmt: skip

        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))
