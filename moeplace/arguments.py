"""Arguments why no plan can be faster, that need no solver.

Each is a function ``refutes(row, T)``: true only if *no* plan gives the layer a makespan of at
most T. Its docstring holds conditions and proof. `bounds` asks them.

Notation: w_1 >= w_2 >= ... loads, W their sum; r_g = (min(n_g(T), C_g) - b_g)+ tokens that rank
g can still run by T (n_g(T) = T v_g under linear speeds, else `Cluster.tokens_by`: the inverse of
the least time that n tokens take, f_g(0, n) under planes, the monotone envelope of a table; C_g
its token capacity), R_n the sum of the n largest; K_g slots of rank g that can be used (at most
E), s = sum K - E spare slots. Ranks without slots count only through their base load. No argument
needs more of a latency model than r_g, so that a table need not be convex; what activated
replicas add under planes, `planes_bound` counts.
Comparisons leave a relative slack of 1e-12, so that rounding never makes a bound too high.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen
from moeplace.constraints import CAPACITY_SLACK
from moeplace.latency import Knots, tokens_by
from moeplace.problem import Problem

SLACK = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One layer in one window: what the arguments look at."""

    loads: FloatArray  # [experts], descending
    base: FloatArray  # [ranks]
    knots: Knots  # of the ranks' latency
    caps: IntArray  # [ranks] slots that can be used
    even: bool
    unit: float  # loads are multiples of it; 0 if they are not whole
    capacity: FloatArray  # [ranks] most tokens, base included
    copies: int  # most replicas of all experts together

    @property
    def spare(self) -> int:
        """Slots beyond one for each expert."""
        return int(self.caps.sum()) - self.loads.size

    def rooms(self, seconds: float) -> FloatArray:
        """r_g of the ranks [ranks]."""
        return np.maximum(np.minimum(self.reach(seconds), self.capacity) - self.base, 0.0)

    def reach(self, seconds: float) -> FloatArray:
        """n_g(T): most tokens of each rank [ranks] by so many seconds."""
        return tokens_by(self.knots, np.array([seconds]))

    def room(self, seconds: float) -> FloatArray:
        """r_g of the ranks with slots, most first."""
        return np.sort(self.rooms(seconds)[self.caps > 0])[::-1]

    def smallest(self, count: IntArray, skip: int) -> FloatArray:
        """Sum of the `count` smallest loads, the `skip` largest left out."""
        return self.lightest[np.clip(count, 0, self.loads.size - skip)]

    @cached_property
    def lightest(self) -> FloatArray:
        """Sums of the n smallest loads [experts + 1]."""
        return np.concatenate([self.loads[:1] * 0, self.loads[::-1].cumsum()])


def base_load(row: Row, seconds: float) -> bool:
    """A rank's base load alone takes longer. Any routing, any latency model."""
    return bool((row.base > (1 + SLACK) * row.reach(seconds)).any())


def fluid(row: Row, seconds: float) -> bool:
    """W > sum_g r_g: all ranks together cannot run the tokens. Any routing."""
    return bool(_above(row.loads.sum(), row.room(seconds).sum()))


def slot_cap(row: Row, seconds: float) -> bool:
    """W > sum_g min(r_g, U_g), U_g the sum of the K_g largest loads. Any routing.

    Proof: rank g holds at most K_g experts and takes at most the whole load of each, so never
    more than U_g; by T it runs at most r_g.
    """
    room = row.rooms(seconds)
    held = np.concatenate([[0.0], row.loads.cumsum()])[row.caps]
    return bool(_above(row.loads.sum(), np.minimum(room, held)[row.caps > 0].sum()))


def even_copies(row: Row, seconds: float) -> bool:
    """Even routing: sum_e c_e > N, c_e the least c with w_e <= c r_(c).

    Proof: c copies of e lie on c different ranks, so one of them has room at most r_(c), the
    c-th largest, and must run w_e / c: fewer than c_e copies are impossible. There are at most N
    replicas in all: sum K, or what a budget of replicas leaves beside the other layers' experts.
    Not valid for fixed dispatch rules or for two copies on one rank.
    """
    if not row.even:
        return False
    room = row.room(seconds)
    reach = np.maximum.accumulate(room * np.arange(1, room.size + 1))
    copies = np.searchsorted(reach, row.loads * (1 - SLACK)) + 1
    return bool((copies > room.size).any() or copies.sum() > row.copies)


