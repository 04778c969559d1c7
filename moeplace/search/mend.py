"""Mend a current plan that breaks pins, forbids, groups on nodes or limits of replicas.

With few moves: copies that are given up are none.

Plain Python: few layers break a rule, e.g. when a rank is drained by forbids.
"""

import numpy as np
import numpy.typing as npt

from moeplace._check import FloatArray, IntArray
from moeplace.search.state import BARRED, PINNED


def mend(
    slot: IntArray,
    on: npt.NDArray[np.uint8],
    busy: FloatArray,
    cap: IntArray,
    load: FloatArray,
    most: IntArray,
    free: int,
) -> bool:
    """Change `slot` [ranks, most slots] of one layer until its rules hold.

    Parameters
    ----------
    slot : array [ranks, most slots]
        Experts, E for a free slot; changed in place.
    on : array of bits [ranks, experts + 1]
    busy : array [ranks]
        Time of each rank: less busy ranks receive first.
    cap : array [ranks]
    load : array [experts + 1]
        Tokens: where too many replicas are held, those are given up that others miss least.
    most : array [experts + 1]
        Replicas that each expert may have.
    free : int
        Slots that must stay free.

    Returns
    -------
    bool
        Whether every rule holds now.
    """
    empty = on.shape[1] - 1
    ranks = [int(g) for g in np.argsort(busy, kind="stable") if cap[g] > 0]
    barred, pinned = (on & BARRED) > 0, (on & PINNED) > 0

    def held(g: int, e: int) -> bool:
        return bool((slot[g, : cap[g]] == e).any())

    def spare(g: int) -> int:
        """A slot of rank g that is free or holds a copy that can be given up; -1 if none."""
        row = slot[g, : cap[g]]
        free = np.flatnonzero(row == empty)
        if free.size:
            return int(free[0])
        for k in range(int(cap[g])):
            if np.count_nonzero(slot == row[k]) > 1 and not pinned[g, row[k]]:
                return k
        return -1

    def place(e: int, start: int, kept: int = -1) -> bool:
        """Give expert e a rank; `start`'s slot `kept` takes what must make way."""
        for g in ranks:
            if not barred[g, e] and not held(g, e) and (k := spare(g)) >= 0:
                slot[g, k] = e
                return True
        for g in ranks:
            if barred[g, e] or held(g, e) or kept < 0:
                continue
            for k in range(cap[g]):
                other = int(slot[g, k])
                if not (barred[start, other] or pinned[g, other] or held(start, other)):
                    slot[g, k], slot[start, kept] = e, other
                    return True
        return False

    for g in range(slot.shape[0]):
        for k in range(cap[g]):
            e = int(slot[g, k])
            if e == empty or not barred[g, e]:
                continue
            slot[g, k] = empty
            if not (slot == e).any() and not place(e, g, k):
                return False
    for g, e in np.argwhere(pinned):
        if held(g, e):
            continue
        k = spare(g)
        if k < 0:  # one that is not pinned makes way
            movable = [k for k in range(cap[g]) if not pinned[g, slot[g, k]]]
            if not movable:
                return False
            k = movable[0]
            away = int(slot[g, k])
            slot[g, k] = e
            if not place(away, int(g)):
                return False
        else:
            slot[g, k] = e

    def give_up(e: int) -> bool:
        """Give up the replica of expert e on its busiest rank that may lose it."""
        for g in reversed(ranks):
            if held(g, e) and not pinned[g, e]:
                slot[g, : cap[g]][slot[g, : cap[g]] == e] = empty
                return True
        return False

    used = np.arange(slot.shape[1]) < cap[:, None]
    copies = np.bincount(slot[used], minlength=empty + 1)
    for e in range(empty):
        for _ in range(int(copies[e] - most[e])):
            if not give_up(e):
                return False
            copies[e] -= 1
            copies[empty] += 1
    pins = pinned.sum(axis=0)
    while copies[empty] < free:
        after = np.where(copies > np.maximum(pins, 1), load / np.maximum(copies - 1, 1), np.inf)
        e = int(after[:empty].argmin())
        if not (np.isfinite(after[e]) and give_up(e)):
            return False
        copies[e] -= 1
        copies[empty] += 1
    return True
