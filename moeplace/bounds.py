"""Lower bounds that need no solver: arguments why no plan can be faster, and their check.

Each argument is a function ``refutes(row, T)``: true only if *no* plan gives the layer a
makespan of at most T. Its docstring holds conditions and proof. `lower_bound` searches the
largest T that some argument refutes (compiled, in `bound_kernels`); `recompute` asks the named
argument about a claimed bound again, from the problem alone, with the NumPy code below.

Notation: w_1 >= w_2 >= ... loads, W their sum; r_g = (min(n_g(T), C_g) - b_g)+ tokens that rank
g can still run by T (n_g(T) = T v_g under linear speeds, else `Cluster.tokens_by`: the inverse of
the least time that n tokens take, f_g(0, n) under planes, the monotone envelope of a table; C_g
its token capacity), R_n the sum of the n largest; K_g slots of rank g that can be used (at most
E), s = sum K - E spare slots. Ranks without slots count only through their base load. No argument
needs more of a latency model than r_g, so that a table need not be convex; what activated
replicas add under planes, `planes` counts.
Comparisons leave a relative slack of 1e-12, so that rounding never makes a bound too high.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen, sum_by
from moeplace.constraints import CAPACITY_SLACK
from moeplace.errors import CertificateError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.latency import Knots, tokens_by
from moeplace.loads import LoadHistogram
from moeplace.nodes_bound import affordable, share_groups
from moeplace.problem import Problem, check_problem

SLACK = 1e-12
#: Sources of bounds that a constraint lifts: groups on nodes (a prefix), and few moves.
NODES, STAY, FEW = "nodes: ", "moves", "few moves"
#: `FewMoves` is tried for so many moves, for so much of a time limit (of one core).
MOST_MOVES, MOVES_SHARE = 8, 0.6
#: Source of bounds by every way to share groups out over nodes.
GROUPS = "groups on nodes"
#: `planes` counts the replicas that so many experts of a layer need.
HOTTEST = 32
#: Sources of bounds by the latency planes, and by trying every placement of a tiny layer.
PLANES, EXHAUSTIVE = "planes", "exhaustive"


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """A bound that a solver claims; the problem alone does not show it.

    Attributes
    ----------
    layers : tuple of int
    weight : array [windows] or None
        No plan has a smaller sum over these layers and all windows of weight x layer weight x
        makespan, prices below included. None: of the problem's objective, over all layers.
    value : float
    by : str
        Method, solver and version.
    move_price, replica_price : float
        Charged for each copy received and each replica, instead of rules over all layers.
    """

    layers: tuple[int, ...]
    weight: FloatArray | None
    value: float
    by: str
    move_price: float = 0.0
    replica_price: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """A proven lower bound, layer by layer.

    Attributes
    ----------
    per_layer : array [windows, layers]
        No plan gives the layer a smaller makespan in that window.
    source : array of str [windows, layers]
        The argument that proves it: a key of `ARGUMENTS`.
    total : float
        The same for the objective: layers are summed first, then windows combined.
    coupled : bool
        Whether `recomputed` is more than the layers add up to: a budget of moves in all was
        shared over them.
    claims : tuple of Claim
        What solvers claim beyond; `total` uses them, nothing else does.
    """

    per_layer: FloatArray
    source: np.ndarray[tuple[int, int], np.dtype[np.str_]]
    total: float
    coupled: bool = False
    claims: tuple[Claim, ...] = ()
    proven: float | None = None

    @property
    def recomputed(self) -> float:
        """The part of `total` that `recompute` can check without believing a solver."""
        return self.total if self.proven is None else self.proven

    @property
    def sources(self) -> dict[str, int]:
        """How many (window, layer) pairs each argument decides, most first."""
        return dict(Counter(self.source.ravel().tolist()).most_common())


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
        others = np.sort(self.loads[skip:])
        return np.concatenate([[0.0], others.cumsum()])[np.clip(count, 0, others.size)]


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


#: `hot_packing` packs at most so many experts, and only with so few spare slots.
PACKED, PACKING_SPARE = 10, 16


def hot_packing(row: Row, seconds: float) -> bool:
    """Few spare slots: packing the j hottest experts needs more of them than there are.

    Any routing. Proof: take the connected parts of `hot_experts`: ranks that hold a copy of the
    j, joined by every expert with a copy there, so that no expert and no spare slot is in two. A
    part with a of the j on b ranks that spends b - 1 + f spare slots has at least k_b slots, k_b
    the sum of the b smallest K, and all but a + b - 1 + f of them hold whole others, with at
    least the smallest loads. Load and neighbours must fit R_b. So a part costs at least the least
    b - 1 + f for which they do, the parts are a partition of the j, and the cheapest partition
    (over all subsets) must not cost more than s. Relaxed: parts may use the same ranks and
    neighbours.
    """
    if row.spare >= row.room(seconds).size or row.spare > PACKING_SPARE:
        return False
    total = row.room(seconds).cumsum()
    fewest = np.sort(row.caps[row.caps > 0]).cumsum()
    hot = min(PACKED, row.loads.size)
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
    "hot packing": hot_packing,
    "no replicas": no_replicas,
    "whole tokens": whole_tokens,
}


def lower_bound(problem: Problem, time_limit: float | None = None) -> Bound:
    """The best of all arguments for each window and layer, and in total.

    Sharing groups out over nodes is left out where it may take most of the time limit (seconds),
    and few moves are looked at for a part of it.
    """
    check_problem(problem)
    shape = (problem.windows, problem.layers)
    units = np.repeat(_units(problem)[:, None], problem.layers, axis=1)
    value, source = _search(problem, problem.tokens, problem.base, problem.fluid, units)
    names = np.array(list(ARGUMENTS))[source].reshape(shape)
    per_layer = value.reshape(shape)
    if (coarse := nodes_as_ranks(problem)) is not None:
        other = lower_bound(coarse)
        names = np.where(other.per_layer > per_layer, np.char.add(NODES, other.source), names)
        per_layer = np.maximum(per_layer, other.per_layer)
    shared_out = share_groups(problem) if affordable(problem, time_limit) else None
    if shared_out is not None:
        lifted = shared_out.bound * (1 - SLACK)
        better = lifted > per_layer * (1 + SLACK)
        names = np.where(better, GROUPS, names)
        per_layer = np.where(better, lifted, per_layer)
    if problem.cluster.planes is not None:
        poured = _planes_bound(problem, per_layer)
        names = np.where(poured > per_layer, PLANES, names)
        per_layer = np.maximum(per_layer, poured)
    if problem.max_moves is None:
        return Bound(per_layer=per_layer, source=names, total=problem.total(per_layer))
    stay = _stay(problem)
    names = np.where(stay > per_layer, STAY, names)
    per_layer = np.maximum(per_layer, stay)
    few = few_moves(problem, per_layer, within=time_limit)
    names = np.where(few > per_layer, FEW, names)
    per_layer = few
    alone, shared = problem.total(per_layer), _shared_moves(problem, per_layer)
    return Bound(
        per_layer=per_layer, source=names, total=max(alone, shared), coupled=shared > alone
    )


def mean_bound(problem: Problem) -> FloatArray:
    """Lower bound [layers] on the makespan of the mean load: what planning on it can reach.

    Below the mean of the windows' makespans, so a target for the search, not for the result.
    """
    tokens, base = problem.mean_load
    fluid = problem.cluster.fluid_seconds(tokens.sum(axis=1), base)
    return _search(problem, tokens, base, fluid, np.zeros(problem.layers))[0]


def _search(
    problem: Problem, tokens: FloatArray, base: FloatArray, fluid: FloatArray, units: FloatArray
) -> tuple[FloatArray, IntArray]:
    from moeplace.bound_kernels import search

    value, source = search(
        -np.sort(-tokens, axis=-1).reshape(-1, problem.experts),
        frozen(base.reshape(-1, problem.ranks)),
        fluid.ravel(),
        frozen(problem.cluster.seconds(base).reshape(-1, problem.ranks)),
        problem.cluster.knots,
        _caps(problem),
        problem.routing == "even",
        units.ravel(),
        _ceiling(problem),
        _copies(problem),
    )
    # where capacities leave no placement every makespan is refuted: more than this says nothing
    return np.minimum(value, 2.0 * longest(problem, tokens, base).ravel()), source


def longest(problem: Problem, tokens: FloatArray, base: FloatArray) -> FloatArray:
    """Time [...] that no plan exceeds: tokens [..., experts] and base [..., ranks]."""
    whole = tokens.sum(axis=-1)[..., None] + base
    most = _caps(problem).max() * 1.0
    return np.asarray(problem.cluster.seconds(whole, np.array([most])).max(axis=-1))


def lifted_bound(problem: Problem, bound: Bound, better: FloatArray, name: str) -> Bound:
    """The bound with layers lifted to `better` [windows, layers] by the argument `name`."""
    lifted = np.asarray(better > bound.per_layer)
    source = np.where(lifted, name, bound.source.astype("U16"))
    per_layer = np.where(lifted, better, bound.per_layer)
    alone = problem.total(per_layer)
    shared = _shared_moves(problem, per_layer) if problem.max_moves is not None else 0.0
    total = max(alone, shared)
    claimed = _claimed(problem, per_layer, bound.claims)
    return Bound(
        per_layer=per_layer,
        source=source,
        total=max(total, claimed),
        coupled=shared > alone,
        claims=bound.claims,
        proven=total,
    )


def layer_floor(problem: Problem, bound: Bound) -> FloatArray:
    """Least mean over windows of each layer's makespan [layers], solvers' claims believed."""
    floor = problem.mean(bound.per_layer)
    for claim in bound.claims:
        plain = claim.weight is not None and not (claim.move_price or claim.replica_price)
        if plain and np.array_equal(claim.weight, problem.window_weight):  # type: ignore[arg-type]
            (layer,) = claim.layers
            weight = problem.layer_weight[layer]
            if weight > 0:
                floor[layer] = max(floor[layer], claim.value / weight)
    return floor


def with_claims(problem: Problem, bound: Bound, claims: Sequence[Claim]) -> Bound:
    """The bound, and what it becomes if solvers' claims are believed too."""
    every = (*bound.claims, *claims)
    total = max(bound.total, _claimed(problem, bound.per_layer, every))
    return replace(bound, total=total, claims=every, proven=bound.recomputed)


