"""The placements that engines start with: they do not look at loads."""

from math import gcd

import numpy as np

from moeplace._check import IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import EMPTY
from moeplace.policies._layout import require_slots, starts


def contiguous(layers: int, experts: int, rank_slots: IntArray) -> IntArray:
    """Place expert p mod E in slot p, as vLLM and SGLang do before the first rebalancing.

    Parameters
    ----------
    layers, experts : int
    rank_slots : [ranks]
        Slots of each rank; may differ.

    Returns
    -------
    slots : [layers, slots]
        The same in every layer. A rank with more slots than experts leaves the rest empty.

    Raises
    ------
    PolicyNotApplicable
        If there are fewer slots than experts.
    """
    total = int(rank_slots.sum())
    require_slots("contiguous", experts, total)
    slot = np.arange(total, dtype=np.int64)
    within = slot - np.repeat(starts(rank_slots), rank_slots)
    row = np.where(within < experts, slot % experts, EMPTY)
    return np.tile(row, (layers, 1))


def round_robin(layers: int, experts: int, rank_slots: IntArray) -> IntArray:
    """Place expert e on rank e mod G, and go on round robin with redundant copies.

    Copy i is one of expert i mod E, on rank i mod G. A copy that its rank already holds is left
    out and its slot stays empty: if G divides E, that is every redundant copy.

    Parameters
    ----------
    layers, experts : int
    rank_slots : [ranks]
        Slots of each rank; all equal.

    Returns
    -------
    slots : [layers, slots]
        The same in every layer.

    Raises
    ------
    PolicyNotApplicable
        If ranks have unequal slots, or there are fewer slots than experts.
    """
    ranks, total = rank_slots.size, int(rank_slots.sum())
    if rank_slots.min() != rank_slots.max():
        raise PolicyNotApplicable(
            "round_robin needs equal slots on every rank: got "
            f"{rank_slots.min()} to {rank_slots.max()}. Use contiguous."
        )
    require_slots("round_robin", experts, total)
    copy = np.arange(total, dtype=np.int64).reshape(-1, ranks)  # [slots of a rank, ranks]
    # A rank meets the same expert again after lcm(E, G) copies: E / gcd(E, G) of its slots.
    copy[experts // gcd(experts, ranks) :] = EMPTY
    row = np.where(copy == EMPTY, EMPTY, copy % experts).T.ravel()
    return np.tile(row, (layers, 1))
