"""The planner without compiled code: where kernels are not in the cache.

EPLB's counts and speed-aware LPT, then exchanges of one slot out of the slowest rank, for all
layers at once in NumPy. As good as the published balancers or better, not as the kernels.
"""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.integrations.tables import held
from moeplace.plan import EMPTY
from moeplace.policies.eplb_lpt import eplb_lpt

#: Most exchanges in a layer.
ROUNDS = 400


def fresh(loads: FloatArray, speeds: FloatArray, slots_per_rank: int, goal: FloatArray) -> IntArray:
    """Plan from nothing -> slots [layers, slots]; `goal` [layers] is where a layer ends."""
    return exchanged(eplb_lpt(loads, speeds, slots_per_rank), loads, speeds, goal)


def exchanged(
    slots: IntArray, loads: FloatArray, speeds: FloatArray, goal: FloatArray, rounds: int = ROUNDS
) -> IntArray:
    """Exchange slots of the slowest rank while that helps; no rank may hold an expert twice."""
    layers, experts = loads.shape
    ranks = speeds.size
    table = np.where(slots == EMPTY, experts, slots).reshape(layers, ranks, -1)
    on = np.zeros((layers, ranks, experts + 1), dtype=np.bool_)
    on[:, :, :experts] = held(slots, ranks, experts)
    counts = on.sum(axis=1)
    share = np.zeros((layers, experts + 1))
    share[:, :experts] = loads / np.maximum(counts[:, :experts], 1)
    value = np.take_along_axis(share[:, None, :], table, axis=2)
    tokens = value.sum(axis=2)
    active = np.arange(layers)
    for _ in range(rounds):
        times = tokens[active] / speeds
        slow, top = times.argmax(axis=1), times.max(axis=1)
        keep = top > goal[active]
        active, slow, top = active[keep], slow[keep], top[keep]
        if active.size == 0:
            break
        each = np.arange(active.size)
        mine, theirs = value[active, slow], value[active]  # [n, K], [n, G, K]
        moved = mine[:, :, None, None] - theirs[:, None]  # [n, K, G, K]
        end = np.maximum(
            (tokens[active, slow][:, None, None, None] - moved) / speeds[slow][:, None, None, None],
            (tokens[active][:, None, :, None] + moved) / speeds[None, None, :, None],
        )
        # [n, K, G]: the other rank holds mine already; [n, G, K]: I hold theirs already
        bars = np.take_along_axis(
            on[active].transpose(0, 2, 1), table[active, slow][:, :, None], axis=1
        )
        bars[table[active, slow] == experts] = True  # a free slot is not given away
        bars[each, :, slow] = True
        mine_on = on[active, slow]
        barred = np.take_along_axis(mine_on[:, None, :], table[active], axis=2)
        end = np.where(bars[:, :, :, None] | barred[:, None], np.inf, end)
        best = end.reshape(active.size, -1).argmin(axis=1)
        least = end.reshape(active.size, -1)[each, best]
        better = least < top * (1 - 1e-12)
        active, slow, best = active[better], slow[better], best[better]
        if active.size == 0:
            break
        i, other, j = np.unravel_index(best, end.shape[1:])
        a, b = table[active, slow, i], table[active, other, j]
        table[active, slow, i], table[active, other, j] = b, a
        on[active, slow, a], on[active, other, b] = False, False
        on[active, slow, b], on[active, other, a] = True, True
        on[:, :, experts] = False
        for rank in (slow, other):
            value[active, rank] = share[active[:, None], table[active, rank]]
            tokens[active, rank] = value[active, rank].sum(axis=1)
    return np.asarray(np.where(table == experts, EMPTY, table).reshape(slots.shape))
