"""Compiled search for the largest makespan that an argument of `arguments` refutes.

Each branch of `_refutes` is the compiled twin of the function of that name in `arguments`, which
holds conditions and proof; a test holds the two together.
"""

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.arguments import SLACK, SUBSETS
from moeplace.latency import Knots
from moeplace.packing import PACKED, PACKING_SPARE, TRIALS
from moeplace.packing import search as pack

BASE, FLUID, SLOT_CAP, EVEN_COPIES, HOT_EXPERT, JOINT_COPIES = range(6)
HOT_EXPERTS, NO_REPLICAS, WHOLE_TOKENS, HOT_PACKING = range(6, 10)


@njit(cache=True, nogil=True, error_model="numpy")
def _descending(values):  # type: ignore[no-untyped-def]
    """A sorted copy; the one place that sorts, since sorting is slow to compile."""
    return np.sort(values)[::-1].copy()


@njit(cache=True, nogil=True, error_model="numpy")
def _reach(knots, g, seconds):  # type: ignore[no-untyped-def]
    """`latency.tokens_by` of one rank."""
    at, height, rate = knots
    n = height.shape[1] - 1
    while n >= 0 and height[g, n] > seconds:
        n -= 1
    if n < 0:
        return 0.0
    if n == height.shape[1] - 1:
        return at[g, n] + (seconds - height[g, n]) * rate[g]
    slope = (at[g, n + 1] - at[g, n]) / (height[g, n + 1] - height[g, n])
    return at[g, n] + (seconds - height[g, n]) * slope


