"""Compiled search under an engine's fixed dispatch rule (`dispatch.FIXED`).

Under such a rule an expert's shares follow from the ranks that hold it alone, so a step changes
the shares of the two experts that it touches, and the ranks that hold them. Trials as in
`windows`: exchange a slot of the slowest rank with a random one, or replace a copy; accepted if
they cost less than a threshold that falls to zero.

Where sglang-static draws which replicas take one source rank more, the search lets all of them
take it: what it finds is no slower under any draw. So it prefers counts that leave nothing over.

Under `MaxOffNode` copies that leave their node cost a toll, which rises in layers where too many
do.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.improve import random_below
from moeplace.search.state import HELD, PINNED, State
from moeplace.search.windows import drawn, three

#: First toll, in times of the layer's fluid bound for all copies, and how it rises and falls.
TOLL, TOLL_RISE, TOLL_FALL = 0.1, 1.5, 0.9


@njit(cache=True, nogil=True, error_model="numpy")
def deal(nearest, node, ranks_on, holder, count, out):  # type: ignore[no-untyped-def]
    """Most `dispatch.sources`, over draws, of an expert on the ranks holder[:count], into out.

    `nearest`: sglang-static, else ascend (which draws nothing).
    """
    ranks = node.size
    left = ranks
    if not nearest:
        for i in range(count):
            before = 0
            for j in range(count):
                before += holder[j] < holder[i]
            out[i] = ranks // count + (before < ranks % count)
        return
    apart = False
    for i in range(1, count):
        apart |= node[holder[i]] != node[holder[0]]
    for i in range(count):
        out[i] = 1
        if apart:
            first = True
            here = 0
            for j in range(count):
                if node[holder[j]] == node[holder[i]]:
                    here += 1
                    first &= holder[j] >= holder[i]
            if first:
                out[i] += ranks_on[node[holder[i]]] - here
        left -= out[i]
    for i in range(count):
        out[i] += (left + count - 1) // count


@njit(cache=True, nogil=True, error_model="numpy")
def away(nearest, node, ranks_on, holder, count):  # type: ignore[no-untyped-def]
    """Source ranks whose copies leave their node, of an expert on the ranks holder[:count]."""
    ranks = node.size
    if not nearest:
        left = 0
        for i in range(count):
            turn = 0
            for j in range(count):
                turn += holder[j] < holder[i]
            for source in range(turn, ranks, count):
                left += node[source] != node[holder[i]]
        return left
    left = ranks
    for i in range(count):
        first = True
        for j in range(i):
            first &= node[holder[j]] != node[holder[i]]
        if first:
            left -= ranks_on[node[holder[i]]]
    return left


@njit(cache=True, nogil=True, error_model="numpy")
def _price(  # type: ignore[no-untyped-def]
    weight, load, base, speed, holders, deals, count, time, top, toll, gone, share
):
    """Recompute rank times [windows, ranks] of a layer and what it costs, toll included."""
    total = 0.0
    ranks = speed.size
    for w in range(weight.size):
        time[w] = base[w]
        for e in range(count.size - 1):
            for i in range(count[e]):
                time[w, holders[e, i]] += load[w, e] * deals[e, i] / ranks
        time[w] /= speed
        three(time[w], top[w])
        total += weight[w] * time[w, top[w, 0]]
        if toll > 0:
            for e in range(count.size - 1):
                total += weight[w] * toll * share[w] * load[w, e] * gone[e]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _change(e, out, into, nearest, node, ranks_on, holders, deals, count, new, dealt, diff):  # type: ignore[no-untyped-def]
    """Holders and deals of expert e when rank `out` gives it up and rank `into` takes it (or -1).

    The new ones go into new, dealt; the change of the source ranks is added to diff [ranks].
    Returns the new count.
    """
    n = 0
    for i in range(count[e]):
        diff[holders[e, i]] -= deals[e, i]
        if holders[e, i] != out:
            new[n] = holders[e, i]
            n += 1
    if into >= 0:
        new[n] = into
        n += 1
    deal(nearest, node, ranks_on, new, n, dealt)
    for i in range(n):
        diff[new[i]] += dealt[i]
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def _put(slot, on, g, k, e):  # type: ignore[no-untyped-def]
    """Expert e (or EMPTY) into slot k of rank g, in place of what is there."""
    empty = on.shape[1] - 1
    if slot[g, k] != empty:
        on[g, slot[g, k]] &= ~np.uint8(HELD)
    slot[g, k] = e
    if e != empty:
        on[g, e] |= HELD


@njit(cache=True, nogil=True, error_model="numpy")
def _reset(slot, cap, on, nearest, node, ranks_on, holders, deals, count, gone):  # type: ignore[no-untyped-def]
    """Holders, deals, counts and what leaves its node of all experts from the slots; HELD too."""
    empty = count.size - 1
    count[:] = 0
    for g in range(cap.size):
        for e in range(empty):
            on[g, e] &= ~np.uint8(HELD)
        for k in range(cap[g]):
            e = slot[g, k]
            if e != empty:
                on[g, e] |= HELD
                holders[e, count[e]] = g
                count[e] += 1
    for e in range(empty):
        deal(nearest, node, ranks_on, holders[e], count[e], deals[e])
        gone[e] = away(nearest, node, ranks_on, holders[e], count[e])


@njit(cache=True, nogil=True, error_model="numpy")
def _anneal(  # type: ignore[no-untyped-def]
    layers, trials, heat, weight, loads, bases, speeds, cap, nearest, node, ranks_on, most_of, fill,
    tolls, slots, copies, ons, stream, works, costs, offs,
):  # fmt: skip
    windows = weight.size
    ranks = cap.size
    empty = loads.shape[2] - 1
    time = np.empty((windows, ranks))
    top = np.empty((windows, 3), dtype=np.int64)
    holders = np.empty((empty, ranks), dtype=np.int64)
    deals = np.empty((empty, ranks), dtype=np.int64)
    new = np.empty((2, ranks), dtype=np.int64)
    dealt = np.empty((2, ranks), dtype=np.int64)
    diff = np.zeros((2, ranks), dtype=np.int64)
    pair = np.empty(2, dtype=np.int64)
    sizes = np.empty(2, dtype=np.int64)
    gone = np.zeros(empty + 1, dtype=np.int64)
    went = np.zeros(2, dtype=np.int64)
    share = np.zeros(windows)
    best_slot = np.empty_like(slots[0])
    steps = np.cumsum(weight)
    for turn in range(layers.size):
        layer = layers[turn]
        slot = slots[layer]
        on = ons[layer]
        count = copies[layer]
        load = loads[:, layer]
        base = bases[:, layer]
        speed = speeds[layer]
        toll = tolls[layer]
        for v in range(windows):  # of a source rank's tokens in what the toll is taken of
            total = load[v].sum()
            share[v] = 1.0 / (total * ranks) if total > 0 else 0.0
        _reset(slot, cap, on, nearest, node, ranks_on, holders, deals, count, gone)
        time_only = _price(
            weight, load, base, speed, holders, deals, count, time, top, 0.0, gone, share
        )
        now = _price(weight, load, base, speed, holders, deals, count, time, top, toll, gone, share)
        best = now
        best_slot[:] = slot
        start = heat[turn, 0] * time_only  # the toll must not warm it up
        slope = (heat[turn, 1] - heat[turn, 0]) * time_only / trials
        accepted = 0
        for trial in range(trials):
            threshold = start + slope * trial
            w = drawn(stream, layer, steps)
            g = top[w, 0]
            if toll > 0 and trial % 2:  # what leaves its node may come from any rank
                g = random_below(stream, layer, ranks)
            h = random_below(stream, layer, ranks)
            if cap[h] == 0 or cap[g] == 0:
                continue
            i = random_below(stream, layer, cap[g])
            j = random_below(stream, layer, cap[h])
            if random_below(stream, layer, 4) > 0:  # exchange a on g with b on h
                a = slot[g, i]
                b = slot[h, j]
                if h == g or a == b or on[h, a] != 0 or on[g, b] != 0:
                    continue
                if (on[g, a] | on[h, b]) & PINNED:
                    continue
                swap = True
            else:  # rank h gives up a for b: one of g's; or g does, for any or none
                a = slot[h, j]
                b = slot[g, i] if h != g else random_below(stream, layer, empty + 1)
                if on[h, b] != 0 or a == b or (a == empty and not fill):
                    continue
                if a != empty and (count[a] < 2 or on[h, a] & PINNED):
                    continue
                if b != empty and count[b] >= most_of[b]:
                    continue
                swap = False
            pair[0] = a
            pair[1] = b
            for n in range(2):
                e = pair[n]
                sizes[n] = 0
                went[n] = 0
                if e == empty:
                    continue
                if swap:
                    source, sink = (g, h) if n == 0 else (h, g)
                else:
                    source, sink = (h, -1) if n == 0 else (-1, h)
                sizes[n] = _change(
                    e, source, sink, nearest, node, ranks_on, holders, deals, count,
                    new[n], dealt[n], diff[n],
                )  # fmt: skip
                if toll > 0:
                    went[n] = away(nearest, node, ranks_on, new[n], sizes[n]) - gone[e]
            delta = 0.0
            for v in range(windows):
                la = load[v, a] / ranks
                lb = load[v, b] / ranks
                most = 0.0
                for r in range(ranks):
                    t = time[v, r]
                    if diff[0, r] != 0 or diff[1, r] != 0:
                        t += (diff[0, r] * la + diff[1, r] * lb) / speed[r]
                    most = max(most, t)
                more = toll * share[v] * (load[v, a] * went[0] + load[v, b] * went[1])
                delta += weight[v] * (most - time[v, top[v, 0]] + more)
            if delta < threshold:
                for v in range(windows):
                    la = load[v, a] / ranks
                    lb = load[v, b] / ranks
                    for r in range(ranks):
                        if diff[0, r] != 0 or diff[1, r] != 0:
                            time[v, r] += (diff[0, r] * la + diff[1, r] * lb) / speed[r]
                    three(time[v], top[v])
                _put(slot, on, h, j, a if swap else b)
                if swap:
                    _put(slot, on, g, i, b)
                for n in range(2):
                    e = pair[n]
                    if e != empty:
                        count[e] = sizes[n]
                        holders[e, : sizes[n]] = new[n, : sizes[n]]
                        deals[e, : sizes[n]] = dealt[n, : sizes[n]]
                        gone[e] += went[n]
                now += delta
                accepted += 1
                if accepted % 256 == 0:  # rounding of the updates does not add up
                    now = _price(
                        weight, load, base, speed, holders, deals, count, time, top, toll, gone,
                        share,
                    )  # fmt: skip
                if now < best * (1 - 1e-9):
                    best = now
                    best_slot[:] = slot
            for n in range(2):
                diff[n] = 0
        works[layer] += trials
        slot[:] = best_slot
        _reset(slot, cap, on, nearest, node, ranks_on, holders, deals, count, gone)
        costs[layer] = _price(
            weight, load, base, speed, holders, deals, count, time, top, 0.0, gone, share
        )
        for v in range(windows):
            offs[v, layer] = (load[v, :empty] * gone[:empty]).sum() * share[v]


class Ruled:
    """A state's placement, to be improved on under the problem's rule; cf. `Windows`.

    Parameters
    ----------
    problem : Problem
        Its routing is one of `dispatch.FIXED`.
    state : State
        Its placement is the start; `slot`, `copies`, `on`, `random` and `work` change. Its
        values and tokens (of the mean load under even routing) are not kept up to date.
    """

    def __init__(self, problem: Problem, state: State) -> None:
        scale = state.unit[:, None]
        self.load = np.zeros((problem.windows, problem.layers, problem.experts + 1))
        self.load[:, :, :-1] = problem.tokens / scale
        self.base = problem.base / scale
        self.state = state
        self.cost = np.zeros(problem.layers)  # without toll
        self.off = np.zeros((problem.windows, problem.layers))  # share of copies off their node
        self.toll = np.zeros(problem.layers)
        self.nearest = problem.routing == "sglang-static"
        self.node = np.array(problem.cluster.node_of)
        self.ranks_on = np.bincount(self.node)
        self.most = np.array(problem.most_replicas)
        self.fill = problem.replica_budget is None  # else no slot that is free may be used

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

        Layers are left at their best cost by `weight` [windows], never above where they began
        (toll included).
        """
        state = self.state

        def run(part: slice) -> None:
            _anneal(
                layers[part], trials, heat[part], weight, self.load, self.base, state.speed,
                state.cap, self.nearest, self.node, self.ranks_on, self.most, self.fill,
                self.toll, state.slot, state.copies, state.on, state.random, state.work,
                self.cost, self.off,
            )  # fmt: skip

        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))

    def charge(self, layers: IntArray, fraction: float) -> None:
        """Toll for the next rounds: up where more copies leave their node than may, else down."""
        over = self.off[:, layers].max(axis=0) > fraction
        toll = self.toll[layers]
        self.toll[layers] = np.where(over, np.maximum(TOLL_RISE * toll, TOLL), TOLL_FALL * toll)


