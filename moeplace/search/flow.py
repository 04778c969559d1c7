"""Parametric maximum flow from experts to the ranks that hold them, compiled."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def split_layer(tokens, base, speed, most, begin, slots, first, by_expert, share):  # type: ignore[no-untyped-def]
    """Shares of one layer: least T such that all tokens flow to ranks.

    By T rank g has room for min(T v_g, C_g) - b_g tokens; `most` [ranks] are the token capacities
    C_g. `slots` [slots] holds experts rank by rank, rank g from begin[g]; slots by expert stand
    in `by_expert` from first[e]. Returns the tokens for which the capacities leave no room at any
    T; they go where they may nevertheless.
    """
    experts = tokens.size
    ranks = speed.size
    rank_of = np.empty(slots.size, dtype=np.int64)
    for g in range(ranks):
        rank_of[begin[g] : begin[g + 1]] = g
    load = base.copy()  # what a rank carries whatever the shares
    tiny = 0.0
    excess = np.zeros(experts)
    seconds = 0.0
    for e in range(experts):
        tiny += tokens[e]
        if first[e + 1] - first[e] == 1:
            load[rank_of[by_expert[first[e]]]] += tokens[e]
    for g in range(ranks):
        seconds = max(seconds, load[g] / speed[g])
    tiny *= 1e-14
    flow = np.zeros(slots.size)
    room = np.minimum(seconds * speed, most) - load
    short = 0.0
    for g in range(ranks):
        if load[g] > most[g]:
            short += load[g] - most[g]
            room[g] = 0.0
    # start: each expert fills its ranks one after the other, the roomiest first
    for e in range(experts):
        if first[e + 1] - first[e] == 1:
            continue
        excess[e] = tokens[e]
        for _ in range(first[e + 1] - first[e]):
            best = by_expert[first[e]]
            for n in range(first[e], first[e + 1]):
                if room[rank_of[by_expert[n]]] > room[rank_of[best]]:
                    best = by_expert[n]
            amount = min(excess[e], room[rank_of[best]])
            if amount <= 0.0:
                break
            flow[best] += amount
            room[rank_of[best]] -= amount
            excess[e] -= amount
    from_rank = np.empty(experts, dtype=np.int64)  # slot by which an expert was reached; -1 start
    from_expert = np.empty(ranks, dtype=np.int64)  # slot by which a rank was reached
    queue = np.empty(experts + ranks, dtype=np.int64)
    while True:
        from_rank[:] = -2
        from_expert[:] = -2
        head = 0
        tail = 0
        for e in range(experts):
            if excess[e] > tiny:
                from_rank[e] = -1
                queue[tail] = e
                tail += 1
        if tail == 0:
            break
        end = -1
        while head < tail and end < 0:
            node = queue[head]
            head += 1
            if node < experts:
                for n in range(first[node], first[node + 1]):
                    p = by_expert[n]
                    g = rank_of[p]
                    if from_expert[g] == -2:
                        from_expert[g] = p
                        if room[g] > tiny:
                            end = g
                            break
                        queue[tail] = experts + g
                        tail += 1
            else:
                g = node - experts
                for p in range(begin[g], begin[g + 1]):
                    if flow[p] > 0.0 and from_rank[slots[p]] == -2:
                        from_rank[slots[p]] = p
                        queue[tail] = slots[p]
                        tail += 1
        if end >= 0:  # push what the path can carry
            amount = room[end]
            g = end
            while True:
                e = slots[from_expert[g]]
                p = from_rank[e]
                if p == -1:
                    amount = min(amount, excess[e])
                    break
                amount = min(amount, flow[p])
                g = rank_of[p]
            g = end
            room[end] -= amount
            while True:
                flow[from_expert[g]] += amount
                e = slots[from_expert[g]]
                p = from_rank[e]
                if p == -1:
                    excess[e] -= amount
                    break
                flow[p] -= amount
                g = rank_of[p]
            continue
        # no path: the ranks reached are too slow for the experts reached, whose tokens may go
        # nowhere else; T rises to where these just fit
        need = 0.0
        fast = 0.0
        for e in range(experts):
            if from_rank[e] != -2:
                need += tokens[e]
        for g in range(ranks):
            if from_expert[g] != -2:
                if seconds * speed[g] < most[g]:
                    need += load[g]
                    fast += speed[g]
                else:  # full whatever T: it carries its capacity, or what it must
                    need -= max(most[g] - load[g], 0.0)
        later = need / fast if fast > 0.0 else np.inf
        if later <= seconds or fast == 0.0:  # hand out what is left: rounding, or no room at all
            for e in range(experts):
                if excess[e] > 0.0:
                    flow[by_expert[first[e]]] += excess[e]
                    if fast == 0.0:
                        short += excess[e]
                    excess[e] = 0.0
            break
        for g in range(ranks):
            if seconds * speed[g] < most[g]:
                room[g] += min((later - seconds) * speed[g], most[g] - seconds * speed[g])
        seconds = later
    for e in range(experts):
        given = 0.0
        for n in range(first[e], first[e + 1]):
            given += flow[by_expert[n]]
        for n in range(first[e], first[e + 1]):
            p = by_expert[n]
            if first[e + 1] - first[e] == 1:
                share[p] = 1.0
            elif given > 0.0:
                share[p] = flow[p] / given
            else:
                share[p] = 1.0 / (first[e + 1] - first[e])
    return short


@njit(cache=True, nogil=True, error_model="numpy")
def shares(tokens, base, speed, most, begin, slots, split):  # type: ignore[no-untyped-def]
    """Shares [windows, layers, slots] into `split` for slots [layers, slots].

    Base loads, speeds and capacities `most` are [windows, layers, ranks].
    """
    windows, layers, experts = tokens.shape
    first = np.empty(experts + 1, dtype=np.int64)
    for layer in range(layers):
        by_expert = np.argsort(slots[layer], kind="mergesort")
        empty = 0
        while empty < by_expert.size and slots[layer, by_expert[empty]] < 0:
            empty += 1
        n = empty
        for e in range(experts):
            first[e] = n
            while n < by_expert.size and slots[layer, by_expert[n]] == e:
                n += 1
        first[experts] = n
        for window in range(windows):
            split[window, layer] = 0.0
            split_layer(
                tokens[window, layer],
                base[window, layer],
                speed[window, layer],
                most[window, layer],
                begin,
                slots[layer],
                first,
                by_expert,
                split[window, layer],
            )