@njit(cache=True, nogil=True, error_model="numpy")
def _hot_experts(rooms, loads, prefix, caps, fewest, spare):  # type: ignore[no-untyped-def]
    """`arguments.hot_experts`; `rooms` of the ranks with slots, in rank order."""
    experts = loads.size
    count = rooms.size
    room = _descending(rooms)
    total = np.cumsum(room)
    whole = prefix[experts]
    own = np.empty(count)
    alone = np.empty(count + spare)
    carried = np.empty(2 * count + 1)
    for j in range(1, min(experts, 2 * count) + 1):
        if j >= 2 and (loads[j - 2] + loads[j - 1]) * (1 - SLACK) <= room[0]:
            return False
        n = 0
        for g in range(caps.size):
            if caps[g] > 0:
                others = min(caps[g] - 1, experts - j)
                own[n] = rooms[n] - (whole - prefix[experts - others])
                n += 1
        fits = False
        for x in range(spare + 1):
            for g in range(count):
                alone[g] = own[g]
            for g in range(spare - x):
                alone[count + g] = room[g]
            order = _descending(alone[: count + spare - x])
            q = 0
            carried[0] = 0.0
            for e in range(j):
                if q < order.size and loads[e] * (1 - SLACK) <= order[q]:
                    carried[q + 1] = carried[q] + loads[e]
                    q += 1
            for a in range(j - q, j + 1):
                if a == 0:
                    fits = True
                    break
                rest = prefix[j] - carried[j - a]
                for ranks in range(1, min(x + min(x, a), count) + 1):
                    others = min(max(fewest[ranks] - a - spare, 0), experts - j)
                    beside = whole - prefix[experts - others]
                    if (rest + beside) * (1 - SLACK) <= total[ranks - 1]:
                        fits = True
                        break
                if fits:
                    break
            if fits:
                break
        if not fits:
            return True
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def by_subsets(total, loads, prefix, fewest, spare):  # type: ignore[no-untyped-def]
    """`arguments.hot_packing`."""
    experts = loads.size
    hot = min(SUBSETS, experts)
    whole = prefix[experts]
    parts = 1 << hot
    cost = np.empty(parts, dtype=np.int64)
    load = np.zeros(parts)
    members = np.zeros(parts, dtype=np.int64)
    best = np.empty(parts, dtype=np.int64)
    best[0] = 0
    for part in range(1, parts):
        e = 0
        while not part >> e & 1:
            e += 1
        load[part] = load[part & (part - 1)] + loads[e]
        members[part] = members[part & (part - 1)] + 1
        least = spare + 1
        for b in range(1, min(spare + 1, total.size) + 1):
            if b - 1 >= least:
                break
            slots = fewest[b] - members[part] - (b - 1)
            for freed in range(spare - (b - 1) + 1):
                if b - 1 + freed >= least:
                    break
                others = min(max(slots - freed, 0), experts - hot)
                beside = whole - prefix[experts - others]
                if (load[part] + beside) * (1 - SLACK) <= total[b - 1]:
                    least = b - 1 + freed
                    break
                if others == 0:
                    break
        cost[part] = least
    for packed in range(1, parts):
        first = packed & -packed
        rest = packed ^ first
        least = spare + 1
        part = rest
        while True:  # every part that holds the first expert
            least = min(least, cost[part | first] + best[rest ^ part])
            if part == 0:
                break
            part = (part - 1) & rest
        best[packed] = least
        if packed & (packed + 1) == 0 and least > spare:
            return True
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def _refutes(  # type: ignore[no-untyped-def]
    kind, seconds, loads, prefix, base, knots, caps, fewest, most, unit, capacity, copies
):
    """Whether argument `kind` excludes a makespan of at most `seconds`."""
    experts = loads.size
    spare = fewest[-1] - experts
    count = fewest.size - 1  # ranks with slots
    room = np.empty(count)
    held = 0.0
    n = 0
    for g in range(caps.size):
        if caps[g] > 0:
            room[n] = max(min(_reach(knots, g, seconds), capacity[g]) - base[g], 0.0)
            can = min(room[n], prefix[caps[g]])
            held += np.floor(can / unit * (1 + SLACK) + SLACK) if kind == WHOLE_TOKENS else can
            n += 1
    if kind == SLOT_CAP:
        return prefix[experts] * (1 - SLACK) > held
    if kind == WHOLE_TOKENS:
        return prefix[experts] / unit * (1 - SLACK) > held
    if kind == HOT_EXPERTS:
        return spare < count and _hot_experts(room, loads, prefix, caps, fewest, spare)
    if kind == HOT_PACKING:
        if spare >= count or spare > PACKING_SPARE:
            return False
        ranks = np.zeros(min(PACKED, experts), dtype=np.int64)
        part = np.zeros_like(ranks)
        room = _descending(room)
        answer = pack(room, fewest, loads, spare, TRIALS, ranks, part)
        if answer >= 0:
            return answer == 1
        return by_subsets(np.cumsum(room), loads, prefix, fewest, spare)
    room = _descending(room)
    if kind in (EVEN_COPIES, JOINT_COPIES):
        # reach[n]: the most load that n + 1 copies can carry
        reach = np.empty(count)
        total = 0.0
        for c in range(count):
            total += room[c]
            if kind == JOINT_COPIES:
                reach[c] = total
            else:
                reach[c] = max(room[c] * (c + 1), reach[c - 1] if c > 0 else 0.0)
        needed = experts
        for e in range(experts):
            need = loads[e] * (1 - SLACK)
            if need <= reach[0]:
                break  # loads descend: the rest needs one copy each
            c = 1
            while c < count and need > reach[c]:
                c += 1
            needed += c
            if c == count or needed > copies:
                return True
        return needed > copies
    if kind == HOT_EXPERT:
        total = 0.0
        for n in range(1, min(spare + 1, count) + 1):
            total += room[n - 1]
            others = min(max(fewest[n] - spare - 1, 0), experts - 1)
            forced = loads[0] + prefix[experts] - prefix[experts - others]
            if forced * (1 - SLACK) <= total:
                return False
        return True
    # NO_REPLICAS
    pair = 0
    for n in range(1, count + 1):
        if fewest[n] - fewest[n - 1] >= 2:
            pair = fewest[n] - fewest[n - 1]
            break
    for j in range(1, min(experts, 2 * count) + 1):
        shared = False  # whether two of the j hottest on one rank are excluded
        if pair > 0 and j >= 2:
            others = min(pair - 2, experts - j)
            two = loads[j - 2] + loads[j - 1] + prefix[experts] - prefix[experts - others]
            shared = two * (1 - SLACK) > room[0]
        total = 0.0
        excluded = True
        for n in range(1, min(j, count) + 1):
            total += room[n - 1]
            if most[n] < j or (shared and n < j):
                continue
            others = min(max(fewest[n] - j, 0), experts - j)
            forced = prefix[j] + prefix[experts] - prefix[experts - others]
            if forced * (1 - SLACK) <= total:
                excluded = False
                break
        if excluded:
            return True
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def _search(  # type: ignore[no-untyped-def]
    loads,
    base,
    fluid,
    base_seconds,
    knots,
    caps,
    fewest,
    most,
    even,
    units,
    capacity,
    copies,
    value,
    source,
):
    experts = loads.shape[1]
    spare = fewest[-1] - experts
    prefix = np.zeros(experts + 1)
    for row in range(loads.shape[0]):
        for e in range(experts):
            prefix[e + 1] = prefix[e] + loads[row, e]
        best = fluid[row]
        name = FLUID
        for g in range(caps.size):
            if base_seconds[row, g] >= best:
                name = BASE
        for kind in range(SLOT_CAP, HOT_PACKING + 1):
            if prefix[experts] <= 0.0 or (kind == EVEN_COPIES and not even):
                continue
            if kind in (HOT_EXPERTS, HOT_PACKING) and spare >= fewest.size - 1:
                continue
            if kind in (NO_REPLICAS, WHOLE_TOKENS) and spare != 0:
                continue
            if kind == WHOLE_TOKENS and units[row] == 0.0:
                continue
            low, high = best, np.inf
            probe = best * (1 + SLACK)
            while low < probe < high:  # double until it is not refuted, then bisect
                if _refutes(
                    kind, probe, loads[row], prefix, base[row], knots, caps, fewest, most,
                    units[row], capacity, copies,
                ):  # fmt: skip
                    low = probe
                else:
                    high = probe
                    if low == best:
                        break
                if high < np.inf and high - low <= 1e-13 * high:
                    break
                probe = 2 * low if high == np.inf else 0.5 * (low + high)
            if low == best:
                continue
            best, name = low, kind
        value[row] = best * (1 - SLACK)
        source[row] = name


