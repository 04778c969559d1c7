"""The global EPLB in compiled code, as engines run it: the time to measure planners against.

Slots are those of ``eplb(loads, ranks, slots_per_rank)``, bit for bit.
"""

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.policies._layout import require_slots


def greedy(loads: FloatArray, ranks: int, slots_per_rank: int) -> IntArray:
    """Replicate and pack as `eplb` does with one group and one node.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    ranks, slots_per_rank : int

    Returns
    -------
    slots : [layers, slots]
        A rank may hold two copies of an expert, as published.

    Raises
    ------
    PolicyNotApplicable
        If there are fewer slots than experts.
    """
    layers, experts = loads.shape
    require_slots("EPLB", experts, ranks * slots_per_rank)
    slots = np.empty((layers, ranks * slots_per_rank), dtype=np.int64)
    _greedy(np.ascontiguousarray(loads, dtype=np.float64), ranks, slots)
    return slots


@njit(cache=True, nogil=True, error_model="numpy")
def _greedy(loads, ranks, slots):  # type: ignore[no-untyped-def]
    layers, experts = loads.shape
    total = slots.shape[1]
    size = total // ranks
    copy_of = np.empty(total, dtype=np.int64)
    heap = np.empty(max(experts, ranks), dtype=np.int64)
    copies = np.empty(experts)
    minus = np.empty(experts)
    key, key_spare = np.empty(total), np.empty(total)
    item, item_spare = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    load = np.empty(ranks)
    used = np.empty(ranks, dtype=np.int64)
    for layer in range(layers):
        _replicate(loads[layer], copy_of, heap, copies, minus)
        if size == 1:
            slots[layer] = copy_of
            continue
        for i in range(total):
            key[i] = -minus[copy_of[i]]
            item[i] = copy_of[i]
        weight, expert = _sort(key, item, key_spare, item_spare)
        load[:] = 0.0
        used[:] = 0
        for g in range(ranks):
            heap[g] = g
        open_ranks = ranks
        for i in range(total):
            g = heap[0]
            slots[layer, g * size + used[g]] = expert[i]
            used[g] += 1
            load[g] += weight[i]
            if used[g] == size:
                open_ranks -= 1
                heap[0] = heap[open_ranks]
            _sink(load, heap, 0, open_ranks)


@njit(cache=True, nogil=True, error_model="numpy")
def _replicate(load, copy_of, heap, copies, minus):  # type: ignore[no-untyped-def]
    """Fill `copy_of` and `minus` (-load per copy) by a heap of experts, largest load on top."""
    experts = load.size
    for e in range(experts):
        copy_of[e] = e
        copies[e] = 1.0
        minus[e] = -load[e]
        heap[e] = e
    if copy_of.size == experts:
        return
    for i in range(experts // 2 - 1, -1, -1):
        _sink(minus, heap, i, experts)
    for i in range(experts, copy_of.size):
        e = heap[0]
        copy_of[i] = e
        copies[e] += 1.0
        minus[e] = -load[e] / copies[e]
        _sink(minus, heap, 0, experts)


@njit(cache=True, nogil=True, error_model="numpy")
def _sink(key, heap, i, size):  # type: ignore[no-untyped-def]
    """Restore the heap below place `i`: smallest key on top, first index on ties."""
    e = heap[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        a = heap[child]
        if child + 1 < size:
            b = heap[child + 1]
            if key[b] < key[a] or (key[b] == key[a] and b < a):
                child += 1
                a = b
        if key[a] > key[e] or (key[a] == key[e] and e < a):
            break
        heap[i] = a
        i = child
    heap[i] = e


@njit(cache=True, nogil=True, error_model="numpy")
def _sort(key, order, key_spare, order_spare):  # type: ignore[no-untyped-def]
    """Sort `key` descending and `order` along with it, stably; return the two sorted arrays.

    Insertion in runs of 16, then merges without branches on the data, which would be
    mispredicted half the time.
    """
    n = key.size
    run = 16
    for low in range(0, n, run):
        for i in range(low + 1, min(low + run, n)):
            value = key[i]
            item = order[i]
            j = i
            while j > low and key[j - 1] < value:
                key[j] = key[j - 1]
                order[j] = order[j - 1]
                j -= 1
            key[j] = value
            order[j] = item
    while run < n:
        for low in range(0, n, 2 * run):
            middle = min(low + run, n)
            high = min(low + 2 * run, n)
            a = low
            b = middle
            k = low
            while a < middle and b < high:
                left = key[a] >= key[b]
                key_spare[k] = key[a] if left else key[b]
                order_spare[k] = order[a] if left else order[b]
                a += left
                b += 1 - left
                k += 1
            rest = a if a < middle else b
            while k < high:
                key_spare[k] = key[rest]
                order_spare[k] = order[rest]
                rest += 1
                k += 1
        key, key_spare = key_spare, key
        order, order_spare = order_spare, order
        run *= 2
    return key, order