def hot_expert(row: Row, seconds: float) -> bool:
    """For each number n of copies of the hottest expert, it and its neighbours exceed R_n.

    Any routing. Proof: with n copies (n <= s + 1) the n ranks that hold them have at least k_n
    slots, the sum of the n smallest K. Beside the copies lie at least k_n - n slots; each of
    the other s - n + 1 spare slots frees at most one of them (it is that slot, left empty, or
    it is a copy that takes load of one expert elsewhere or repeats it). So at least
    k_n - s - 1 other experts lie wholly on these ranks, with at least the smallest loads.
    """
    room = row.room(seconds).cumsum()
    copies = np.arange(1, min(row.spare + 1, room.size) + 1)
    slots = np.sort(row.caps[row.caps > 0]).cumsum()[copies - 1]
    forced = row.loads[0] + row.smallest(slots - row.spare - 1, skip=1)
    return bool(_above(forced, room[copies - 1]).all())


def joint_copies(row: Row, seconds: float) -> bool:
    """Any routing: sum_e n_e > N, n_e the least n with w_e <= R_n.

    Proof: n copies of e run at most R_n together, so e needs n_e copies; N as above.
    """
    room = row.room(seconds).cumsum()
    copies = np.searchsorted(room, row.loads * (1 - SLACK)) + 1
    return bool((copies > room.size).any() or copies.sum() > row.copies)


def hot_experts(row: Row, seconds: float) -> bool:
    """Few spare slots (s < ranks): the j hottest experts find no room, for some j.

    Any routing. Proof: let any two of the j hottest exceed the roomiest rank, r_(1). Take the
    ranks that hold a copy of the j, join each with every expert that has a copy there, and look
    at the connected parts. No expert is in two parts, so parts share no spare slots. A part with
    a of the j on b ranks spends at least b - 1 spare slots on copies (a connected graph has at
    least as many edges as nodes less one); with f further ones (copies, copies elsewhere, slots
    left empty) all but a + b - 1 + f of its slots hold whole others. A part of one rank has
    a = 1. Parts of several ranks, x = sum of b - 1, have at most x + min(x, a) ranks for their a
    experts. The j - a experts that are alone are matched to ranks with room for them and their
    neighbours, but for at most s - x ranks with some freed; the heaviest such set of each size is
    found greedily (ranks in order of room: a matroid), which leaves the least for the rest. If
    for every x and a something does not fit, no plan exists. Relaxed where it is hard: ranks may
    serve in both roles, and each freed neighbour adds a whole empty rank.
    """
    room = row.room(seconds)
    count, spare = room.size, row.spare
    if spare >= count:
        return False
    total = room.cumsum()
    caps = row.caps[row.caps > 0]
    rooms = row.rooms(seconds)[row.caps > 0]
    fewest = np.sort(caps).cumsum()
    for j in range(1, min(row.loads.size, 2 * count) + 1):
        if j >= 2 and not _above(row.loads[j - 2] + row.loads[j - 1], room[0]):
            break
        alone = np.sort(rooms - row.smallest(caps - 1, skip=j))[::-1]
        if not any(
            _hot_fit(row, j, x, np.sort(np.append(alone, room[: spare - x]))[::-1], total, fewest)
            for x in range(spare + 1)
        ):
            return True
    return False


#: All tokens of a layer in whole numbers, where rational ones are packed.
PACKING_GRID = 1 << 50


