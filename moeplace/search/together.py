"""Compiled exchanges between nodes, so that experts chosen together share one (see `affinity`)."""

import numpy as np
from numba import njit

from moeplace.search.improve import random_below


@njit(cache=True, nogil=True, error_model="numpy")
def exchange(  # type: ignore[no-untyped-def]
    layer, trials, slot, rank, node, together, moves, allowed, count, load, tokens, limit, stream
):
    """Exchange experts of a layer's slots between nodes while more of `together` share one.

    Experts move from ranks where `moves` [experts, ranks] to those where `allowed`; `tokens`
    [windows, ranks] stay within `limit`.
    """
    experts = count.size
    nodes = node.max() + 1
    near = np.zeros((experts, nodes))  # how much of what an expert fires with lies on a node
    for s in range(slot.size):
        f = slot[s]
        if f >= 0:
            for e in range(experts):
                near[e, node[rank[s]]] += together[e, f] / count[f]
    for _ in range(trials):
        i = random_below(stream, layer, slot.size)
        j = random_below(stream, layer, slot.size)
        a = slot[i]
        b = slot[j]
        g = rank[i]
        h = rank[j]
        here = node[g]
        there = node[h]
        if a < 0 or b < 0 or here == there or not (moves[a, g] and moves[b, h]):
            continue
        if not (allowed[a, h] and allowed[b, g]):
            continue
        gain = near[a, there] - near[a, here] + near[b, here] - near[b, there]
        if gain - 2 * together[a, b] <= 0:
            continue
        fits = True
        for w in range(load.shape[0]):
            more = load[w, a] - load[w, b]
            fits &= tokens[w, h] + more <= limit[w, h] and tokens[w, g] - more <= limit[w, g]
        if not fits:
            continue
        for w in range(load.shape[0]):
            more = load[w, a] - load[w, b]
            tokens[w, h] += more
            tokens[w, g] -= more
        slot[i] = b
        slot[j] = a
        for e in range(experts):
            change = together[e, b] - together[e, a]
            near[e, here] += change
            near[e, there] -= change
