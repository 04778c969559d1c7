"""Which node each expert group lies on, so that the slowest node is fast, compiled."""

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray, sum_by
from moeplace.problem import Problem
from moeplace.search.construct import ascending
from moeplace.search.improve import random_below

#: Random restarts of the assignment of groups to nodes, for each layer.
RESTARTS = 64


@njit(cache=True, nogil=True, error_model="numpy")
def _assign(load, size, base, speeds, room, node_of, stream):  # type: ignore[no-untyped-def]
    """Best assignment found of each layer's groups to nodes; False where none fits."""
    layers, groups = load.shape
    nodes = speeds.shape[1]
    fits = np.zeros(layers, dtype=np.bool_)
    time = np.empty(nodes)
    free = np.empty(nodes, dtype=np.int64)
    now = np.empty(groups, dtype=np.int64)
    for layer in range(layers):
        best = np.inf
        speed = speeds[layer]
        for restart in range(2 * RESTARTS):
            # largest first, each to the node that would end it earliest; restarts shuffle
            key = load[layer] + size * 1e-9
            if restart >= RESTARTS:  # where that never fits, those with most experts first
                if fits[layer]:
                    break
                key = size.astype(np.float64)
            if restart > 0:
                for i in range(groups):
                    key[i] *= 0.5 + random_below(stream, layer, 1 << 20) / float(1 << 20)
            for n in range(nodes):
                time[n] = base[layer, n]
                free[n] = room[n]
            legal = True
            for i in ascending(-key):
                to = -1
                for n in range(nodes):
                    if free[n] >= size[i] and (
                        to < 0
                        or (time[n] + load[layer, i]) / speed[n]
                        < (time[to] + load[layer, i]) / speed[to]
                    ):
                        to = n
                if to < 0:
                    legal = False
                    break
                now[i] = to
                time[to] += load[layer, i]
                free[to] -= size[i]
            if not legal:
                continue
            better = True
            while better:  # exchange or move out of the slowest node
                better = False
                slow = 0
                for n in range(1, nodes):
                    if time[n] / speed[n] > time[slow] / speed[slow]:
                        slow = n
                most = time[slow] / speed[slow] * (1 - 1e-12)
                give = -1
                take = -1
                to = -1
                for i in range(groups):
                    if now[i] != slow:
                        continue
                    for n in range(nodes):
                        if n != slow and free[n] >= size[i]:
                            end = max(
                                (time[n] + load[layer, i]) / speed[n],
                                (time[slow] - load[layer, i]) / speed[slow],
                            )
                            if end < most:
                                most, give, take, to = end, i, -1, n
                    for j in range(groups):
                        n = now[j]
                        if n == slow or free[n] + size[j] < size[i]:
                            continue
                        if free[slow] + size[i] < size[j]:
                            continue
                        d = load[layer, i] - load[layer, j]
                        end = max((time[n] + d) / speed[n], (time[slow] - d) / speed[slow])
                        if end < most:
                            most, give, take, to = end, i, j, n
                if give >= 0:
                    better = True
                    now[give] = to
                    time[slow] -= load[layer, give]
                    time[to] += load[layer, give]
                    free[slow] += size[give]
                    free[to] -= size[give]
                    if take >= 0:
                        now[take] = slow
                        time[to] -= load[layer, take]
                        time[slow] += load[layer, take]
                        free[to] += size[take]
                        free[slow] -= size[take]
            most = 0.0
            for n in range(nodes):
                most = max(most, time[n] / speed[n])
            if most < best:
                best = most
                node_of[layer] = now
                fits[layer] = True
    return fits


def assign(problem: Problem, groups: IntArray, seconds: FloatArray, seed: int) -> IntArray | None:
    """Node [layers, groups] of each expert group on the mean load; None if none was found.

    `seconds` [layers] is the makespan aimed at: token capacities slow ranks down to it.
    """
    cluster = problem.cluster
    assert cluster.nodes is not None
    tokens, base = problem.mean_load
    nodes = int(cluster.nodes.max()) + 1
    number = int(groups.max()) + 1
    holds = cluster.slots > 0
    capped = problem.capacity / np.maximum(seconds, 1e-100)[:, None]
    speed = sum_by(np.minimum(cluster.speeds, capped) * holds, cluster.nodes, nodes)
    room = sum_by(np.minimum(cluster.slots, problem.experts), cluster.nodes, nodes)
    stream = np.arange(1, problem.layers + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    node_of = np.zeros((problem.layers, number), dtype=np.int64)
    fits: FloatArray = _assign(
        sum_by(tokens, groups, number),
        np.bincount(groups, minlength=number),
        sum_by(base * holds, cluster.nodes, nodes),
        np.where(speed > 0, speed, 1e-300),
        room.astype(np.int64),
        node_of,
        stream ^ np.uint64(seed),
    )
    return node_of if fits.all() else None
