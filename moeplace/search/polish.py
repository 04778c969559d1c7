"""Compiled search over placements priced at their best shares (weighted routing).

A trial changes one or two slots, an exchange or a replica given up for another, next to a rank
that decides the makespan, and prices the layer by maximum flow in every window. What is not
worse is kept. Slow but general: for what the window and groups of ranks leave open.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY
from moeplace.problem import Problem
from moeplace.search.flow import split_layer
from moeplace.search.improve import arrives, random_below, swap
from moeplace.search.state import HELD, OLD, PINNED, State, ceiling

#: Cost, in fluid bounds, of all tokens for which the ranks' capacities leave no room: no gain of
#: time is worth it.
OVER = 1e6


@njit(cache=True, nogil=True, error_model="numpy")
def _price(  # type: ignore[no-untyped-def]
    weight, tokens, base, speed, most, begin, cap, slot, flat, first, by_expert, share, tight
):
    """Cost of a layer, and the ranks that decide a window into `tight`; returns (cost, number)."""
    experts = tokens.shape[1]
    ranks = cap.size
    first[:] = 0
    flat[:] = EMPTY
    for g in range(ranks):
        for k in range(cap[g]):
            if slot[g, k] != experts:
                flat[begin[g] + k] = slot[g, k]
                first[slot[g, k] + 1] += 1
    for e in range(experts):
        first[e + 1] += first[e]
    fill = first.copy()
    for p in range(flat.size):
        if flat[p] >= 0:
            by_expert[fill[flat[p]]] = p
            fill[flat[p]] += 1
    total = 0.0
    n = 0
    for w in range(weight.size):
        short = split_layer(tokens[w], base[w], speed, most, begin, flat, first, by_expert, share)
        longest = 0.0
        for g in range(ranks):
            carried = base[w, g]
            for p in range(begin[g], begin[g + 1]):
                if flat[p] >= 0:
                    carried += share[p] * tokens[w, flat[p]]
            share[flat.size + g] = carried / speed[g]
            longest = max(longest, carried / speed[g])
            if short > 0.0 and carried >= most[g] * (1 - 1e-9) and n < tight.size:
                tight[n] = g
                n += 1
        total += weight[w] * longest
        if short > 0.0:
            total += OVER * short / speed.sum()
        for g in range(ranks):
            if share[flat.size + g] >= longest * (1 - 1e-9) and n < tight.size:
                tight[n] = g
                n += 1
    return total, n


@njit(cache=True, nogil=True, error_model="numpy")
def _polish(  # type: ignore[no-untyped-def]
    layers, trials, targets, allowances, weight, tokens, bases, speed, most, cap, begin, leasts,
    limit, slots, copies, ons, stream, works, costs,
):  # fmt: skip
    experts = tokens.shape[2]
    ranks = cap.size
    flat = np.empty(begin[-1], dtype=np.int64)
    first = np.empty(experts + 1, dtype=np.int64)
    by_expert = np.empty(begin[-1], dtype=np.int64)
    share = np.empty(begin[-1] + ranks)
    tight = np.empty(4 * ranks, dtype=np.int64)
    trial_tight = np.empty(4 * ranks, dtype=np.int64)
    for turn in range(layers.size):
        layer = layers[turn]
        slot = slots[layer]
        on = ons[layer]
        count = copies[layer]
        least = leasts[layer]
        load = tokens[:, layer]
        base = bases[:, layer]
        now, number = _price(
            weight, load, base, speed, most, begin, cap, slot, flat, first, by_expert, share, tight
        )
        used = 0
        for g in range(ranks):
            for k in range(cap[g]):
                used += arrives(on, g, slot[g, k])
        for _ in range(trials):
            if now <= targets[turn]:
                break
            works[layer] += 1
            g = tight[random_below(stream, layer, number)]
            h = random_below(stream, layer, ranks)
            if cap[g] == 0 or cap[h] == 0:
                continue
            i = random_below(stream, layer, cap[g])
            j = random_below(stream, layer, cap[h])
            a = slot[g, i]
            b = slot[h, j]
            exchange = h != g and random_below(stream, layer, 2) == 0
            if exchange:
                if on[h, a] & ~np.uint8(OLD) or on[g, b] & ~np.uint8(OLD):
                    continue
                if (on[g, a] | on[h, b]) & PINNED:
                    continue
                cost = arrives(on, h, a) + arrives(on, g, b) - arrives(on, g, a) - arrives(on, h, b)
            else:  # rank h gives b up for a copy of a, or the tight rank for anything
                if h == g:
                    a = random_below(stream, layer, experts + 1)
                if count[b] <= least[b] or on[h, b] & PINNED or a == b:
                    continue
                if count[a] >= limit[a] or on[h, a] & ~np.uint8(OLD):
                    continue
                cost = arrives(on, h, a) - arrives(on, h, b)
            if used + cost > allowances[turn]:
                continue
            for back in range(2):
                if exchange:
                    swap(slot, on, g, i, h, j)
                else:
                    old = slot[h, j]
                    slot[h, j] = a if back == 0 else b
                    count[old] -= 1
                    count[slot[h, j]] += 1
                if back == 1:
                    break
                after, n = _price(
                    weight, load, base, speed, most, begin, cap, slot, flat, first, by_expert,
                    share, trial_tight,
                )  # fmt: skip
                if after <= now:
                    now = after
                    number = n
                    tight[:n] = trial_tight[:n]
                    used += cost
                    if not exchange:
                        on[h, b] &= ~np.uint8(HELD)
                        if a != experts:
                            on[h, a] |= HELD
                    break
        costs[layer] = now


class Polish:
    """A state's placement, to be improved at its best shares in all windows of a problem.

    Parameters
    ----------
    problem : Problem
    state : State
        Its `slot`, `copies`, `on`, `random` and `work` change; values and tokens (of even
        routing) are not kept up to date.
    allowance : int array [layers]
        Copies that each layer may receive beyond the ranks' experts marked OLD.
    """

    def __init__(self, problem: Problem, state: State, allowance: IntArray) -> None:
        self.problem, self.state, self.allowance = problem, state, allowance
        self.begin = np.concatenate([[0], state.cap.cumsum()])
        self.cost = np.full(problem.layers, np.inf)
        self.weight, self.capacity = problem.window_weight, ceiling(problem)

    def improve(
        self,
        layers: IntArray,
        trials: int,
        targets: FloatArray,
        pool: ThreadPoolExecutor,
        workers: int,
    ) -> None:
        """Try `trials` changes of each of `layers`, until `targets` (mean seconds of a window)."""
        state, problem = self.state, self.problem

        def run(part: slice) -> None:
            _polish(
                layers[part], trials, targets[part], self.allowance[layers[part]],
                self.weight, problem.tokens, problem.base, problem.cluster.speeds, self.capacity,
                state.cap, self.begin, state.least, state.most, state.slot, state.copies, state.on,
                state.random, state.work, self.cost,
            )  # fmt: skip

        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))