def search(
    loads: FloatArray,
    base: FloatArray,
    fluid: FloatArray,
    base_seconds: FloatArray,
    knots: Knots,
    caps: IntArray,
    even: bool,
    units: FloatArray,
    capacity: FloatArray,
    copies: int,
) -> tuple[FloatArray, IntArray]:
    """Best bound of each row and the argument that gives it.

    Parameters
    ----------
    loads : array [rows, experts], descending
    base : array [rows, ranks]
    fluid : array [rows], where the search starts
    base_seconds : array [rows, ranks], of `base`
    knots : latency of the ranks, see `moeplace.latency`
    caps : array [ranks]
    even : bool
    units : array [rows], 0 where loads are not whole
    capacity : array [ranks], most tokens of a rank
    copies : int, most replicas of all experts together

    Returns
    -------
    value : array [rows], lowered by a relative 1e-12
    source : array [rows], position of the argument in `arguments.ARGUMENTS`
    """
    used = np.sort(caps[caps > 0])
    fewest = np.concatenate([[0], used.cumsum()])
    most = np.concatenate([[0], used[::-1].cumsum()])
    value = np.empty(loads.shape[0])
    source = np.empty(loads.shape[0], dtype=np.int64)
    _search(
        loads,
        base,
        fluid,
        base_seconds,
        knots,
        caps,
        fewest,
        most,
        even,
        units,
        capacity,
        copies,
        value,
        source,
    )
    return value, source
