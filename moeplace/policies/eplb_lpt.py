"""EPLB's replica counts with a placement that knows speeds: the fair rival at unequal speeds.

Longest processing time first (Graham 1969; on uniform machines Gonzalez, Ibarra and Sahni 1977).
"""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY
from moeplace.policies._layout import descending, require_slots, starts
from moeplace.policies.eplb import replicate


def eplb_lpt(loads: FloatArray, speeds: FloatArray, rank_slots: IntArray | int) -> IntArray:
    """Replicate as EPLB does, then place each copy where it would end first.

    Copies go by falling load, each to the rank with room and without a copy of the expert
    where (tokens + load) / speed is least. No expert gets more copies than there are ranks.
    When only ranks that hold the expert have room, a full rank hands one of its experts to one
    of them; if none can (unequal slots only), the copy is given up.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    speeds : [ranks]
        Tokens per second, or relative.
    rank_slots : [ranks] or int
        Slots of each rank; may differ.

    Returns
    -------
    slots : [layers, slots]
        No rank holds an expert twice. Slots beyond the experts, and those of copies given up,
        stay empty.

    Raises
    ------
    PolicyNotApplicable
        If there are fewer slots than experts.
    """
    experts = loads.shape[1]
    rank_slots = np.broadcast_to(np.asarray(rank_slots, dtype=np.int64), speeds.shape)
    require_slots("EPLB + LPT", experts, int(rank_slots.sum()))
    room = np.minimum(rank_slots, experts)
    phy2log, _, counts = replicate(loads, int(room.sum()), most=int(np.count_nonzero(room)))
    order = descending(np.take_along_axis(loads / counts, phy2log, axis=1))
    state = _State(loads, speeds, rank_slots, counts)
    for expert in np.take_along_axis(phy2log, order, axis=1).T:
        state.place(expert)
    return state.slots


class _State:
    """What has been placed so far, for all layers.

    Attributes
    ----------
    slots : [layers, slots]
        Filled from each rank's first slot on.
    used : [layers, ranks]
        Slots filled.
    tokens : [layers, ranks]
    held : [layers, experts, ranks]
    counts : [layers, experts]
        Copies of each expert, placed or to come.
    """

    def __init__(
        self, loads: FloatArray, speeds: FloatArray, rank_slots: IntArray, counts: IntArray
    ) -> None:
        layers, experts = loads.shape
        self.loads, self.speeds, self.counts = loads, speeds, counts
        self.room = np.minimum(rank_slots, experts)
        self.start = starts(rank_slots)
        self.rank_of = np.repeat(np.arange(rank_slots.size), rank_slots)
        self.slots = np.full((layers, int(rank_slots.sum())), EMPTY, dtype=np.int64)
        self.used = np.zeros((layers, speeds.size), dtype=np.int64)
        self.tokens = np.zeros((layers, speeds.size))
        self.held = np.zeros((layers, experts, speeds.size), dtype=np.bool_)

    def place(self, expert: IntArray) -> None:
        """Place one copy of `expert` ``[layers]`` in each layer."""
        layer = np.arange(expert.size)
        share = self.loads[layer, expert] / self.counts[layer, expert]
        legal = (self.used < self.room) & ~self.held[layer, expert]
        end = np.where(legal, (self.tokens + share[:, None]) / self.speeds, np.inf)
        rank = end.argmin(axis=1)
        stuck = ~legal.any(axis=1)
        if stuck.any():
            for i in np.flatnonzero(stuck):
                rank[i] = self._hand_over(int(i), int(expert[i]))
            layer = np.flatnonzero(rank >= 0)
            expert, rank, share = expert[layer], rank[layer], share[layer]
        self.slots[layer, self.start[rank] + self.used[layer, rank]] = expert
        self.used[layer, rank] += 1
        self.tokens[layer, rank] += share
        self.held[layer, expert, rank] = True

    def _hand_over(self, layer: int, expert: int) -> int:
        """Make room for a copy of `expert` on a full rank that lacks it, and return that rank.

        Of all moves of an expert from such a rank to one with room, take that after which the
        later of the two ends first. Without one, give the copy up and return -1.
        """
        held, tokens = self.held[layer], self.tokens[layer]
        share = self.loads[layer] / self.counts[layer]
        slot = np.flatnonzero(~held[expert, self.rank_of])
        item, giver = self.slots[layer, slot], self.rank_of[slot]
        taker = np.flatnonzero(self.used[layer] < self.room)
        kept = (tokens[giver] - share[item] + share[expert]) / self.speeds[giver]
        passed = (tokens[taker] + share[item, None]) / self.speeds[taker]
        end = np.where(held[item][:, taker], np.inf, np.maximum(kept[:, None], passed))
        if not np.isfinite(end).any():
            self._give_up(layer, expert)
            return -1
        i, j = divmod(int(end.argmin()), taker.size)
        self._move(layer, int(slot[i]), int(giver[i]), int(taker[j]))
        return int(giver[i])

    def _move(self, layer: int, slot: int, giver: int, taker: int) -> None:
        """Move the expert in `slot` of rank `giver` to rank `taker`; close the gap it leaves."""
        row, used = self.slots[layer], self.used[layer]
        expert = row[slot]
        last = self.start[giver] + used[giver] - 1
        row[slot] = row[last]
        row[last] = EMPTY
        row[self.start[taker] + used[taker]] = expert
        used[giver] -= 1
        used[taker] += 1
        share = self.loads[layer, expert] / self.counts[layer, expert]
        self.tokens[layer, giver] -= share
        self.tokens[layer, taker] += share
        self.held[layer, expert, giver] = False
        self.held[layer, expert, taker] = True

    def _give_up(self, layer: int, expert: int) -> None:
        """Take one copy off the count of `expert`; the copies already placed carry its load."""
        load, count = self.loads[layer, expert], self.counts[layer, expert]
        self.counts[layer, expert] -= 1
        self.tokens[layer, self.held[layer, expert]] += load / (count - 1) - load / count
