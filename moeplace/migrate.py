"""From the plan that ranks hold to another one: what moves, in which order, what it costs.

`relabel` gives equal ranks each other's contents where that moves less; `migrate` lays the copies
out in stages that an engine executes. A stage is received into buffers and then takes effect at
once, so that a stage may exchange experts and none is ever unserved.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import FloatArray, IntArray, integers, ndim
from moeplace.constraints import CAPACITY_SLACK
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import EMPTY, Plan, check_plan
from moeplace.problem import Problem, check_problem
from moeplace.transfer import Copy, Migration, Stage

Engine = Literal["vllm", "sglang"]

#: Rounding of a rank's time when it is compared with the makespan.
ROUNDING = 1e-12


def relabel(problem: Problem, current: Plan, plan: Plan, tolerance: float = 0.0) -> Plan:
    """Give each layer's rank contents to the ranks that already hold most of them.

    An assignment problem for each layer: contents of rank g may go to rank h if h, with its own
    speed and base load, ends within the layer's makespan times (1 + tolerance) in every window,
    and obeys the problem's rules. So the price rises by `tolerance` at most; with 0, never. Then
    experts that stay on a rank stay in their slot. Under the rules of engines that look at where
    replicas lie, only the latter.

    Raises
    ------
    ProblemError
        If the tolerance is negative or not a number.
    PlanError
        If one of the plans does not fit the problem.
    """
    check_problem(problem)
    from scipy.optimize import linear_sum_assignment

    if not 0 <= tolerance < float("inf"):
        raise ProblemError(f"The tolerance must be a finite number from 0, got {tolerance!r}.")
    check_shapes(current, plan)
    allowed = _exchangeable(problem, plan, tolerance)
    table, old = plan.by_rank(plan.slots), current.by_rank(current.slots)
    place = plan.by_rank(np.arange(plan.slots.shape[1]))
    order = np.empty_like(plan.slots)
    for layer in range(plan.layers):
        has, had = (_held(rows[layer], plan.experts) for rows in (table, old))
        missing = (has.astype(np.int64) @ (~had).T.astype(np.int64)).astype(float)
        missing -= 0.5 / plan.ranks * np.eye(plan.ranks)  # a tie leaves the contents where they are
        _, to = linear_sum_assignment(np.where(allowed[layer], missing, np.inf))
        order[layer] = place[np.argsort(to)].ravel()[_used(plan)]
    return align(current, _permuted(plan, order))


def check_shapes(current: Plan, plan: Plan) -> None:
    """Raise PlanError unless both plans have the same layers, experts and slots per rank."""
    check_plan(current)
    check_plan(plan)
    mine = (plan.layers, plan.experts, plan.rank_slots.tolist())
    theirs = (current.layers, current.experts, current.rank_slots.tolist())
    for name, one, other in zip(("layers", "experts", "slots per rank"), theirs, mine, strict=True):
        if one != other:
            raise PlanError(
                f"A migration needs two plans of one shape: the current one has {one} {name}, the "
                f"new one {other}. Plan for the ranks and slots that are there."
            )


def _used(plan: Plan) -> Any:
    most = int(plan.rank_slots.max())
    return (np.arange(most) < plan.rank_slots[:, None]).ravel()


def _held(rows: IntArray, experts: int) -> Any:
    """Experts of each rank as booleans [ranks, experts], from slots [ranks, most slots]."""
    held = np.zeros((rows.shape[0], experts + 1), dtype=np.bool_)
    np.put_along_axis(held, np.where(rows == EMPTY, experts, rows), True, axis=1)
    return held[:, :-1]


def _exchangeable(problem: Problem, plan: Plan, tolerance: float) -> Any:
    """Whether the contents of rank g may lie on rank h, [layers, g, h]."""
    found = evaluate(problem, plan)
    cluster, share = problem.cluster, _shares(problem, plan)
    held = np.maximum(plan.slots, 0)
    tokens = np.take_along_axis(problem.tokens, np.broadcast_to(held, share.shape), axis=2) * share
    by_rank = np.maximum(plan.by_rank(tokens), 0.0)
    carried = by_rank.sum(axis=3)[..., None] + problem.base[:, :, None, :]  # [w, layers, g, h]
    activated = cluster.activated(by_rank)
    seconds = cluster.seconds(carried, None if activated is None else activated[..., None])
    limit = found.makespan[..., None, None] * (1 + tolerance) * (1 + ROUNDING)
    fits = (seconds <= limit) & (carried <= problem.capacity * (1 + CAPACITY_SLACK))
    good = fits.all(axis=0) & (plan.rank_slots[:, None] == plan.rank_slots)
    if problem.routing not in ("even", "weighted"):  # the rule depends on where replicas lie
        good &= np.eye(plan.ranks, dtype=np.bool_)
    if problem.node_groups is not None or problem.max_off_node is not None:
        assert cluster.nodes is not None
        good &= cluster.nodes[:, None] == cluster.nodes
    if problem.pinned.any() or not problem.allowed.all():
        rows = plan.by_rank(plan.slots)
        for layer in range(plan.layers):
            has = _held(rows[layer], plan.experts).astype(np.int64)
            barred = has @ (~problem.allowed[layer]).astype(np.int64)
            lacks = (1 - has) @ problem.pinned[layer].astype(np.int64)
            good[layer] &= (barred == 0) & (lacks == 0)
    return good | np.eye(plan.ranks, dtype=np.bool_)


def _shares(problem: Problem, plan: Plan) -> FloatArray:
    from moeplace.dispatch import shares

    share = shares(problem, plan)
    return np.broadcast_to(share, (problem.windows, *plan.slots.shape))


def _permuted(plan: Plan, order: IntArray) -> Plan:
    """The plan whose slot p holds what slot order[layer, p] held."""
    split = plan.split
    if split is not None:
        index = np.broadcast_to(order, split.shape)
        split = np.take_along_axis(split, index, axis=-1)
    return Plan(
        slots=np.take_along_axis(plan.slots, order, axis=1),
        rank_slots=plan.rank_slots,
        experts=plan.experts,
        split=split,
        allow_duplicates=plan.allow_duplicates,
    )


def align(current: Plan, plan: Plan) -> Plan:
    """Arrange each rank's slots so that what it keeps stays where it is; the price is the same."""
    check_shapes(current, plan)
    ends = np.concatenate([[0], plan.rank_slots.cumsum()])
    order = np.empty_like(plan.slots)
    for layer in range(plan.layers):
        for begin, end in pairwise(ends.tolist()):
            left = dict[int, list[int]]()
            for slot in range(end - 1, begin - 1, -1):
                left.setdefault(int(plan.slots[layer, slot]), []).append(slot)
            open_slots = []
            for slot in range(begin, end):
                same = left.get(int(current.slots[layer, slot]))
                if same:
                    order[layer, slot] = same.pop()
                else:
                    open_slots.append(slot)
            rest = sorted(slot for slots in left.values() for slot in slots)
            order[layer, open_slots] = rest
    return _permuted(plan, order)