def local(problem: Problem) -> Plan | None:
    """A plan that keeps the most copies on their node under sglang-static: a start for `Ruled`.

    The hottest experts get the spare slots, one copy a node; copies go where a node has none yet,
    heaviest first, to the rank that is done first. None on one node, or without room.
    """
    node = problem.cluster.node_of
    nodes = int(node.max()) + 1
    if nodes == 1 or problem.replica_budget is not None:
        return None
    spare = int(np.minimum(problem.cluster.slots, problem.experts).sum()) - problem.experts
    begin = problem.cluster.slots.cumsum() - problem.cluster.slots
    slots = np.full((problem.layers, problem.cluster.total_slots), EMPTY)
    for layer in range(problem.layers):
        load, base = problem.mean(problem.tokens)[layer], problem.mean(problem.base)[layer]
        pinned = problem.pinned[layer]
        most = np.minimum(problem.most_replicas, nodes)
        more = np.repeat(np.arange(problem.experts), np.maximum(most - 1, 0))
        extra = int(np.maximum(pinned.sum(axis=1) - 1, 0).sum())
        more = more[np.argsort(-load[more], kind="stable")][: max(spare - extra, 0)]
        count = np.maximum(1 + np.bincount(more, minlength=problem.experts), pinned.sum(axis=1))
        free, tokens = problem.cluster.slots.copy(), base.copy()
        near = np.zeros((problem.experts, problem.ranks), dtype=np.bool_)  # its node has a copy
        held = np.zeros_like(near)
        turns = [(e, g) for e, g in np.argwhere(pinned)]
        rest = np.repeat(np.arange(problem.experts), count - pinned.sum(axis=1))
        barred = ~problem.allowed[layer].all(axis=1)[rest]  # those first: they have less choice
        turns += [(e, -1) for e in rest[np.lexsort((-(load / count)[rest], ~barred))]]
        for e, g in turns:
            if g < 0:
                open_to = (free > 0) & problem.allowed[layer, e] & ~held[e]
                if not open_to.any():
                    if held[e].any():  # a copy less
                        continue
                    return None
                if (open_to & ~near[e]).any():
                    open_to &= ~near[e]
                done = (tokens + load[e] / count[e]) / problem.cluster.speeds
                g = int(np.argmin(np.where(open_to, done, np.inf)))
            free[g] -= 1
            slots[layer, begin[g] + free[g]] = e
            held[e, g] = True
            near[e] |= node == node[g]
            tokens[g] += load[e] / count[e]
    return Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)