def _claimed(problem: Problem, per_layer: FloatArray, claims: Sequence[Claim]) -> float:
    """Best total that the claims give together with the bounds of the other layers.

    For any window weights p that mean, worst window or CVaR may put on (for worst any, for CVaR
    at most window weight / (1 - alpha) each) and any prices m, r >= 0, no plan costs less than the
    sum over layers of its least (sum_w p_w T_w + m moves + r replicas), less m and r times the
    rules over all layers: Lagrange's bound. So claims of equal weights and prices add up over
    layers; those of different ones do not.
    """
    rules, budget = problem.max_moves, problem.replica_budget
    best = 0.0
    families: dict[tuple[bytes, float, float], dict[int, float]] = {}
    for claim in claims:
        if claim.weight is None:
            best = max(best, claim.value)
            continue
        if not _may_weigh(problem, claim.weight):
            continue
        key = (claim.weight.tobytes(), claim.move_price, claim.replica_price)
        layers = families.setdefault(key, {})
        (layer,) = claim.layers
        layers[layer] = max(layers.get(layer, 0.0), claim.value)
    for (weights, move_price, replica_price), layers in families.items():
        each = np.frombuffer(weights) @ (per_layer * problem.layer_weight)
        each = each + replica_price * problem.experts
        for layer, value in layers.items():
            each[layer] = max(each[layer], value)
        total = math.fsum(each)
        if move_price:
            if rules is None or rules.total is None:
                continue
            total -= move_price * rules.total
        if replica_price:
            if budget is None:
                continue
            total -= replica_price * budget
        best = max(best, total)
    return best


