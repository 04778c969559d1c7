"""Maps of slots as engines hold them: which are usable, what they cost to change, what is free.

All arrays are [layers, slots] with slot p on rank p // (slots / ranks), or the same as
[layers, ranks, slots per rank]; EMPTY (-1) for no expert.
"""

from typing import Any

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.plan import EMPTY


def held(slots: IntArray, ranks: int, experts: int) -> BoolArray:
    """Which experts each rank holds [layers, ranks, experts]."""
    table = np.zeros((slots.shape[0], ranks, experts + 1), dtype=np.bool_)
    by_rank = slots.reshape(slots.shape[0], ranks, -1)
    np.put_along_axis(table, np.where(by_rank == EMPTY, experts, by_rank), True, axis=2)
    return table[:, :, :experts]


def received(new: IntArray, old: IntArray, ranks: int, experts: int) -> IntArray:
    """Copies [layers] that ranks must receive to get from `old` to `new`."""
    fresh = held(new, ranks, experts) & ~held(old, ranks, experts)
    return np.asarray(fresh.sum(axis=(1, 2)))


def serves(slots: Any, layers: int, width: int, experts: int) -> bool:
    """Whether a map [layers, width] gives every slot an expert and every expert a slot."""
    if slots is None or slots.shape != (layers, width) or slots.dtype.kind not in "iu":
        return False
    if slots.size == 0 or slots.min() < 0 or slots.max() >= experts:
        return False
    there = np.zeros((layers, experts), dtype=np.bool_)
    np.put_along_axis(there, slots.astype(np.int64), True, axis=1)
    return bool(there.all())


def duplicates(slots: IntArray, ranks: int) -> BoolArray:
    """Slots [layers, slots] whose expert an earlier slot of the same rank holds."""
    by_rank = slots.reshape(slots.shape[0], ranks, -1)
    again = np.zeros(by_rank.shape, dtype=np.bool_)
    for k in range(1, by_rank.shape[2]):
        again[:, :, k] = (by_rank[:, :, :k] == by_rank[:, :, k : k + 1]).any(axis=2)
    return np.asarray((again & (by_rank != EMPTY)).reshape(slots.shape))


def aligned(new: IntArray, old: IntArray, ranks: int, experts: int) -> IntArray:
    """Reorder each rank's slots so that an expert that stays keeps its slot: it is not copied."""
    shape = (new.shape[0], ranks, -1)
    before, after = old.reshape(shape), new.reshape(shape)
    first = np.where(duplicates(old, ranks).reshape(before.shape), EMPTY, before)
    stays = held(new, ranks, experts)
    kept = np.take_along_axis(stays, np.maximum(first, 0), axis=2) & (first != EMPTY)
    was = held(np.where(kept, first, EMPTY).reshape(old.shape), ranks, experts)
    came = ~np.take_along_axis(was, np.maximum(after, 0), axis=2) | (after == EMPTY)
    # what came goes, in its order, to the slots that are left, in theirs
    source = np.argsort(~came, axis=2, kind="stable")
    target = np.argsort(kept, axis=2, kind="stable")
    result = np.empty_like(after)
    np.put_along_axis(result, target, np.take_along_axis(after, source, axis=2), axis=2)
    result = np.where(kept, first, result)
    return np.asarray(result.reshape(new.shape))


def repaired(slots: IntArray, loads: FloatArray, ranks: int) -> IntArray:
    """Give every expert without a slot one: a free slot, or that of a replica missed least.

    Raises
    ------
    ValueError
        If there are fewer slots than experts.
    """
    experts = loads.shape[1]
    if slots.shape[1] < experts:
        raise ValueError(f"{slots.shape[1]} slots are too few for {experts} experts")
    slots = np.where(duplicates(slots, ranks), EMPTY, slots)
    size = slots.shape[1] // ranks
    rank = np.arange(slots.shape[1]) // size
    counts = _counts(slots, experts)
    for layer in np.flatnonzero((counts == 0).any(axis=1)):
        row, count, load = slots[layer], counts[layer], loads[layer]
        missing = np.flatnonzero(count == 0)
        for expert in missing[np.argsort(-load[missing], kind="stable")]:
            share = np.append(load / np.maximum(count, 1), 0.0)
            tokens = np.bincount(rank, weights=share[row], minlength=ranks)
            # what the ranks would carry without the copy that goes; free slots lose nothing
            extra = np.append(count[:], 0) > 1
            fit = (row == EMPTY) | extra[row]
            harm = np.where(row == EMPTY, 0.0, np.append(load / np.maximum(count - 1, 1), 0)[row])
            at = int(np.where(fit, harm + tokens[rank] - share[row], np.inf).argmin())
            if row[at] != EMPTY:
                count[row[at]] -= 1
            row[at] = expert
            count[expert] = 1
    return slots