def undrawn(problem: Problem, plan: Plan) -> Plan:
    """The plan with fewer copies where sglang-static would draw: a start for `Ruled`.

    Counts become divisors of the number of nodes (of ranks, on one node), the largest that are
    not above; copies beyond the first on a node go first. Pinned ones stay.
    """
    assert problem.cluster.nodes is not None
    nodes = np.unique(problem.cluster.nodes).size
    whole = problem.ranks if nodes == 1 else nodes
    divisors = np.array([d for d in range(1, whole + 1) if whole % d == 0])
    node = problem.cluster.nodes[plan.rank_of_slot]
    slots = plan.slots.copy()
    for layer in range(plan.layers):
        row = slots[layer]
        held = np.flatnonzero(row != EMPTY)
        again = np.ones(row.size, dtype=np.bool_)
        pair = row[held] * (node.max() + 1) + node[held]
        again[held[np.unique(pair, return_index=True)[1]]] = False
        free = ~problem.pinned[layer, row[held], plan.rank_of_slot[held]]
        held = held[np.lexsort((again[held], free, row[held]))]
        count = plan.replicas[layer]
        begin = count.cumsum() - count
        keep = divisors[np.searchsorted(divisors, count, "right") - 1]
        keep = np.maximum(keep, problem.pinned[layer].sum(axis=1))
        row[held[np.arange(held.size) - begin[row[held]] >= keep[row[held]]]] = EMPTY
    return Plan(slots=slots, rank_slots=plan.rank_slots, experts=plan.experts)