def _may_weigh(problem: Problem, weight: FloatArray) -> bool:
    """Whether the objective is at least the sum of window step times with these weights."""
    if (weight < 0).any() or abs(math.fsum(weight) - 1.0) > 1e-12:
        return False
    if problem.objective == "worst":
        return True
    if problem.objective == "mean":
        return bool(np.allclose(weight, problem.window_weight, rtol=1e-12, atol=0))
    most = problem.window_weight / (1 - problem.cvar_alpha)
    return bool((weight <= most * (1 + 1e-12)).all())


def recompute(problem: Problem, bound: Bound) -> None:
    """Check a bound from the problem alone; silent if every argument holds.

    Solvers' claims are not arguments: only that `total` follows from them is checked.

    Raises
    ------
    CertificateError
        If an argument does not refute every makespan below (1 - 1e-11) of its claim, or the
        total is more than the layers add up to. It names window, layer and argument.
    """
    check_problem(problem)
    if not isinstance(bound, Bound):
        raise CertificateError(
            f"A bound must be a moeplace.Bound, got {type(bound).__name__}: pass lower_bound's "
            "answer, or a result's bound."
        )
    shape = (problem.windows, problem.layers)
    if bound.per_layer.shape != shape or bound.source.shape != shape:
        raise CertificateError(
            f"Bound has the shape {bound.per_layer.shape}, the problem has [windows, layers] = "
            f"{shape}: it is for another problem."
        )
    coarse, shared = nodes_as_ranks(problem), None
    stay = _stay(problem) if problem.max_moves is not None else np.zeros(shape)
    for window, layer in np.ndindex(shape):
        claim = float(bound.per_layer[window, layer])
        name = str(bound.source[window, layer])
        place = f"window {window}, layer {layer}"
        if name == STAY:
            holds = bool(claim <= stay[window, layer] * (1 + SLACK))
        elif name == FEW and problem.max_moves is not None and problem.routing == "even":
            from moeplace.moves_bound import FewMoves

            case = FewMoves(problem, window, layer)
            holds = case.follows(int(_move_budget(problem)[layer]), claim * (1 - 1e-11))
        elif name == GROUPS and problem.node_groups is not None:
            if shared is None:
                shared = share_groups(problem)
            holds = shared is not None and bool(claim <= shared.bound[window, layer])
        elif name == EXHAUSTIVE:
            from moeplace.exhaustive import Exhaustive

            tiny = Exhaustive(problem, window, layer)
            holds = bool(tiny.refutes(claim * (1 - 1e-11)))
        elif name == PLANES and problem.cluster.planes is not None:
            holds = bool(planes(problem, window, np.array([layer]), np.array([claim]))[0])
        else:
            inner = coarse if name.startswith(NODES) else problem
            argument = ARGUMENTS.get(name.removeprefix(NODES))
            if argument is None or inner is None:
                raise CertificateError(f"Bound of {place} names an unknown argument {name!r}.")
            row = row_of(inner, window, layer)
            holds = claim == 0 or (claim > 0 and argument(row, claim * (1 - 1e-11)))
        if not holds:
            raise CertificateError(
                f"Bound {claim!r} of {place} does not follow from {name!r}: "
                "that argument does not refute a smaller makespan."
            )
    total = problem.total(bound.per_layer)
    if bound.coupled and problem.max_moves is not None:
        total = max(total, _shared_moves(problem, bound.per_layer))
    if not bound.recomputed <= total * (1 + SLACK):
        raise CertificateError(
            f"Bound claims {bound.recomputed!r} in total, its layers give {total!r}."
        )
    total = max(total, _claimed(problem, bound.per_layer, bound.claims))
    if not bound.total <= total * (1 + SLACK):
        raise CertificateError(
            f"Bound claims {bound.total!r} in total, its layers and solvers' claims give {total!r}."
        )


