"""DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB, eplb.py).

Vectorised over layers. The original computes in float32, this in float64: loads that are equal
only in float32 are told apart here.
"""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import EMPTY
from moeplace.policies._layout import require_slots, spread


def eplb(
    loads: FloatArray, ranks: int, slots_per_rank: int, groups: int = 1, nodes: int = 1
) -> IntArray:
    """Replicate the experts with the largest load per copy and pack the copies on ranks.

    Hierarchical: expert groups are packed on nodes, experts replicated within their node,
    copies packed on the node's ranks. One group and one node are the global policy. DeepSeek's
    entry point turns to it silently when the groups do not divide by the nodes; here that is
    an error.

    Parameters
    ----------
    loads : [layers, experts]
        Tokens.
    ranks, slots_per_rank : int
    groups, nodes : int
        Equal expert groups, in expert order, and equal nodes, in rank order.

    Returns
    -------
    slots : [layers, slots]
        As published: a rank may hold two copies of an expert (see `duplicates`).

    Raises
    ------
    PolicyNotApplicable
        If there are fewer slots than experts, or experts do not divide by groups, groups by
        nodes or ranks by nodes.
    """
    layers, experts = loads.shape
    require_slots("EPLB", experts, ranks * slots_per_rank)
    _require_even("experts", experts, "groups", groups)
    _require_even("groups", groups, "nodes", nodes)
    _require_even("ranks", ranks, "nodes", nodes)

    order = _node_order(loads, groups, nodes)
    node_loads = np.take_along_axis(loads, order, axis=1).reshape(layers * nodes, -1)
    copy_of, _, counts = replicate(node_loads, ranks // nodes * slots_per_rank)
    share = np.take_along_axis(node_loads / counts, copy_of, axis=1)
    rank, place = balanced_packing(share, ranks // nodes)
    packed = np.empty_like(copy_of)
    np.put_along_axis(packed, rank * slots_per_rank + place, copy_of, axis=1)

    first = np.arange(nodes)[:, None] * (experts // nodes)  # a node's experts in `order`
    within = packed.reshape(layers, nodes, -1) + first
    return np.take_along_axis(order, within.reshape(layers, -1), axis=1)


def balanced_packing(weights: FloatArray, packs: int) -> tuple[IntArray, IntArray]:
    """Pack items in packs of equal count: heaviest first, each to the lightest with room.

    Parameters
    ----------
    weights : [layers, items]
    packs : int

    Returns
    -------
    pack_index, rank_in_pack : [layers, items]
        The pack of each item and its position there. One item to a pack keeps its order.

    Raises
    ------
    PolicyNotApplicable
        If the items do not divide by the packs.
    """
    layers, items = weights.shape
    _require_even("items", items, "packs", packs)
    if items == packs:
        pack_index = np.tile(np.arange(items, dtype=np.int64), (layers, 1))
        return pack_index, np.zeros_like(pack_index)
    return spread(weights, np.full(packs, items // packs, dtype=np.int64), np.zeros(packs))


def replicate(
    loads: FloatArray, total: int, most: int | None = None
) -> tuple[IntArray, IntArray, IntArray]:
    """Give copies one by one to the expert with the largest load per copy, first on ties.

    Parameters
    ----------
    loads : [layers, experts]
    total : int
        Copies in all: at least the experts, at most `most` for each.
    most : int, optional
        Largest number of copies of an expert; DeepSeek sets no limit.

    Returns
    -------
    phy2log : [layers, total]
        The expert of each copy: one copy of each, then the others as they were given.
    rank : [layers, total]
        How many copies of its expert came before.
    counts : [layers, experts]
    """
    layers, experts = loads.shape
    each = np.arange(layers)
    phy2log = np.tile(np.arange(total, dtype=np.int64), (layers, 1))
    rank = np.zeros_like(phy2log)
    counts = np.ones((layers, experts), dtype=np.int64)
    share = loads.astype(np.float64)
    if most == 1:
        return phy2log, rank, counts
    for i in range(experts, total):
        expert = share.argmax(axis=1)
        phy2log[:, i] = expert
        rank[:, i] = counts[each, expert]
        counts[each, expert] += 1
        count = counts[each, expert]
        share[each, expert] = np.where(count == most, -np.inf, loads[each, expert] / count)
    return phy2log, rank, counts


def duplicates(slots: IntArray, rank_slots: IntArray) -> IntArray:
    """Count the slots ``[layers]`` that hold an expert which an earlier slot of the rank holds.

    Parameters
    ----------
    slots : [layers, slots]
    rank_slots : [ranks]
    """
    width = int(slots.max(initial=EMPTY)) + 2
    rank = np.repeat(np.arange(rank_slots.size), rank_slots)
    key = np.sort(rank * width + slots + 1, axis=1)
    again = (key[:, 1:] == key[:, :-1]) & (key[:, 1:] % width != 0)
    count: IntArray = again.sum(axis=1, dtype=np.int64)
    return count


def _node_order(loads: FloatArray, groups: int, nodes: int) -> IntArray:
    """Experts ``[layers, experts]`` by node, then group in the order of packing."""
    layers, experts = loads.shape
    size = experts // groups
    node, place = balanced_packing(loads.reshape(layers, groups, size).sum(axis=2), nodes)
    group_order = np.empty_like(node)
    group = np.broadcast_to(np.arange(groups, dtype=np.int64), node.shape)
    np.put_along_axis(group_order, node * (groups // nodes) + place, group, axis=1)
    order: IntArray = group_order[:, :, None] * size + np.arange(size)
    return order.reshape(layers, experts)


def _require_even(what: str, value: int, among: str, parts: int) -> None:
    if parts < 1 or value % parts:
        remedy = (
            "Use groups=1, nodes=1 for the global policy."
            if among in ("groups", "nodes")
            else f"Give a multiple of the {among}."
        )
        raise PolicyNotApplicable(
            f"EPLB divides the {what} evenly among the {among}: got {value} {what} for "
            f"{parts} {among}. {remedy}"
        )