def migrate(
    current: Plan,
    target: Plan,
    *,
    expert_bytes: Any,
    nodes: Any = None,
    engine: Engine = "vllm",
    chunk: int | None = None,
    buffer: int | None = None,
) -> Migration:
    """Lay out the copies that lead from one plan to another, in the order of an engine.

    Parameters
    ----------
    current, target : Plan
    expert_bytes : int or array-like [layers]
        Bytes of one expert's weights, e.g. of `expert_bytes`.
    nodes : array-like [ranks], optional
        Node of each rank; sources on the same node come first. One node by default.
    engine : {"vllm", "sglang"}
        vLLM's asynchronous worker moves one layer between two forward passes, through one layer
        of buffers; SGLang moves chunks of layers, each through the same buffers.
    chunk : int, optional
        Layers of a chunk; sglang alone (``--eplb-rebalance-layers-per-chunk``), by default all.
    buffer : int, optional
        Experts that a rank can receive before they take effect. By default a layer's slots, as
        both engines have; with fewer (1 is enough) a layer takes several stages.

    Returns
    -------
    Migration
        Its target is arranged as `align` does; where a small buffer needs it, experts that
        arrive at one rank exchange their slots.

    Raises
    ------
    PlanError
        If the plans differ in shape.
    ProblemError
        If another argument is out of range.
    """
    check_shapes(current, target)
    check_engine(engine, chunk)
    _check_count("buffer", buffer)
    sizes = checked_bytes(expert_bytes, current.layers)
    where = np.zeros(current.ranks) if nodes is None else nodes
    where = integers(where, "Nodes", ("rank",), ProblemError, low=0, high=1 << 20)
    if where.size != current.ranks:
        raise ProblemError(f"A migration needs {current.ranks} nodes, got {where.size}.")
    target = align(current, target)
    room = int(current.rank_slots.max()) if buffer is None else int(buffer)
    per_turn = 1 if engine == "vllm" else (chunk or current.layers)
    slots = np.array(target.slots)
    order = np.tile(np.arange(slots.shape[1]), (current.layers, 1))
    stages: list[Stage] = []
    for layer in range(current.layers):
        old, new = np.array(current.slots[layer]), slots[layer]
        for taken in _in_stages(old, new, order[layer], current.rank_of_slot, room):
            copies = _sourced(old, new, taken, current.rank_of_slot, where)
            gone = tuple(int(slot) for slot in taken if new[slot] == EMPTY)
            old[taken] = new[taken]
            stages.append(Stage(layer=layer, turn=layer // per_turn, copies=copies, dropped=gone))
    return Migration(
        current=current,
        target=_permuted(target, order),
        nodes=where,
        expert_bytes=sizes,
        stages=tuple(stages),
        buffer=room,
    )


def check_engine(engine: str, chunk: int | None) -> None:
    """Raise ProblemError unless the engine is known and moves chunks of that size."""
    if engine not in get_args(Engine):
        raise ProblemError(f"Engine must be one of {', '.join(get_args(Engine))}, got {engine!r}.")
    if chunk is not None and engine != "sglang":
        raise ProblemError("Chunks are SGLang's: vLLM moves one layer between two passes.")
    _check_count("chunk", chunk)


def _check_count(name: str, value: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise ProblemError(f"The {name} must be a whole number from 1, got {value!r}.")


def checked_bytes(expert_bytes: Any, layers: int) -> IntArray:
    """Bytes of one expert in each layer [layers], from those or one number for all.

    Raises
    ------
    ProblemError
        If one is no whole number from 1, or there is another number of them.
    """
    sizes = np.full(layers, expert_bytes) if ndim(expert_bytes) == 0 else expert_bytes
    sizes = integers(sizes, "Expert bytes", ("layer",), ProblemError, low=1, high=1 << 50)
    if sizes.size != layers:
        raise ProblemError(f"A migration needs {layers} expert bytes, got {sizes.size}.")
    return sizes


def _in_stages(
    old: IntArray, new: IntArray, order: IntArray, rank: IntArray, room: int
) -> Iterator[list[int]]:
    """Slots of one layer that change, in stages; `new` and `order` may be exchanged on a rank.

    No rank receives more than `room` experts in a stage, and no expert is ever unserved. Proof:
    an expert of which no copy stays in place is lost only if all its old copies go before a new
    one comes. So one slot that loses it waits for one that gains it (or both change in one
    stage). A slot loses one expert and gains one, so it waits for one slot at most and is waited
    for by one at most: the slots form chains and cycles. A chain runs from its head. A cycle must
    change at once; where it visits a rank twice, the two slots exchange what they gain, which
    makes two cycles of it. So in the end each takes one buffer of a rank at most.
    """
    changed = np.flatnonzero(old != new).tolist()
    if not changed:
        return
    received = np.bincount(rank[new != old], weights=(new != EMPTY)[new != old])
    if received.max() <= room:
        yield changed
        return
    waits = _waits(old, new, changed)
    cycles = _cycles(waits)
    while (pair := _twice(cycles, rank)) is not None:
        one, two = pair
        for row in (new, order):
            row[[one, two]] = row[[two, one]]
        exchanged = {one: two, two: one}
        waits = {slot: exchanged.get(on, on) for slot, on in waits.items()}
        cycles = _cycles(waits)
    units = [*cycles]
    inside = {slot for cycle in cycles for slot in cycle}
    followers = {on: slot for slot, on in waits.items()}
    for slot in changed:
        if slot not in inside and slot not in waits:  # the head of a chain
            chain = [slot]
            while chain[-1] in followers:
                chain.append(followers[chain[-1]])
            units.append(chain)
    units.sort(key=lambda unit: -len(unit))
    while units:
        free = np.full(int(rank.max()) + 1, room)
        taken: list[int] = []
        for unit in units:
            at_once = unit[0] in inside
            if at_once and any(free[rank[slot]] == 0 for slot in unit):
                continue
            while unit and (new[unit[0]] == EMPTY or free[rank[unit[0]]] > 0):
                slot = unit.pop(0)
                free[rank[slot]] -= new[slot] != EMPTY
                taken.append(slot)
        units = [unit for unit in units if unit]
        yield taken


def _waits(old: IntArray, new: IntArray, changed: Sequence[int]) -> dict[int, int]:
    """Which slot a slot must not change before: one that gains the expert that it loses."""
    stays = set(old[old == new].tolist())
    gains = dict[int, int]()
    for slot in changed:
        if int(new[slot]) != EMPTY:
            gains.setdefault(int(new[slot]), slot)
    waits, done = dict[int, int](), set[int]()
    for slot in changed:
        expert = int(old[slot])
        if expert != EMPTY and expert not in stays and expert not in done:
            done.add(expert)
            waits[slot] = gains[expert]
    return waits


def _cycles(waits: dict[int, int]) -> list[list[int]]:
    seen, cycles = set[int](), []
    for start in waits:
        path = [start]
        while path[-1] in waits and path[-1] not in seen:
            seen.add(path[-1])
            path.append(waits[path[-1]])
        if path[-1] in path[:-1]:
            cycles.append(path[path.index(path[-1]) : -1])
    return cycles


def _twice(cycles: list[list[int]], rank: IntArray) -> tuple[int, int] | None:
    """Two slots of one cycle on one rank, or None."""
    for cycle in cycles:
        first = dict[int, int]()
        for slot in cycle:
            if int(rank[slot]) in first:
                return first[int(rank[slot])], slot
            first[int(rank[slot])] = slot
    return None


def _sourced(
    old: IntArray, new: IntArray, taken: Sequence[int], rank: IntArray, nodes: IntArray
) -> tuple[Copy, ...]:
    """Copies of a stage, each from the same rank, else the same node, else anywhere.

    Of several the rank that sends least so far in the stage.
    """
    sent = np.zeros(int(rank.max()) + 1, dtype=np.int64)
    copies = []
    for slot in taken:
        expert = int(new[slot])
        if expert == EMPTY:
            continue
        to = int(rank[slot])
        holders = np.unique(rank[old == expert])
        far = np.where(holders == to, 0, np.where(nodes[holders] == nodes[to], 1, 2))
        source = int(holders[np.lexsort((holders, sent[holders], far))[0]])
        sent[source] += source != to
        copies.append(Copy(expert=expert, source=source, rank=to, slot=slot))
    return tuple(copies)