def filled(
    slots: IntArray, loads: FloatArray, ranks: int, allowed: BoolArray | None = None
) -> IntArray:
    """Put a further replica in every free slot, of the expert that adds least to the rank.

    Engines have no free slots. `allowed` [layers, ranks, experts] limits the choice.

    Raises
    ------
    ValueError
        If a rank has more slots than experts that it may hold.
    """
    if (slots != EMPTY).all():
        return slots
    slots = slots.copy()
    experts = loads.shape[1]
    size = slots.shape[1] // ranks
    counts = _counts(slots, experts)
    there = held(slots, ranks, experts)
    for layer, slot in np.argwhere(slots == EMPTY):
        rank = slot // size
        free = ~there[layer, rank]
        if allowed is not None:
            free &= allowed[layer, rank]
        if not free.any():
            raise ValueError(f"rank {rank} has more slots ({size}) than experts that it may hold")
        added = np.where(free, loads[layer] / (counts[layer] + 1), np.inf)
        # at equal load the expert with fewest copies, so that no expert is left with one
        best = np.flatnonzero(added == added.min())
        expert = best[counts[layer, best].argmin()]
        slots[layer, slot] = expert
        counts[layer, expert] += 1
        there[layer, rank, expert] = True
    return slots


def spread(slots: IntArray, loads: FloatArray, speeds: FloatArray) -> IntArray:
    """Fill free slots, the least busy rank's first, so that ranks come to their fair loads.

    For ranks that are new: nothing else moves. A slot stays free where its rank holds all experts.
    """
    layers, experts = loads.shape
    ranks = speeds.size
    slots = slots.copy()
    by_rank = slots.reshape(layers, ranks, -1)
    on = held(slots, ranks, experts)
    counts = on.sum(axis=1)
    share = loads / np.maximum(counts, 1)
    tokens = (on * share[:, None]).sum(axis=2)
    for _ in range(int((slots == EMPTY).sum(axis=1).max(initial=0))):
        free = by_rank == EMPTY
        room = free.any(axis=2) & ~on.all(axis=2)
        layer = np.flatnonzero(room.any(axis=1))
        if layer.size == 0:
            break
        each = np.arange(layer.size)
        times = tokens[layer] / speeds
        to = np.where(room[layer], times, np.inf).argmin(axis=1)
        slow = times.argmax(axis=1)
        # a copy of what brings the rank to its fair load, rather of the slowest rank's experts
        after = loads[layer] / (counts[layer] + 1)
        fair = loads[layer].sum(axis=1) / speeds.sum() * speeds[to] - tokens[layer, to]
        ideal = np.maximum(fair, 0.0) / free[layer, to].sum(axis=1)
        miss = np.abs(after - ideal[:, None]) + 0.5 * ideal[:, None] * ~on[layer, slow]
        expert = np.where(on[layer, to], np.inf, miss).argmin(axis=1)
        after = loads[layer, expert] / (counts[layer, expert] + 1)
        tokens[layer] -= on[layer, :, expert] * (share[layer, expert] - after)[:, None]
        tokens[layer, to] += after
        counts[layer, expert] += 1
        share[layer, expert] = after
        on[layer, to, expert] = True
        by_rank[layer, to, free[layer][each, to].argmax(axis=1)] = expert
    return slots


def _counts(slots: IntArray, experts: int) -> IntArray:
    counts = np.zeros((slots.shape[0], experts + 1), dtype=np.int64)
    layer = np.broadcast_to(np.arange(slots.shape[0])[:, None], slots.shape)
    np.add.at(counts, (layer, slots), 1)  # EMPTY counts in the last column
    return counts[:, :experts]


def seconds(slots: IntArray, loads: FloatArray, speeds: FloatArray) -> FloatArray:
    """Makespan [layers] under even routing, duplicates and free slots priced as they stand."""
    counts = _counts(slots, loads.shape[1])
    share = np.zeros((loads.shape[0], loads.shape[1] + 1))
    share[:, :-1] = loads / np.maximum(counts, 1)
    each = np.take_along_axis(share, slots, axis=1)  # EMPTY is the last column
    tokens = each.reshape(loads.shape[0], speeds.size, -1).sum(axis=2)
    return np.asarray((tokens / speeds).max(axis=1))
