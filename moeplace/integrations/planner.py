"""The plan that an engine is offered: for each layer the old row, a few moves, or a new row.

Work is limited in search steps, never by the clock, so that equal inputs give equal bits.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray, frozen
from moeplace.bounds import mean_bound
from moeplace.constraints import MaxMoves, NodeGroups
from moeplace.errors import ProblemError
from moeplace.hardware import Cluster
from moeplace.integrations import light, tables
from moeplace.integrations.settings import UNRESTRICTED, Effort
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.policies.eplb import eplb
from moeplace.problem import Problem

#: A layer that is so far above its bound is planned anew: mending it takes as many moves.
LOST = 1.6


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """What an engine asks for.

    Attributes
    ----------
    loads : array [layers, experts]
        Tokens.
    speeds : array [ranks]
        Relative.
    slots_per_rank : int
    old : int array [layers, slots], optional
        The map in use, on these ranks; EMPTY where a rank is new. Experts may be missing.
    groups, nodes : int
        Equal expert groups, each to stay on one of equal nodes; 1 and 1 for neither.
    """

    loads: FloatArray
    speeds: FloatArray
    slots_per_rank: int
    old: IntArray | None = None
    groups: int = 1
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Number of EP ranks."""
        return self.speeds.size

    @property
    def experts(self) -> int:
        """Number of logical experts."""
        return int(self.loads.shape[1])

    @property
    def grouped(self) -> bool:
        """Whether groups are bound to nodes."""
        return self.groups > 1 and self.nodes > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A map for all layers, every slot filled.

    Attributes
    ----------
    slots : int array [layers, slots]
    before, after, bound : arrays [layers]
        Makespan of the old map (infinite without one) and of this one, and its lower bound.
    copies : int array [layers]
        Copies received.
    compiled : bool
        Whether kernels planned it.
    """

    slots: IntArray
    before: FloatArray
    after: FloatArray
    bound: FloatArray
    copies: IntArray
    compiled: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def saving(self) -> float:
        """Share of the step time that it saves; 0 without an old map."""
        before = float(self.before.sum())
        if not 0 < before < np.inf:
            return 0.0
        return 1.0 - float(self.after.sum()) / before


def propose(ask: Ask, effort: Effort = UNRESTRICTED, *, may_compile: bool = False) -> Proposal:
    """Plan with kernels if they are at hand, else without.

    Raises
    ------
    ProblemError
        If slots or groups do not fit, or a number is out of range.
    """
    from moeplace.search.compiling import KernelsMissing, from_cache_only

    _check(ask)
    problem = _problem(ask)
    with nullcontext() if may_compile else from_cache_only():
        try:
            bound = mean_bound(problem)
            candidates = _compiled(ask, problem, bound, effort)
        except KernelsMissing as missing:
            if ask.grouped:
                raise ProblemError(
                    f"Expert groups on nodes are planned with kernels only, and {missing}. Run "
                    "moeplace warm once, as the user and on the kind of machine that serves."
                ) from missing
            note = f"planned without kernels, since {missing}: run moeplace warm once"
            return _light(ask, effort, (note,))
        return _choose(ask, bound, effort, candidates, True)


def _check(ask: Ask) -> None:
    if ask.slots_per_rank * ask.ranks < ask.experts:
        raise ProblemError(
            f"{ask.ranks} ranks x {ask.slots_per_rank} slots are too few for {ask.experts} experts."
        )
    if ask.slots_per_rank > ask.experts:
        raise ProblemError(
            f"A rank has {ask.slots_per_rank} slots for {ask.experts} experts: it would hold one "
            "twice. Give at most as many slots as experts."
        )
    if ask.grouped and (ask.groups % ask.nodes or ask.experts % ask.groups):
        raise ProblemError(
            f"{ask.experts} experts in {ask.groups} groups do not divide evenly over {ask.nodes} "
            "nodes. Give 1 group for experts that may lie anywhere."
        )


def _problem(ask: Ask) -> Problem:
    cluster = Cluster.from_speeds(ask.speeds, ask.slots_per_rank, ask.nodes, "relative")
    rules = [NodeGroups(ask.groups)] if ask.grouped else []
    loads = LoadHistogram(tokens=ask.loads[None])
    return Problem(loads, cluster, routing="even", constraints=rules)


def _mended(ask: Ask) -> IntArray | None:
    """The old map with a slot for every expert, and replicas where it had duplicates or nothing."""
    if ask.old is None:
        return None
    slots = tables.repaired(ask.old, ask.loads, ask.ranks)
    return slots if ask.grouped else tables.spread(slots, ask.loads, ask.speeds)


def _compiled(ask: Ask, problem: Problem, bound: FloatArray, effort: Effort) -> list[IntArray]:
    """Maps [layers, slots] by the kernels, EMPTY where a slot is free."""
    from moeplace.policies.greedy import greedy

    if ask.grouped:
        return _on_nodes(ask, problem, effort)
    old = _mended(ask)
    found = []
    if effort.max_moves is None or old is None:
        found.append(_anew(problem, bound, effort))
        # a copy, since kernels are compiled apart for arrays that may not be written
        twice = greedy(ask.loads.copy(), ask.ranks, ask.slots_per_rank)
        times = tables.seconds(found[0], ask.loads, ask.speeds)
        if (times > bound * (1 + UNRESTRICTED.gap)).any():  # never worse than greedy
            found.append(np.where(tables.duplicates(twice, ask.ranks), EMPTY, twice))
    if old is not None and not effort.free:
        found += _few_moves(problem, bound, old, effort)
    return found


def _anew(problem: Problem, bound: FloatArray, effort: Effort) -> IntArray:
    """Construction and exchange search, from nothing."""
    from moeplace.search.construct import construct
    from moeplace.search.improve import improve
    from moeplace.search.state import State

    state = State.of(problem)
    construct(state)
    goal = bound / state.unit * (1 + min(effort.gap, UNRESTRICTED.gap))
    steps = 32 * problem.cluster.total_slots
    left = effort.work
    while left > 0:
        layers = np.flatnonzero(state.makespan > goal)
        if layers.size == 0:
            break
        budget = np.full(layers.size, min(steps, left))
        improve(state, layers, budget, goal[layers])
        left -= steps
        steps *= 2
    return state.plan(problem).slots


def _few_moves(
    problem: Problem, bound: FloatArray, old: IntArray, effort: Effort
) -> list[IntArray]:
    """Exchanges from the old map while they pay; where these do not do, replicas move too."""
    from moeplace.search.construct import adopt
    from moeplace.search.exchange import exchange
    from moeplace.search.moves import Moves
    from moeplace.search.state import State

    slots = problem.cluster.total_slots
    held = Plan(slots=old, rank_slots=problem.cluster.slots, experts=problem.experts)
    state = State.of(problem)
    every = np.arange(problem.layers)
    adopt(state, held, every)
    room = slots if effort.max_moves is None else min(effort.max_moves, slots)
    scale = np.where(bound > 0, bound, 1.0) / state.unit
    goal = bound / state.unit * (1 + effort.gap)
    exchange(state, every, goal, scale, effort.move_cost, room)
    found = [state.plan(problem).slots]
    # twice the gap: what exchanges leave there costs less than a search for better
    stuck = state.makespan > scale * (1 + 2 * effort.gap)
    layers = np.flatnonzero(stuck & (state.makespan <= (LOST if room == slots else np.inf) * scale))
    if layers.size == 0 or room == 0:
        return found
    adopt(state, held, every)
    # some slots are left free, and filling one may take a copy
    most = slots // 4 if effort.max_moves is None else room - room // 4
    moves = Moves(state, np.full(problem.layers, most))
    with ThreadPoolExecutor(1) as pool:
        moves.improve(layers, np.ones_like(layers), goal[layers], pool, 1)
    return [*found, state.plan(problem).slots]


def _on_nodes(ask: Ask, problem: Problem, effort: Effort) -> list[IntArray]:
    """Groups that stay on a node: by the portfolio, which knows the rule."""
    from moeplace.evaluate import evaluate
    from moeplace.solve import solve

    found = []
    gap, work = effort.gap, effort.work * problem.layers
    if effort.max_moves is None or ask.old is None:
        anew = solve(problem, work_limit=work, gap=min(gap, UNRESTRICTED.gap))
        found.append(anew.plan.slots)
    old = _mended(ask)
    if old is None or effort.free:
        return found
    held = Plan(slots=old, rank_slots=problem.cluster.slots, experts=problem.experts)
    if evaluate(problem, held).legal:
        most = problem.cluster.total_slots // 4 if effort.max_moves is None else effort.max_moves
        rules = [*problem.constraints, MaxMoves(held, per_layer=most)]
        near = Problem(problem.loads, problem.cluster, routing="even", constraints=rules)
        found.append(solve(near, work_limit=work, gap=gap).plan.slots)
    return found


def _light(ask: Ask, effort: Effort, notes: tuple[str, ...] = ()) -> Proposal:
    """Plan by NumPy alone, also the bound: the fluid one."""
    bound = ask.loads.sum(axis=1) / ask.speeds.sum()
    goal = bound * (1 + effort.gap)
    old = _mended(ask)
    found = []
    if effort.max_moves is None or old is None:
        found.append(light.fresh(ask.loads, ask.speeds, ask.slots_per_rank, goal))
        if (tables.seconds(found[0], ask.loads, ask.speeds) > goal).any():
            twice = eplb(ask.loads, ask.ranks, ask.slots_per_rank)
            found.append(np.where(tables.duplicates(twice, ask.ranks), EMPTY, twice))
    if old is not None and not effort.free:
        rounds = light.ROUNDS if effort.max_moves is None else effort.max_moves // 2
        found.append(light.exchanged(old, ask.loads, ask.speeds, goal, rounds))
    return _choose(ask, bound, effort, found, False, notes)


def _choose(
    ask: Ask,
    bound: FloatArray,
    effort: Effort,
    candidates: list[IntArray],
    compiled: bool,
    notes: tuple[str, ...] = (),
) -> Proposal:
    """Fill and align the candidates; take the cheapest in each layer, the old row if none pays."""
    loads, ranks, experts = ask.loads, ask.ranks, ask.experts
    maps = [_ready(ask, slots) for slots in candidates]
    none = np.full((loads.shape[0], ask.slots_per_rank * ranks), EMPTY)
    reference = none if ask.old is None else ask.old
    whole = tables.serves(ask.old, loads.shape[0], none.shape[1], experts)
    before = np.full(loads.shape[0], np.inf)
    if whole:
        assert ask.old is not None
        before = tables.seconds(ask.old, loads, ask.speeds)
    times = np.stack([tables.seconds(slots, loads, ask.speeds) for slots in maps])
    copies = np.stack([tables.received(slots, reference, ranks, experts) for slots in maps])
    scale = np.where(bound > 0, bound, 1.0)
    price = times / scale + effort.move_cost * copies
    if whole and effort.max_moves is not None:
        price = np.where(copies > effort.max_moves, np.inf, price)
    pick = price.argmin(axis=0)
    layer = np.arange(loads.shape[0])
    slots, after, moved = np.stack(maps)[pick, layer], times[pick, layer], copies[pick, layer]
    if whole:
        assert ask.old is not None
        need = np.maximum(effort.min_saving, effort.move_cost * moved) * before
        stay = (before - after <= need) if not effort.free else (before <= after)
        stay |= (bound <= 0) | np.isinf(price[pick, layer])
        slots = np.where(stay[:, None], ask.old, slots)
        after, moved = np.where(stay, before, after), np.where(stay, 0, moved)
    return Proposal(
        slots=slots,
        before=before,
        after=after,
        bound=frozen(np.asarray(bound)),
        copies=moved,
        compiled=compiled,
        notes=notes,
    )


def _ready(ask: Ask, slots: IntArray) -> IntArray:
    """Every slot filled, and what stays on a rank in its old slot."""
    allowed = _on_same_node(ask, slots) if ask.grouped else None
    full = tables.filled(slots, ask.loads, ask.ranks, allowed)
    return full if ask.old is None else tables.aligned(full, ask.old, ask.ranks, ask.experts)


def _on_same_node(ask: Ask, slots: IntArray) -> BoolArray:
    """Experts [layers, ranks, experts] that a rank may hold where groups stay on their nodes."""
    layers = slots.shape[0]
    on_node = tables.held(slots, ask.nodes, ask.experts)  # [layers, nodes, experts]
    size = ask.experts // ask.groups
    of_group = on_node.reshape(layers, ask.nodes, ask.groups, size).any(axis=3)
    expert = np.repeat(of_group, size, axis=2)
    return np.asarray(np.repeat(expert, ask.ranks // ask.nodes, axis=1))


def warm() -> None:
    """Compile what `propose` needs; a later process finds it in the cache (see `cached`)."""
    for ask, effort in _samples():
        propose(ask, effort, may_compile=True)


def cached() -> bool:
    """Whether `propose` plans with kernels in this process."""
    try:
        return all(propose(ask, effort).compiled for ask, effort in _samples())
    except ProblemError:  # groups on nodes have no other way
        return False


def _samples() -> Iterator[tuple[Ask, Effort]]:
    """Tiny problems that run every kernel."""
    random = np.random.default_rng(0)
    for groups, nodes in ((1, 1), (4, 2)):
        loads = np.round(random.lognormal(4, 1, (2, 16)))
        one = Ask(loads=loads, speeds=np.ones(4), slots_per_rank=5, groups=groups, nodes=nodes)
        yield one, UNRESTRICTED
        old = np.tile(np.r_[np.arange(16), 12, 8, 4, 0].reshape(5, 4).T.ravel(), (2, 1))
        if groups > 1:  # a node's groups, and spare slots for the first of them
            old = np.tile(np.r_[:5, 3, 4, 5, 6, 7, 8:13, 11, 12, 13, 14, 15], (2, 1))
        yield replace(one, old=old), Effort(gap=0.0, min_saving=0.0)
