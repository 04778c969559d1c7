"""Weighted split with few spare slots: ranks joined into groups, then a window in each group.

m ranks joined by m - 1 spare slots act as one rank of their summed speed that holds the sum of
their slots less m - 1 experts: the sliding window splits the load exactly inside the group. So
G - s groups use s spare slots, and what is left is to balance experts over groups without
replicas, which the exchange search does. Hot experts get ranks one by one or, where
that fails, as the search of the bound packs them; the other ranks are joined fast with slow.
"""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.packing import PACKED, PACKING_SPARE, TRIALS, search
from moeplace.plan import EMPTY
from moeplace.problem import Problem
from moeplace.search.aims import SLOWEST
from moeplace.search.construct import construct
from moeplace.search.improve import improve
from moeplace.search.state import PINNED, State
from moeplace.search.window import pour_layer

#: Hot experts that share ranks (places in descending order of load), and how many ranks.
Parts = list[tuple[IntArray, int]]


def _packed(load: FloatArray, room: FloatArray, fewest: IntArray) -> Parts | None:
    """The first packing that the bound does not refute (`moeplace.packing`).

    None if it takes too long to find, or more experts than it packs are too hot to be placed last.
    """
    width, part = np.zeros((2, min(PACKED, load.size)), dtype=np.int64)
    spare = int(fewest[-1]) - load.size
    beside = load[load.size - int(fewest[1]) + 1 :].sum()
    if load.size > PACKED and load[PACKED] + beside > room[min(PACKED, room.size - 1)]:
        return None
    if spare > PACKING_SPARE or search(room, fewest, load, spare, TRIALS // 10, width, part) != 0:
        return None
    small = np.concatenate([[0.0], load[::-1].cumsum()])

    def need(part: tuple[IntArray, int]) -> float:
        mine, width = part
        beside = max(int(fewest[width]) - mine.size - (width - 1), 0)
        return float(load[mine].sum() + small[min(beside, load.size)]) / width

    parts = [(np.flatnonzero(part == n), int(width[n])) for n in range(int(part.max()) + 1)]
    return sorted(parts, key=need, reverse=True)  # the tightest first


def _greedy(load: FloatArray, room: FloatArray, fewest: IntArray) -> Parts | None:
    """The hottest experts get the fewest ranks with most room that hold them, one by one."""
    small = np.concatenate([[0.0], load[::-1].cumsum()])
    total = np.concatenate([[0.0], room.cumsum()])
    parts: Parts = []
    at, spare = 0, int(fewest[-1]) - load.size
    for e in range(load.size):
        width = 1
        while at + width <= room.size:
            beside = min(int(fewest[width]) - width, load.size - 1)
            if load[e] + small[beside] <= total[at + width] - total[at]:
                break
            width += 1
        if width == 1:
            break
        if at + width > room.size or width - 1 > spare:
            return None
        parts.append((np.array([e]), width))
        at += width
        spare -= width - 1
    return parts


def _join(
    load: FloatArray, room: FloatArray, cap: IntArray
) -> tuple[list[IntArray], list[IntArray]] | None:
    """Groups of ranks, and the hot experts of each of the first ones; None if they do not fit.

    Parts get the ranks with most room, the first ones first; what spare slots are left joins
    other ranks.

    Parameters
    ----------
    load : array [experts]
    room : array [ranks]
        Tokens that each rank can run by the makespan aimed at.
    cap : array [ranks]
    """
    order = np.argsort(-load, kind="stable")
    ranks = np.flatnonzero(cap)
    ranks = ranks[np.argsort(-room[ranks], kind="stable")]
    fewest = np.insert(np.sort(cap[ranks]).cumsum(), 0, 0)
    parts = _greedy(load[order], room[ranks], fewest)
    if parts is None:
        parts = _packed(load[order], room[ranks], fewest)
    if parts is None:
        return None
    spare = int(fewest[-1]) - load.size
    groups: list[IntArray] = []
    hot: list[IntArray] = []
    left: list[int] = []
    at = 0
    for mine, width in parts:
        if width == 1:  # the exchange search finds what lies there
            left.append(at)
        else:
            groups.append(ranks[at : at + width])
            hot.append(order[mine])
            spare -= width - 1
        at += width
    left += range(at, ranks.size)
    number = min(max(len(left) - spare, 1), len(left))
    rest: list[list[int]] = [[] for _ in range(number)]
    for n, g in enumerate(left):  # to and fro: fast with slow
        turn, place = divmod(n, number)
        rest[place if turn % 2 == 0 else number - 1 - place].append(g)
    return groups + [ranks[each] for each in rest], hot


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
    joined = _join(load, np.maximum(seconds * speed - base, 0.0), cap)
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
    for n, mine in enumerate(hot):
        state.on[0, n, mine] |= PINNED
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
