"""Exact weighted split by a sliding window over experts in ascending load, compiled.

A rank of capacity C and K slots takes the least K consecutive experts whose sum reaches C: all
but the last whole, the last cut so that the rank is exactly full; the rest of the cut goes back
in order. Each rank but the last so removes K - 1 experts and cuts one, which fits if
S >= E + G - 1 (cf. class-constrained packing, Golubchik et al. 2000, Shachnai and Tamir 2001).
It can fail, when a rank cannot be filled or is overfilled by its smallest experts: the outcome
is checked, and other rank orders are tried.
"""

import numpy as np
from numba import njit

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.plan import EMPTY
from moeplace.problem import Problem
from moeplace.search.construct import ascending
from moeplace.search.state import ceiling, to_slots


@njit(cache=True, nogil=True, error_model="numpy")
def _pour(order, seconds, load, base, speed, most, cap, slot, share):  # type: ignore[no-untyped-def]
    """Fill ranks in `order` up to `seconds`; True if all experts found their place."""
    experts = load.size
    item = ascending(load)
    rest = load[item]
    left = experts
    slot[:] = experts
    share[:] = 0.0
    whole = load.sum()
    for position in range(order.size):
        g = order[position]
        size = cap[g]
        if size == 0 or left == 0:
            continue
        room = min(seconds * speed[g], most[g]) - base[g]
        if position == order.size - 1:
            room = np.inf  # the last takes what is left; the caller prices the outcome
        if room < 0:
            room = 0.0
        width = min(size, left)
        total = 0.0
        for i in range(width):
            total += rest[i]
        start = 0
        while total < room and start + width < left:
            total += rest[start + width] - rest[start]
            start += 1
        # take whole experts from `start` while they fit, then cut one
        used = 0
        cut = -1
        i = start
        while used < width and i < left:
            e = item[i]
            if rest[i] <= room:
                slot[g, used] = e
                share[g, used] = rest[i]
                room -= rest[i]
                used += 1
                i += 1
            else:
                if room > 1e-12 * whole:
                    slot[g, used] = e
                    share[g, used] = room
                    rest[i] -= room
                    used += 1
                    cut = i
                break
        # drop what is placed, and put the rest of the cut back in order
        n = start
        if cut >= 0:
            e = item[cut]
            amount = rest[cut]
            while n > 0 and rest[n - 1] > amount:
                n -= 1
            for k in range(start - 1, n - 1, -1):
                item[k + 1] = item[k]
                rest[k + 1] = rest[k]
            item[n] = e
            rest[n] = amount
            n = start + 1
            i = cut + 1
        while i < left:
            item[n] = item[i]
            rest[n] = rest[i]
            n += 1
            i += 1
        left = n
    return left == 0


@njit(cache=True, nogil=True, error_model="numpy")
def _window(orders, seconds, load, base, speed, most, cap, slot, share, placed):  # type: ignore[no-untyped-def]
    for layer in range(load.shape[0]):
        for n in range(orders.shape[0]):
            if _pour(
                orders[n],
                seconds[layer],
                load[layer],
                base[layer],
                speed,
                most,
                cap,
                slot[layer],
                share[layer],
            ):
                placed[layer] = True
                break
        for g in range(cap.size):
            for k in range(cap[g]):
                e = slot[layer, g, k]
                if e < load.shape[1]:
                    w = load[layer, e]
                    share[layer, g, k] = share[layer, g, k] / w if w > 0 else 1.0


def window(problem: Problem, seconds: FloatArray) -> tuple[IntArray, FloatArray, BoolArray]:
    """Pour each layer's mean tokens over the ranks so that all end by `seconds` [layers].

    Returns
    -------
    slots : array [layers, slots], expert in each slot or EMPTY
    split : array [layers, slots], share of the expert's tokens
    placed : array of bool [layers], whether all experts found a place; price it to know
        whether the last rank ends by `seconds`
    """
    load, base = map(np.array, problem.mean_load)
    speed, rank_slots = np.array(problem.cluster.speeds), problem.cluster.slots
    cap = np.minimum(rank_slots, problem.experts)
    slot = np.empty((*base.shape, int(cap.max())), dtype=np.int64)
    share = np.empty(slot.shape)
    placed = np.zeros(problem.layers, dtype=np.bool_)
    most = np.array(ceiling(problem))
    _window(_orders(speed), seconds, load, base, speed, most, cap, slot, share, placed)
    slots = to_slots(np.where(slot == problem.experts, EMPTY, slot), rank_slots)
    return slots, to_slots(share, rank_slots, fill=0.0), placed


def pour_layer(
    load: FloatArray, base: FloatArray, speed: FloatArray, cap: IntArray
) -> tuple[IntArray, FloatArray] | None:
    """Pour one layer's `load` [experts] so that all ranks end at once; None if that fails.

    Returns slots and shares [ranks, most slots], as positions in `load` (its size for none).
    """
    seconds = np.atleast_1d((load.sum() + base.sum()) / speed.sum()) * (1 + 2e-12)
    slot = np.empty((1, cap.size, int(cap.max())), dtype=np.int64)
    share = np.empty(slot.shape)
    placed = np.zeros(1, dtype=np.bool_)
    most = np.full(speed.size, np.inf)
    _window(_orders(speed), seconds, load[None], base[None], speed, most, cap, slot, share, placed)
    return (slot[0], share[0]) if placed[0] else None


def _orders(speed: FloatArray) -> IntArray:
    """Rank orders to try: fastest first, slowest first, alternating."""
    fast = np.argsort(-speed, kind="stable")
    mixed = np.empty_like(fast)
    half = (fast.size + 1) // 2
    mixed[0::2], mixed[1::2] = fast[:half], fast[half:][::-1]
    return np.stack([fast, fast[::-1], mixed])
