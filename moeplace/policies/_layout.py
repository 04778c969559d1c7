"""What the policies share: the order, the greedy loop and the layout of slots."""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import EMPTY


def descending(weights: FloatArray) -> IntArray:
    """Order of each layer's items ``[layers, items]`` by falling weight, first on ties."""
    return np.argsort(-weights, axis=1, kind="stable")


def starts(rank_slots: IntArray) -> IntArray:
    """First slot of each rank ``[ranks]``."""
    return np.cumsum(rank_slots) - rank_slots


def require_slots(policy: str, experts: int, slots: int) -> None:
    """Raise `PolicyNotApplicable` unless every expert can have a slot."""
    if slots < experts:
        raise PolicyNotApplicable(
            f"{policy} needs at least one slot for each expert: got {slots} slots for "
            f"{experts} experts. Give {experts - slots} more slots."
        )


def spread(weights: FloatArray, room: IntArray, target: FloatArray) -> tuple[IntArray, IntArray]:
    """Give each item, heaviest first, to the rank with room that is farthest below its target.

    Parameters
    ----------
    weights : [layers, items]
    room : [ranks]
        Items that a rank can take; in all at least the number of items.
    target : [ranks] or [layers, ranks]
        In the unit of the weights. With equal targets the lightest rank is taken.

    Returns
    -------
    rank, place : [layers, items]
        The rank of each item and its position there, in the order of arrival. First rank and
        first item on ties.
    """
    layers, items = weights.shape
    each = np.arange(layers)
    load = np.zeros((layers, room.size))
    used = np.zeros((layers, room.size), dtype=np.int64)
    closed = np.where(room > used, 0.0, np.inf)
    rank = np.empty((layers, items), dtype=np.int64)
    place = np.empty_like(rank)
    for item in descending(weights).T:
        taken = (target - load - closed).argmax(axis=1)
        rank[each, item] = taken
        place[each, item] = used[each, taken]
        load[each, taken] += weights[each, item]
        used[each, taken] += 1
        closed[each, taken] = np.where(used[each, taken] < room[taken], 0.0, np.inf)
    return rank, place


def lay_out(rank: IntArray, place: IntArray, rank_slots: IntArray) -> IntArray:
    """Slots ``[layers, slots]`` from the rank and place of each expert ``[layers, experts]``."""
    layers, experts = rank.shape
    slots = np.full((layers, int(rank_slots.sum())), EMPTY, dtype=np.int64)
    slots[np.arange(layers)[:, None], starts(rank_slots)[rank] + place] = np.arange(experts)
    return slots