def hot_packing(row: Row, seconds: float) -> bool:
    """Few spare slots: the hottest experts cannot be packed with them.

    Any routing. Proof: take the connected parts of `hot_experts`: ranks that hold a copy of the
    hottest, joined by every expert with a copy there, so that no expert, rank or spare slot is in
    two. A part with a of the hottest on b ranks spends b - 1 + f spare slots, and all but
    a + b - 1 + f of its slots hold whole others (f slots are freed of them). Any collection of
    parts with n ranks in all has at least k_n slots, k_n the sum of the n smallest K; the whole
    others in them are distinct, so they weigh at least as much as so many of the smallest loads;
    with the hottest in it they must fit R_n. Of k parts that are one expert on one rank each, one
    lies on a rank with room for at most r_(k). By itself a part must be rid of some neighbours to
    fit; what parts outside a collection must be rid of, it cannot. All parts together spend at
    most s. If every way to part the hottest, and to give ranks to the parts, breaks one of these,
    there is no plan. Relaxed: which collections are looked at, and each may use the same ranks.
    Where that search is too long, `by_subsets` is asked.
    """
    if row.spare >= row.room(seconds).size:
        return False
    from moeplace.packing import PACKED, PACKING_SPARE, TRIALS, search  # compiled

    if row.spare > PACKING_SPARE:
        return False
    fewest = np.insert(np.sort(row.caps[row.caps > 0]).cumsum(), 0, 0)
    ranks, part = np.zeros((2, min(PACKED, row.loads.size)), dtype=np.int64)
    room, loads = row.room(seconds), row.loads
    if loads.dtype == object:  # rational: as whole numbers, loads rounded down and room up
        total = loads.sum()
        scale = PACKING_GRID / total if total > 0 else 0
        loads = np.array([int(load * scale) for load in loads])
        room = np.array([int(min(most, total) * scale) + 1 for most in room])
    answer = search(room, fewest, loads, row.spare, TRIALS, ranks, part)
    return answer == 1 or (answer < 0 and by_subsets(row, seconds))


#: `by_subsets` packs at most so many experts.
SUBSETS = 10


def by_subsets(row: Row, seconds: float) -> bool:
    """A coarser `hot_packing`, which takes the same time however many spare slots there are.

    Proof: a part costs at least the least b - 1 + f for which load and neighbours fit R_b. The
    parts are a partition of the hottest, and the cheapest partition (over all subsets) must not
    cost more than s. Relaxed: parts may use the same ranks and neighbours.
    """
    total = row.room(seconds).cumsum()
    fewest = np.sort(row.caps[row.caps > 0]).cumsum()
    hot = min(SUBSETS, row.loads.size)
    cost = np.full(1 << hot, row.spare + 1)
    for part in range(1, 1 << hot):
        members = [e for e in range(hot) if part >> e & 1]
        for b in range(1, min(row.spare + 1, total.size) + 1):
            freed = np.arange(row.spare - (b - 1) + 1)
            beside = row.smallest(fewest[b - 1] - len(members) - (b - 1) - freed, skip=hot)
            fits = ~_above(row.loads[members].sum() + beside, total[b - 1])
            if fits.any():
                cost[part] = min(cost[part], b - 1 + int(fits.argmax()))
    best = np.full(1 << hot, row.spare + 1)
    best[0] = 0
    for packed in range(1, 1 << hot):
        first, rest = packed & -packed, packed & (packed - 1)
        part = rest
        while True:  # every part that holds the first expert
            best[packed] = min(best[packed], cost[part | first] + best[packed ^ (part | first)])
            if part == 0:
                break
            part = (part - 1) & rest
        if packed & (packed + 1) == 0 and best[packed] > row.spare:
            return True
    return False


def _hot_fit(
    row: Row, j: int, x: int, alone: FloatArray, total: FloatArray, fewest: IntArray
) -> bool:
    """Whether the j hottest fit with x copies beyond the first (see `hot_experts`)."""
    carried = [0.0]
    for load in row.loads[:j]:
        if len(carried) <= alone.size and not _above(load, alone[len(carried) - 1]):
            carried.append(carried[-1] + load)
    for a in range(j - len(carried) + 1, j + 1):
        rest = row.loads[:j].sum() - carried[j - a]
        if a == 0:
            return True
        ranks = np.arange(1, min(x + min(x, a), total.size) + 1)
        beside = row.smallest(fewest[ranks - 1] - a - row.spare, skip=j)
        if x > 0 and not _above(rest + beside, total[ranks - 1]).all():
            return True
    return False


