"""ViBE, variability-informed binning of experts (Go et al. 2026, arXiv 2606.00735).

One copy of each expert. Latency is predicted linear in tokens: tokens / speed.
"""

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import EMPTY
from moeplace.policies._layout import lay_out, require_slots, spread, starts


def vibe_assignment(loads: FloatArray, speeds: FloatArray) -> IntArray:
    """Give each expert a rank by Algorithm 1 as printed, which sets no limit to a rank's experts.

    Experts go by falling load, each to the rank farthest below its target, the tokens that
    match its part of the total speed.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    speeds : [ranks]
        Tokens per second, or relative.

    Returns
    -------
    rank : [layers, experts]
        May need more slots than a rank has.
    """
    room = np.full(speeds.size, loads.shape[1], dtype=np.int64)
    return spread(loads, room, _targets(loads, speeds))[0]


def vibe_initial(loads: FloatArray, speeds: FloatArray, rank_slots: IntArray) -> IntArray:
    """Place experts by Algorithm 1, only on ranks with a free slot.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    speeds : [ranks]
        Tokens per second, or relative.
    rank_slots : [ranks]
        Slots of each rank; may differ.

    Returns
    -------
    slots : [layers, slots]
        One slot for each expert; redundant slots stay empty.

    Raises
    ------
    PolicyNotApplicable
        If there are fewer slots than experts.
    """
    require_slots("ViBE", loads.shape[1], int(rank_slots.sum()))
    rank, place = spread(loads, rank_slots, _targets(loads, speeds))
    return lay_out(rank, place, rank_slots)


def vibe_update(
    slots: IntArray,
    loads: FloatArray,
    speeds: FloatArray,
    rank_slots: IntArray,
    tolerance: float = 0.03,
    max_swaps: int | None = None,
) -> tuple[IntArray, IntArray]:
    """Adapt a placement to new loads by swaps of two experts (Algorithm 2).

    Each swap is between the ranks of highest and of lowest latency, the one after which the
    later of the two ends first. A layer is done when its highest latency is at most
    1 + `tolerance` times the mean, or no swap lowers the later end.

    Parameters
    ----------
    slots : [layers, slots]
        One slot for each expert, others empty.
    loads : [layers, experts]
        Tokens.
    speeds, rank_slots : [ranks]
    tolerance : float
        Relative to the mean latency over ranks.
    max_swaps : int, optional
        Swaps allowed in a layer.

    Returns
    -------
    slots : [layers, slots]
        A new array; a swap exchanges the contents of two slots, all others stay.
    swaps : [layers]
        How many swaps were made.

    Raises
    ------
    PolicyNotApplicable
        If an expert has several copies.
    """
    _require_single(slots)
    swaps = np.zeros(len(slots), dtype=np.int64)
    slots = np.pad(slots, ((0, 0), (0, 1)), constant_values=EMPTY)
    weight = np.pad(loads, ((0, 0), (0, 1)))  # EMPTY is -1: the last column, no load
    slots_of = _slots_of(rank_slots)
    latency = _tokens(weight, slots[:, slots_of]) / speeds
    occupied = (slots[:, slots_of] != EMPTY).any(axis=2)
    layer = np.arange(len(slots))
    while True:
        late = latency[layer]
        layer = layer[
            (late.max(axis=1) > (1.0 + tolerance) * late.mean(axis=1))
            & (swaps[layer] < (np.inf if max_swaps is None else max_swaps))
        ]
        if not layer.size:
            return slots[:, :-1].copy(), swaps
        high = latency[layer].argmax(axis=1)
        low = np.where(occupied[layer], latency[layer], np.inf).argmin(axis=1)
        pair = np.stack([high, low], axis=1)
        gain, out, back = _best_swap(
            slots[layer[:, None, None], slots_of[pair]],
            weight[layer],
            latency[layer[:, None], pair],
            speeds[pair],
        )
        layer, high, low = layer[gain], high[gain], low[gain]
        a, b = slots_of[high, out[gain]], slots_of[low, back[gain]]
        slots[layer, a], slots[layer, b] = slots[layer, b], slots[layer, a]
        swaps[layer] += 1
        for rank in (high, low):
            held = slots[layer[:, None], slots_of[rank]]
            latency[layer, rank] = _tokens(weight[layer], held) / speeds[rank]


def _best_swap(
    held: IntArray, weight: FloatArray, latency: FloatArray, speeds: FloatArray
) -> tuple[BoolArray, IntArray, IntArray]:
    """Find the swap between two ranks after which the later of them ends first.

    Parameters
    ----------
    held : [layers, 2, slots of a rank]
        Experts of the later and of the earlier rank.
    weight : [layers, experts + 1]
    latency, speeds : [layers, 2]

    Returns
    -------
    gain : [layers], bool
        Whether it ends before the later rank did.
    out, back : [layers]
        Position of the expert on the later and on the earlier rank.
    """
    tokens = weight[np.arange(len(held))[:, None, None], held]
    moved = tokens[:, 0, :, None] - tokens[:, 1, None, :]
    before, speed = latency[:, :, None, None], speeds[:, :, None, None]
    after = np.maximum(
        before[:, 0] - moved / speed[:, 0],
        before[:, 1] + moved / speed[:, 1],
    )
    filled = held != EMPTY
    after[~(filled[:, 0, :, None] & filled[:, 1, None, :])] = np.inf
    flat = after.reshape(len(held), -1)
    best = flat.argmin(axis=1)
    # Beyond rounding, lest swaps go round in circles.
    gain = flat[np.arange(len(held)), best] < latency[:, 0] * (1.0 - 1e-12)
    return gain, best // held.shape[2], best % held.shape[2]


def _tokens(weight: FloatArray, held: IntArray) -> FloatArray:
    """Sum over the last axis of the load of the experts `held` ``[layers, ..., slots]``."""
    layer = np.arange(len(held)).reshape(-1, *[1] * (held.ndim - 1))
    # Indexing leaves the memory layout open, and with it the order in which sums are rounded.
    total: FloatArray = np.ascontiguousarray(weight[layer, held]).sum(axis=-1)
    return total


def _targets(loads: FloatArray, speeds: FloatArray) -> FloatArray:
    """Tokens ``[layers, ranks]`` that match each rank's part of the total speed."""
    total = np.ascontiguousarray(loads).sum(axis=1, keepdims=True)
    targets: FloatArray = total * (speeds / speeds.sum())
    return targets


def _slots_of(rank_slots: IntArray) -> IntArray:
    """Slots of each rank ``[ranks, most slots]``, padded with -1."""
    place = np.arange(int(rank_slots.max()))
    return np.where(place < rank_slots[:, None], starts(rank_slots)[:, None] + place, -1)


def _require_single(slots: IntArray) -> None:
    """Raise `PolicyNotApplicable` if a layer holds an expert twice."""
    ordered = np.sort(slots, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)
    if again.any():
        layer, i = np.argwhere(again)[0]
        raise PolicyNotApplicable(
            f"ViBE swaps experts with one copy: got several of expert {ordered[layer, i]} in "
            f"layer {layer}. Start from vibe_initial."
        )