def nodes_as_ranks(problem: Problem) -> Problem | None:
    """Expert groups as experts and nodes as ranks: a relaxation under `NodeGroups`, else None.

    Any routing. Proof: a group's replicas all lie on its node, so the node runs the group's
    load; its ranks together have the node's speed, and its slots hold at most so many groups.
    A makespan that no assignment of groups to nodes reaches, no plan reaches.
    """
    if problem.node_groups is None:
        return None
    cluster = problem.cluster
    assert cluster.nodes is not None
    groups = problem.node_groups.of(problem.experts)
    number, nodes = int(groups.max()) + 1, int(cluster.nodes.max()) + 1
    holds = cluster.slots > 0
    smallest = np.sort(np.bincount(groups, minlength=number)).cumsum()
    room = sum_by(np.minimum(cluster.slots, problem.experts), cluster.nodes, nodes)
    slots = np.searchsorted(smallest, room, "right")
    if slots.sum() < number:
        return None  # no plan at all
    loads = problem.loads
    speed = sum_by(cluster.speeds * holds, cluster.nodes, nodes)
    base = np.broadcast_to(problem.base_load, problem.base.shape) * holds
    tokens = sum_by(loads.tokens, groups, number)
    return Problem(
        LoadHistogram(tokens=tokens, passes=loads.passes, phase=loads.phase),
        Cluster(speeds=np.where(speed > 0, speed, 1.0), slots=slots),
        routing="weighted",
        objective=problem.objective,
        base_load=sum_by(base, cluster.nodes, nodes),
        layer_weight=problem.layer_weight,
        window_weight=problem.window_weight,
    )