def no_replicas(row: Row, seconds: float) -> bool:
    """No spare slots (s = 0): the j hottest experts fit on no number n of ranks, for some j.

    Any routing; wrong as soon as a slot is spare. Proof: all slots are full and each expert
    lies on one rank. If the j hottest occupy n ranks, these have at least k_n slots (the n
    smallest K), so beside the j lie at least k_n - j others, with at least the smallest loads;
    all of it must fit R_n. If n < j, some rank holds two of the j, at least w_(j-1) + w_j, and
    its other slots. n ranks can hold j only if their slots suffice.
    """
    if row.spare != 0:
        return False
    room = row.room(seconds)
    total = room.cumsum()
    caps = np.sort(row.caps[row.caps > 0])
    fewest, most = caps.cumsum(), caps[::-1].cumsum()
    pairs = caps[caps >= 2]
    for j in range(1, min(row.loads.size, 2 * room.size) + 1):
        ranks = np.arange(1, min(j, room.size) + 1)
        forced = row.loads[:j].sum() + row.smallest(fewest[ranks - 1] - j, skip=j)
        refuted = (most[ranks - 1] < j) | _above(forced, total[ranks - 1])
        if pairs.size and j >= 2:
            two = row.loads[j - 2 : j].sum() + row.smallest(pairs[:1] - 2, skip=j)[0]
            refuted |= (ranks < j) & _above(two, room[0])
        if refuted.all():
            return True
    return False


def whole_tokens(row: Row, seconds: float) -> bool:
    """No spare slots and whole loads: sum_g floor(min(r_g, U_g)) < W.

    Any routing. Proof: each expert lies whole on one rank, so a rank's tokens are a whole
    number, at most floor(r_g) and at most U_g (see slot_cap).
    """
    if row.spare != 0 or row.unit == 0:
        return False
    room = row.rooms(seconds)
    held = np.concatenate([[0.0], row.loads.cumsum()])[row.caps]
    whole = np.floor(np.minimum(room, held)[row.caps > 0] / row.unit * (1 + SLACK) + SLACK)
    return bool(_above(row.loads.sum() / row.unit, whole.sum()))


#: The arguments by name, in the order in which the search tries them.
ARGUMENTS: dict[str, Callable[[Row, float], bool]] = {
    "base load": base_load,
    "fluid": fluid,
    "slot cap": slot_cap,
    "even copies": even_copies,
    "hot expert": hot_expert,
    "joint copies": joint_copies,
    "hot experts": hot_experts,
    "no replicas": no_replicas,
    "whole tokens": whole_tokens,
    "hot packing": hot_packing,
}


def row_of(problem: Problem, window: int, layer: int) -> Row:
    """What the arguments look at."""
    return Row(
        loads=-np.sort(-problem.tokens[window, layer]),
        base=problem.base[window, layer],
        knots=problem.cluster.knots,
        caps=usable_slots(problem),
        even=problem.routing == "even",
        unit=float(units_of(problem)[window]),
        capacity=ceiling(problem),
        copies=most_copies(problem),
    )


def _above(need: FloatArray | float, room: FloatArray | float) -> np.ndarray[tuple[int, ...]]:
    return np.asarray(np.asarray(need) * (1 - SLACK) > room)


def usable_slots(problem: Problem) -> IntArray:
    """Slots [ranks] that can be used: a rank holds no expert twice."""
    return np.minimum(problem.cluster.slots, problem.experts)


def ceiling(problem: Problem) -> FloatArray:
    """Most tokens of each rank [ranks] in a legal plan."""
    return frozen(problem.capacity * (1 + CAPACITY_SLACK))


def most_copies(problem: Problem) -> int:
    """Most replicas that a layer can hold."""
    slots = int(usable_slots(problem).sum())
    most = int(problem.most_replicas.sum())
    if problem.replica_budget is not None:
        most = min(most, problem.replica_budget - (problem.layers - 1) * problem.experts)
    return min(slots, most)


def units_of(problem: Problem) -> FloatArray:
    """What loads are multiples of [windows]; 0 where they are not whole."""
    if not problem.loads.integral:
        return np.zeros(problem.windows)
    passes = problem.loads.passes
    return np.ones(problem.windows) if passes is None else 1.0 / passes
