"""Compiled search by the true times max_g f_g(A_g, n_g), in all windows (even routing).

Trials exchange slots of the slowest rank of a random window, give a replica of it up, or spread
an expert of it; what costs less than a threshold is kept, and the threshold falls to zero (Dueck
and Scheuer 1990). A trial costs O(windows), one that changes replicas O(windows x ranks).

`_seconds` is the compiled twin of `Cluster.seconds`, held together by a test.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.hardware import Cluster
from moeplace.problem import Problem
from moeplace.search.improve import arrives, random_below, swap
from moeplace.search.state import HELD, OLD, PINNED, State, ceiling
from moeplace.search.windows import drawn, restore, three

#: Cost of a whole capacity too much, in makespans: no gain of time is worth breaking one.
OVER = 1000.0
#: One trial in so many changes the number of replicas.
REPLICA = 4

#: Speeds [ranks], planes (startup, activation, compute), table (tokens, seconds, rate).
Model = tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]


def model_of(cluster: Cluster) -> Model:
    """What kernels need of a latency model; the parts that it has not are empty."""
    none, flat = np.zeros(0), np.zeros((0, 0))
    planes, table = cluster.planes, cluster.table
    parts = (none,) * 3 if planes is None else (planes.startup, planes.activation, planes.compute)
    rows = (flat, flat, none) if table is None else (table.tokens, table.seconds, table.rate)
    every = (cluster.speeds, *parts, *rows)
    return tuple(np.array(part) for part in every)  # type: ignore[return-value]


@njit(cache=True, nogil=True, error_model="numpy")
def _seconds(model, g, active, tokens):  # type: ignore[no-untyped-def]
    """f_g(A, n)."""
    speed, startup, activation, compute, at, height, rate = model
    if tokens <= 0.0:
        return 0.0
    if height.shape[0] > 0:
        last = at.shape[1] - 1
        if tokens > at[g, last]:
            return height[g, last] + (tokens - at[g, last]) / rate[g]
        n = np.searchsorted(at[g], tokens)
        if n == 0:
            return height[g, 0]
        slope = (height[g, n] - height[g, n - 1]) / (at[g, n] - at[g, n - 1])
        return height[g, n - 1] + (tokens - at[g, n - 1]) * slope
    time = 0.0
    for k in range(startup.size):
        time = max(time, startup[k] + activation[k] * active + compute[k] * tokens / speed[g])
    return time


@njit(cache=True, nogil=True, error_model="numpy")
def _runs(tokens):  # type: ignore[no-untyped-def]
    return -np.expm1(-tokens)


@njit(cache=True, nogil=True, error_model="numpy")
def _refresh(load, count, share, runs, e):  # type: ignore[no-untyped-def]
    """Tokens and expected activations of each replica of an expert, in all windows."""
    for w in range(share.shape[0]):
        share[w, e] = load[w, e] / max(count[e], 1)
        runs[w, e] = -np.expm1(-share[w, e])


@njit(cache=True, nogil=True, error_model="numpy")
def _price(model, most, over, weight, base, cap, slot, share, runs, tokens, active, time, top):  # type: ignore[no-untyped-def]
    """Fill tokens, active, time [windows, ranks] and the three slowest; returns the cost."""
    cost = 0.0
    for w in range(weight.size):
        for g in range(cap.size):
            n = base[w, g]
            a = 0.0
            for k in range(cap[g]):
                n += share[w, slot[g, k]]
                a += runs[w, slot[g, k]]
            tokens[w, g] = n
            active[w, g] = a
            time[w, g] = _seconds(model, g, a, n)
            cost += over * max(n / most[g] - 1.0, 0.0)
        three(time[w], top[w])
        cost += weight[w] * time[w, top[w, 0]]
    return cost


@njit(cache=True, nogil=True, error_model="numpy")
def _search(  # type: ignore[no-untyped-def]
    layers, trials, heat, target, model, most, weight, allowances, loads, bases, cap, leasts,
    limit, slots, copies, ons, stream, works, costs,
):  # fmt: skip
    windows = weight.size
    ranks = cap.size
    empty = loads.shape[2] - 1
    tokens = np.empty((windows, ranks))
    active = np.empty((windows, ranks))
    time = np.empty((windows, ranks))
    new_n = np.empty((windows, ranks))
    new_a = np.empty((windows, ranks))
    new_t = np.empty((windows, ranks))
    share = np.zeros((windows, empty + 1))
    runs = np.zeros((windows, empty + 1))
    top = np.empty((windows, 3), dtype=np.int64)
    changed = np.empty(ranks, dtype=np.int64)
    is_changed = np.zeros(ranks, dtype=np.bool_)
    best_slot = np.empty_like(slots[0])
    any_old = ~np.uint8(OLD)
    steps = np.cumsum(weight)
    limited = np.isfinite(most).any()
    for turn in range(layers.size):
        layer = layers[turn]
        slot = slots[layer]
        on = ons[layer]
        count = copies[layer]
        load = loads[:, layer]
        base = bases[:, layer]
        least = leasts[layer]
        room = allowances[layer]
        for g in range(ranks):
            for k in range(cap[g]):
                room -= arrives(on, g, slot[g, k])
        for e in range(empty):
            _refresh(load, count, share, runs, e)
        over = OVER * _price(
            model, most, 0.0, weight, base, cap, slot, share, runs, tokens, active, time, top
        )
        now = _price(
            model, most, over, weight, base, cap, slot, share, runs, tokens, active, time, top
        )
        best = now
        best_slot[:] = slot
        start = heat[turn, 0] * now
        slope = (heat[turn, 1] - heat[turn, 0]) * now / trials
        accepted = 0
        for trial in range(trials):
            if best <= target[turn]:
                break
            works[layer] += 1
            w = 0
            if windows > 1:
                w = drawn(stream, layer, steps)
            g = top[w, 0]
            h = random_below(stream, layer, ranks)
            if cap[g] == 0 or cap[h] == 0:
                continue
            exchange = random_below(stream, layer, REPLICA) > 0
            i = random_below(stream, layer, cap[g])
            j = random_below(stream, layer, cap[h])
            a = slot[g, i]
            b = slot[h, j]
            n = 0
            if exchange:
                if h == g or (on[h, a] | on[g, b]) & any_old or (on[g, a] | on[h, b]) & PINNED:
                    continue
                new = arrives(on, h, a) + arrives(on, g, b) - arrives(on, g, a) - arrives(on, h, b)
                if new > room:
                    continue
                changed[0] = g
                changed[1] = h
                n = 2
            else:  # rank h gives b up for a copy of a; or the slowest for none, or for any other
                if h == g:
                    a = random_below(stream, layer, empty)
                elif random_below(stream, layer, 3) == 0:
                    h = g
                    j = i
                    b = a
                    a = empty
                if count[b] <= least[b] or on[h, b] & PINNED or a == b:
                    continue
                if count[a] >= limit[a] or on[h, a] & any_old:
                    continue
                new = arrives(on, h, a) - arrives(on, h, b)
                if new > room:
                    continue
                changed[0] = h
                n = 1
                for r in range(ranks):
                    shares = (a != empty and on[r, a] & HELD) or (b != empty and on[r, b] & HELD)
                    if r != h and shares:
                        changed[n] = r
                        n += 1
            for m in range(n):
                is_changed[changed[m]] = True
            ceiling = now + start + slope * trial
            cost = 0.0
            for v in range(windows):
                if exchange:
                    d = share[v, a] - share[v, b]
                    c = runs[v, a] - runs[v, b]
                    new_n[v, g] = tokens[v, g] - d
                    new_n[v, h] = tokens[v, h] + d
                    new_a[v, g] = active[v, g] - c
                    new_a[v, h] = active[v, h] + c
                else:
                    is_a = load[v, a] / (count[a] + 1)
                    is_b = load[v, b] / max(count[b] - 1, 1)
                    run_a = -np.expm1(-is_a)
                    run_b = -np.expm1(-is_b)
                    new_n[v, h] = tokens[v, h] + is_a - share[v, b]
                    new_a[v, h] = active[v, h] + run_a - runs[v, b]
                    for m in range(1, n):
                        r = changed[m]
                        new_n[v, r] = tokens[v, r]
                        new_a[v, r] = active[v, r]
                        if a != empty and on[r, a] & HELD:
                            new_n[v, r] += is_a - share[v, a]
                            new_a[v, r] += run_a - runs[v, a]
                        if b != empty and on[r, b] & HELD:
                            new_n[v, r] += is_b - share[v, b]
                            new_a[v, r] += run_b - runs[v, b]
                longest = 0.0
                for m in range(n):
                    r = changed[m]
                    new_t[v, r] = _seconds(model, r, new_a[v, r], new_n[v, r])
                    longest = max(longest, new_t[v, r])
                    if limited:
                        cost += over * max(new_n[v, r] / most[r] - 1.0, 0.0)
                cost += weight[v] * longest
                if cost >= ceiling:
                    break
                if limited:
                    for r in range(ranks):
                        if not is_changed[r]:
                            cost += over * max(tokens[v, r] / most[r] - 1.0, 0.0)
                rest = 0.0  # the slowest of the others
                known = False
                for m in range(3):
                    r = top[v, m]
                    if r < 0 or not is_changed[r]:
                        rest = time[v, r] if r >= 0 else 0.0
                        known = True
                        break
                if not known:
                    for r in range(ranks):
                        if not is_changed[r]:
                            rest = max(rest, time[v, r])
                cost += weight[v] * max(rest - longest, 0.0)
            for m in range(n):
                is_changed[changed[m]] = False
            if cost >= ceiling:
                continue
            if exchange:
                swap(slot, on, g, i, h, j)
            else:
                slot[h, j] = a
                count[a] += 1
                count[b] -= 1
                if a != empty:
                    on[h, a] |= HELD
                    _refresh(load, count, share, runs, a)
                if b != empty:
                    on[h, b] &= ~np.uint8(HELD)
                    _refresh(load, count, share, runs, b)
            for v in range(windows):
                for m in range(n):
                    r = changed[m]
                    tokens[v, r] = new_n[v, r]
                    active[v, r] = new_a[v, r]
                    time[v, r] = new_t[v, r]
                three(time[v], top[v])
            now = cost
            room -= new
            accepted += 1
            if accepted % 256 == 0:  # rounding of the updates does not add up
                now = _price(
                    model, most, over, weight, base, cap, slot, share, runs, tokens, active, time,
                    top,
                )  # fmt: skip
            if now < best * (1 - 1e-12):
                best = now
                best_slot[:] = slot
        restore(slot, on, cap, count, best_slot)
        for e in range(empty):
            _refresh(load, count, share, runs, e)
        costs[layer] = _price(
            model, most, over, weight, base, cap, slot, share, runs, tokens, active, time, top
        )


class TrueTimes:
    """A state's placement, to be improved by the true times in all windows (even routing).

    Parameters
    ----------
    problem : Problem
    state : State
        Its placement is the start; `slot`, `copies`, `on`, `random` and `work` change. Its
        values and tokens (of the mean load) are not kept up to date.
    allowance : int array [layers]
        Copies that each layer may receive beyond the ranks' experts marked OLD.
    target : array [layers]
        Costs at which layers are done.

    Attributes
    ----------
    cost : array [layers]
        Weighted mean over windows of the makespan, in seconds, and what breaks capacities.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        allowance: IntArray | None = None,
        target: FloatArray | None = None,
    ) -> None:
        self.model = model_of(problem.cluster)
        self.most = np.maximum(ceiling(problem), 1e-9)
        shape = (problem.windows, problem.layers, problem.experts + 1)
        self.load = np.zeros(shape)
        self.load[:, :, :-1] = problem.tokens
        self.base = np.array(problem.base)
        unlimited = np.full(problem.layers, 1 << 40)
        self.allowance = unlimited if allowance is None else allowance
        self.target = np.zeros(problem.layers) if target is None else target
        self.state = state
        self.cost = np.full(problem.layers, np.inf)

    def improve(
        self,
        layers: IntArray,
        trials: int,
        heat: FloatArray,
        weight: FloatArray,
        pool: ThreadPoolExecutor,
        workers: int,
    ) -> None:
        """Try `trials` changes of each of `layers`, thresholds falling over `heat` [layers, 2].

        By the windows' `weight`, until a layer's target; layers are left at their best.
        """
        state = self.state

        def run(part: slice) -> None:
            mine = layers[part].copy()  # contiguous: kernels are compiled for that
            _search(
                mine, trials, heat[part].copy(), self.target[mine], self.model, self.most, weight,
                self.allowance, self.load, self.base, state.cap, state.least, state.most,
                state.slot, state.copies, state.on, state.random, state.work, self.cost,
            )  # fmt: skip

        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))


def linear(problem: Problem) -> Problem:
    """The problem with each rank's tokens per second at a makespan that all could share.

    Activations are those of the mean load on one replica each, in equal parts: Newton's method
    for tokens n_g that all take as long, their sum that of a layer. A start for the search, no
    bound.
    """
    cluster = problem.cluster
    tokens, base = problem.mean_load
    activated = -np.expm1(-tokens).sum(axis=1).mean() / problem.ranks
    replicas = np.full(problem.ranks, activated)
    fair = (tokens.sum() + base.sum()) / (problem.layers * problem.ranks)
    speeds = cluster.speeds
    if fair > 0:
        at = np.full(problem.ranks, fair)
        for _ in range(4):
            seconds = cluster.seconds(at, replicas)
            slope = (cluster.seconds(1.02 * at, replicas) - seconds) / (0.02 * at)
            slope = np.maximum(slope, 1e-6 * seconds / at)
            common = (fair * problem.ranks + ((seconds / slope) - at).sum()) / (1 / slope).sum()
            at = np.clip(at + (common - seconds) / slope, 0.3 * fair, 3 * fair)
        speeds = at / at.mean() * speeds.mean()
    return replace(problem, cluster=replace(cluster, speeds=speeds, planes=None, table=None))