def planes(
    problem: Problem, window: int, layers: IntArray, seconds: FloatArray
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Latency planes: whether tokens and activations cannot be poured into `seconds` [layers].

    Any routing. Proof: by T rank g runs n_g tokens and activates A_g <= K_g replicas with
    t_k + w_k A_g + c_k (b_g + n_g) / v_g <= T for every plane k, or is idle. Together the ranks
    must run sum n_g >= W and activate sum A_g >= sum_e A_e, A_e the least that replicas of e can
    activate: a(n) = 1 - exp(-n) is concave with a(0) = 0, so few replicas activate least. Under
    even routing e needs c copies (see `even_copies`) and A_e = c a(w_e / c), which grows with c;
    else no replica runs more than r = max_g r_g, and A_e is that of as many full ones as fit into
    w_e and one with the rest. What a rank can run is a concave function of A_g, so the most that
    all can run at a total of activations is found by spending activations where they cost the
    fewest tokens first. The `HOTTEST` experts are looked at so, the others count as single ones.
    """
    cluster, model = problem.cluster, problem.cluster.planes
    assert model is not None
    if layers.size == 0:
        return np.zeros(0, dtype=np.bool_)
    t, w, c = model.startup, model.activation, model.compute
    tokens, base = problem.tokens[window, layers], problem.base[window, layers]
    need = tokens.sum(axis=1) * (1 - SLACK)
    if layers.size == 0:
        return np.zeros(0, dtype=np.bool_)
    active = _least_activated(problem, tokens, base, seconds) * (1 - SLACK)
    time = seconds[:, None, None]  # [layers, ranks, points]
    caps = _caps(problem)[None, :, None].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        # where two planes allow equally many tokens, and where one allows none, on any rank
        cross = [
            ((time - t[k]) / c[k] - (time - t[m]) / c[m]) / (w[k] / c[k] - w[m] / c[m])
            for k in range(t.size)
            for m in range(k)
        ]
        points = [np.zeros_like(time), *cross]
        rate = cluster.speeds[None, :, None]
        full = [caps]
        for k in range(t.size):
            full.append((time - t[k] - c[k] * base[:, :, None] / rate) / w[k])
        most = np.nan_to_num(np.minimum.reduce(np.broadcast_arrays(*full)), nan=np.inf)
        at = np.concatenate(np.broadcast_arrays(*(p + 0 * caps for p in points), caps), axis=2)
        at = np.sort(np.clip(np.nan_to_num(at), 0.0, np.clip(most, 0.0, caps)), axis=2)
        runs = np.full(at.shape, np.inf)
        for k in range(t.size):
            allowed = (time - t[k] - w[k] * at) * rate
            # where activations just fit, rounding must not make it look as if they did not
            fits = allowed >= -1e-9 * time * rate
            each = allowed / c[k] if c[k] > 0 else np.where(fits, np.inf, -np.inf)
            runs = np.minimum(runs, each)
        runs = runs - base[:, :, None]
    idle = (runs[:, :, :1] < 0) | (caps == 0)
    late = (idle[:, :, 0] & (cluster.seconds(base) > seconds[:, None] * (1 + SLACK))).any(axis=1)
    runs = np.where(idle, 0.0, np.maximum(runs, 0.0))
    width = np.where(idle, 0.0, np.diff(at, axis=2)).reshape(layers.size, -1)
    loss = -np.diff(runs, axis=2).reshape(layers.size, -1)
    slope = np.where(width > 0, loss / np.where(width > 0, width, 1.0), np.inf)
    order = np.argsort(slope, axis=1, kind="stable")
    width = np.take_along_axis(width, order, axis=1)
    slope = np.take_along_axis(np.where(np.isfinite(slope), slope, 0.0), order, axis=1)
    before = width.cumsum(axis=1) - width
    spent = np.clip(active[:, None] - before, 0.0, width)
    can = runs[:, :, 0].sum(axis=1) - (spent * slope).sum(axis=1)
    short = width.sum(axis=1) < active
    return np.asarray(late | short | (can * (1 + SLACK) < need))


def _least_activated(
    problem: Problem, tokens: FloatArray, base: FloatArray, seconds: FloatArray
) -> FloatArray:
    """Sum of A_e [layers] for tokens [layers, experts] and base [layers, ranks]; see `planes`."""
    load = -np.sort(-tokens, axis=1)
    hot, rest = load[:, :HOTTEST], load[:, HOTTEST:]
    reach = np.minimum(problem.cluster.tokens_by(seconds[:, None]), _ceiling(problem)) - base
    room = -np.sort(-np.maximum(reach[:, _caps(problem) > 0], 0.0), axis=1)
    if problem.routing == "even":
        most = np.maximum.accumulate(room * np.arange(1, room.shape[1] + 1), axis=1)
        copies = 1 + (most[:, None, :] < hot[:, :, None] * (1 - SLACK)).sum(axis=2)
        each = -copies * np.expm1(-hot / copies)
    else:
        largest = np.maximum(room[:, :1], 1e-300) * (1 + SLACK)
        full = np.where(room[:, :1] > 0, np.floor(hot / largest), 0.0)
        left = np.where(room[:, :1] > 0, hot - full * largest, hot)
        each = -full * np.expm1(-largest) - np.expm1(-np.maximum(left, 0.0))
    return np.asarray(each.sum(axis=1) - np.expm1(-rest).sum(axis=1))


def _planes_bound(problem: Problem, start: FloatArray) -> FloatArray:
    """Largest makespans [windows, layers] that `planes` refutes, at least `start`; by bisection."""
    value = start.copy()
    for window in range(problem.windows):
        layers = np.flatnonzero(problem.tokens[window].any(axis=1))
        layers = layers[planes(problem, window, layers, value[window, layers])]
        low = value[window, layers]
        high = 2 * low
        while (bad := planes(problem, window, layers, high)).any():
            low, high = np.where(bad, high, low), np.where(bad, 2 * high, high)
        for _ in range(46):
            middle = 0.5 * (low + high)
            bad = planes(problem, window, layers, middle)
            low, high = np.where(bad, middle, low), np.where(bad, high, middle)
        value[window, layers] = low
    return value


def _stay(problem: Problem) -> FloatArray:
    """`stay_curve` at each layer's own budget of moves [windows, layers]."""
    from moeplace.moves_bound import stay_curve

    budget = _move_budget(problem)
    value = np.empty((problem.windows, problem.layers))
    for window, layer in np.ndindex(value.shape):
        curve = stay_curve(problem, window, layer, SLACK)
        value[window, layer] = curve[min(int(budget[layer]), problem.experts)]
    return value


def _move_budget(problem: Problem) -> IntArray:
    """Copies that each layer may receive [layers]."""
    rules = problem.max_moves
    assert rules is not None
    budget = rules.allowance()
    return budget if rules.total is None else np.minimum(budget, rules.total)


def few_moves(
    problem: Problem,
    per_layer: FloatArray,
    high: FloatArray | None = None,
    seconds: float | None = None,
    within: float | None = None,
) -> FloatArray:
    """Bounds [windows, layers] lifted by `FewMoves`; `high` are makespans known to be possible.

    Without them, those of the current plan (which a broken rule may exclude: still a limit of
    the search only). `seconds` for each layer and window; without, few steps, and fewer or none
    if they would take long `within` a time limit.
    """
    value = per_layer.copy()
    if problem.max_moves is None or problem.routing != "even":
        return value
    if high is None:
        high = evaluate(problem, problem.max_moves.current.with_split(None)).makespan
    from moeplace.moves_bound import FEWEST, PACE, QUICK, FewMoves  # compiled

    budget = _move_budget(problem)
    cases = [
        (int(window), int(layer))
        for window, layer in np.argwhere(high > per_layer * (1 + 1e-6))
        if budget[layer] <= MOST_MOVES
    ]

    steps = QUICK
    if within is not None and cases:
        steps = min(steps, int(MOVES_SHARE * within * PACE / len(cases)))
    if seconds is None and steps < FEWEST:
        return value

    def lift(case: tuple[int, int]) -> float:
        moves, low, top = int(budget[case[1]]), float(per_layer[case]), float(high[case])
        return FewMoves(problem, *case).bound(moves, low, top, seconds, steps)

    with ThreadPoolExecutor(1 if seconds is not None else None) as pool:
        for case, bound in zip(cases, pool.map(lift, cases), strict=True):
            value[case] = bound
    return value


def _shared_moves(problem: Problem, per_layer: FloatArray) -> float:
    """Bound on the objective if the moves in all are shared over the layers as well as can be.

    Each layer's bound as a function of its copies received is replaced by its lower convex hull;
    the cheapest way to share the total is then greedy, and no integer way is cheaper. One window
    only (0 otherwise).
    """
    rules = problem.max_moves
    assert rules is not None
    if rules.total is None or problem.windows > 1:
        return 0.0
    from moeplace.moves_bound import stay_curve

    total, saved = rules.total, []
    start = np.empty(problem.layers)
    for layer in range(problem.layers):
        most = min(int(rules.allowance()[layer]), problem.experts)
        curve = np.maximum(stay_curve(problem, 0, layer, SLACK)[: most + 1], per_layer[0, layer])
        start[layer] = curve[0]
        at = 0
        while at < most:
            slopes = (curve[at] - curve[at + 1 :]) / np.arange(1, most - at + 1)
            step = int(slopes.argmax()) + 1
            if slopes[step - 1] <= 0:
                break
            saved += [float(slopes[step - 1] * problem.layer_weight[layer])] * step
            at += step
    saving = sum(sorted(saved, reverse=True)[:total])
    return max(problem.total(start[None]) - saving, 0.0) * (1 - 1e-11)


def row_of(problem: Problem, window: int, layer: int) -> Row:
    """What the arguments look at."""
    return Row(
        loads=-np.sort(-problem.tokens[window, layer]),
        base=problem.base[window, layer],
        knots=problem.cluster.knots,
        caps=_caps(problem),
        even=problem.routing == "even",
        unit=float(_units(problem)[window]),
        capacity=_ceiling(problem),
        copies=_copies(problem),
    )


def _above(need: FloatArray | float, room: FloatArray | float) -> np.ndarray[tuple[int, ...]]:
    return np.asarray(np.asarray(need) * (1 - SLACK) > room)


def _caps(problem: Problem) -> IntArray:
    return np.minimum(problem.cluster.slots, problem.experts)


def _ceiling(problem: Problem) -> FloatArray:
    """Most tokens of each rank [ranks] in a legal plan."""
    return frozen(problem.capacity * (1 + CAPACITY_SLACK))


def _copies(problem: Problem) -> int:
    """Most replicas that a layer can hold."""
    slots = int(_caps(problem).sum())
    most = int(problem.most_replicas.sum())
    if problem.replica_budget is not None:
        most = min(most, problem.replica_budget - (problem.layers - 1) * problem.experts)
    return min(slots, most)


def _units(problem: Problem) -> FloatArray:
    """What loads are multiples of [windows]; 0 where they are not whole."""
    if not problem.loads.integral:
        return np.zeros(problem.windows)
    passes = problem.loads.passes
    return np.ones(problem.windows) if passes is None else 1.0 / passes
