"""The hottest experts on every rank: tokens of those never leave their rank."""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import EMPTY
from moeplace.policies._layout import descending, spread, starts


def top_k(loads: FloatArray, rank_slots: IntArray, k: int) -> IntArray:
    """Replicate the `k` hottest experts of each layer on every rank, the others not at all.

    The others are spread by falling load, each to the rank with room and the fewest tokens.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    rank_slots : [ranks]
        Slots of each rank; may differ.
    k : int
        Experts of each layer that every rank holds, 0 to all.

    Returns
    -------
    slots : [layers, slots]
        On each rank the hottest experts, hottest first, then others, then empty slots.

    Raises
    ------
    PolicyNotApplicable
        If `k` is negative or above the experts, a rank has fewer than `k` slots, or what is
        left is too few for the other experts.
    """
    layers, experts = loads.shape
    room = rank_slots - k
    _require_fit(experts, room, k)
    order = descending(loads)
    hot, others = order[:, :k], order[:, k:]
    # Each rank has the same share of the hot experts, so that only the others decide.
    rank, place = spread(np.take_along_axis(loads, others, axis=1), room, np.zeros(room.size))
    slots = np.full((layers, int(rank_slots.sum())), EMPTY, dtype=np.int64)
    first = starts(rank_slots)
    slots[:, first[:, None] + np.arange(k)] = hot[:, None, :]
    slots[np.arange(layers)[:, None], first[rank] + k + place] = others
    return slots


def _require_fit(experts: int, room: IntArray, k: int) -> None:
    if not 0 <= k <= experts:
        raise PolicyNotApplicable(
            f"top_k puts 0 to {experts} experts (all) on every rank: got k = {k}. "
            "Choose k in that range."
        )
    if room.min() < 0:
        rank = int(room.argmin())
        raise PolicyNotApplicable(
            f"top_k needs k slots on every rank: got {room[rank] + k} slots on rank {rank} for "
            f"k = {k}. Choose a smaller k."
        )
    if room.sum() < experts - k:
        raise PolicyNotApplicable(
            f"top_k needs a slot for each expert that is not on every rank: got {room.sum()} "
            f"slots beside the k = {k} hottest for {experts - k} experts. Choose a smaller k or "
            "give more slots."
        )
