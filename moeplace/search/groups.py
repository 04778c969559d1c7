"""Weighted split with few spare slots: ranks joined into groups, then a window in each group.

m ranks joined by m - 1 spare slots act as one rank of their summed speed that holds the sum of
their slots less m - 1 experts: the sliding window splits the load exactly inside the group. So
G - s groups use s spare slots, and what is left is to balance experts over groups without
replicas, which the exchange search does. A hot expert gets the fewest fastest ranks that hold
it; the other ranks are joined fast with slow.
"""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.plan import EMPTY
from moeplace.problem import Problem
from moeplace.search.aims import SLOWEST
from moeplace.search.construct import construct
from moeplace.search.improve import improve
from moeplace.search.state import PINNED, State
from moeplace.search.window import pour_layer


def _join(
    seconds: float, load: FloatArray, room: FloatArray, speed: FloatArray, cap: IntArray
) -> tuple[list[list[int]], list[int]] | None:
    """Groups of ranks, and the hot expert of each of the first ones; None if `seconds` is too low.

    Parameters
    ----------
    seconds : float
        Makespan to aim at.
    load : array [experts]
    room : array [ranks]
        Tokens that each rank can run by `seconds`.
    speed, cap : array [ranks]
    """
    ranks = [int(g) for g in np.argsort(-room, kind="stable") if cap[g] > 0]
    spare = int(cap.sum()) - load.size
    small = np.concatenate([[0.0], np.sort(load).cumsum()])
    groups: list[list[int]] = []
    hot: list[int] = []
    for e in np.argsort(-load, kind="stable"):
        if not ranks or load[e] + small[max(cap[ranks[0]] - 1, 0)] <= room[ranks[0]]:
            break
        need = True
        group: list[int] = []
        while need and ranks and len(group) <= spare:
            group.append(ranks.pop(0))
            beside = int(cap[group].sum()) - len(group)
            need = load[e] + small[min(beside, load.size - 1)] > room[group].sum()
        if need:
            return None
        spare -= len(group) - 1
        groups.append(group)
        hot.append(int(e))
    number = max(len(ranks) - spare, 1)
    if ranks:
        rest: list[list[int]] = [[] for _ in range(min(number, len(ranks)))]
        for n, g in enumerate(ranks):  # to and fro: fast with slow
            turn, at = divmod(n, len(rest))
            rest[at if turn % 2 == 0 else len(rest) - 1 - at].append(g)
        groups += rest
    return groups, hot


def grouped(
    problem: Problem, layer: int, seconds: float, seed: int, steps: int
) -> tuple[IntArray, FloatArray] | None:
    """Slots and shares [ranks, most slots] of one layer on its mean load, aiming at `seconds`.

    None if the hot experts do not fit by then, or a window fails.
    """
    tokens, bases = problem.mean_load
    load, base = tokens[layer], bases[layer]
    speed = problem.cluster.speeds
    speed = np.minimum(speed, np.maximum(problem.capacity / seconds, SLOWEST * speed))
    cap = np.minimum(problem.cluster.slots, problem.experts)
    joined = _join(seconds, load, np.maximum(seconds * speed - base, 0.0), speed, cap)
    if joined is None:
        return None
    groups, hot = joined
    size = np.array([int(cap[g].sum()) - len(g) + 1 for g in groups])
    for _ in range(int(size.sum()) - problem.experts):  # spare slots that joining did not need
        size[int(size.argmax())] -= 1
    state = State.alone(
        load,
        np.array([base[g].sum() for g in groups]),
        np.array([speed[g].sum() for g in groups]),
        np.minimum(size, problem.experts),
        seed,
    )
    for n, e in enumerate(hot):
        state.on[0, n, e] |= PINNED
    if construct(state) >= 0:
        return None
    one = np.zeros(1, dtype=np.int64)
    improve(state, one, np.array([steps]), np.array([1.0 + 1e-9]))
    slot = np.full((problem.ranks, int(cap.max())), EMPTY)
    share = np.zeros(slot.shape)
    for n, group in enumerate(groups):
        experts = state.slot[0, n, : state.cap[n]]
        experts = experts[experts < problem.experts]
        part = pour_layer(load[experts], base[group], speed[group], cap[group])
        if part is None:
            return None
        filled = part[0] < experts.size
        most = part[0].shape[1]
        names = np.append(experts, EMPTY)
        slot[group, :most] = np.where(filled, names[np.minimum(part[0], experts.size)], EMPTY)
        share[group, :most] = np.where(filled, part[1], 0.0)
    return slot, share
