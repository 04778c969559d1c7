"""Whether the constraints leave any placement at all, and if not, why."""

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.bounds import NODES, PLANES, STAY, longest
from moeplace.claims import Bound
from moeplace.constraints import CAPACITY_SLACK, Forbid, Pin
from moeplace.problem import Problem


def explain_infeasible(problem: Problem) -> str | None:
    """Name experts and ranks that clash in some layer, or return None if a placement exists.

    A placement exists iff pins do not contradict forbids, no rank is pinned over its slots, and
    the experts without a pin can be matched to the slots that pins leave (extra replicas never
    help). If they cannot, a minimum cut names experts whose ranks have too few slots (Hall's
    condition): a proof that no plan exists.
    """
    if not problem.constraints:
        return None
    counted = _counting(problem)
    if counted is not None:
        return counted
    if not any(isinstance(rule, Pin | Forbid) for rule in problem.constraints):
        return None
    both = problem.pinned & ~problem.allowed
    if both.any():
        layer, expert, rank = np.argwhere(both)[0]
        cause = "has no slots" if problem.cluster.slots[rank] == 0 else "is forbidden for it"
        return f"layer {layer}: expert {expert} is pinned to rank {rank}, which {cause}."
    copies = problem.pinned.sum(axis=2)  # [layers, experts]
    if (copies > problem.most_replicas).any():
        layer, expert = np.argwhere(copies > problem.most_replicas)[0]
        return (
            f"layer {layer}: expert {expert} is pinned to {copies[layer, expert]} ranks and may "
            f"have {problem.most_replicas[expert]} replicas."
        )
    pins = problem.pinned.sum(axis=1)  # [layers, ranks]
    over = pins > problem.cluster.slots
    if over.any():
        layer, rank = np.argwhere(over)[0]
        return (
            f"layer {layer}: {pins[layer, rank]} experts are pinned to rank {rank}, which has "
            f"{problem.cluster.slots[rank]} slots."
        )
    known: set[bytes] = set()  # most layers have the same rules
    for layer in range(problem.layers):
        rules = problem.pinned[layer].tobytes() + problem.allowed[layer].tobytes()
        if rules in known:
            continue
        known.add(rules)
        clash = _unmatched(problem, layer, problem.cluster.slots - pins[layer])
        if clash is not None:
            experts, ranks, free = clash
            return (
                f"layer {layer}: {len(experts)} experts ({_some(experts)}) may lie only on "
                f"{len(ranks)} ranks ({_some(ranks)}), where pins leave {free} slots."
            )
    return None


def refuted(problem: Problem, bound: Bound) -> str | None:
    """Name a layer whose bound is above every makespan: token capacities leave no placement."""
    most = longest(problem, problem.tokens, problem.base) * (1 + CAPACITY_SLACK)
    over = (bound.per_layer > most) & (bound.source != PLANES) & (bound.source != STAY)
    if not over.any():
        return None
    window, layer = np.argwhere(over)[0]
    return (
        f"layer {layer}: in window {window} no placement obeys the token capacities, whatever its "
        f"makespan (by the bound {str(bound.source[window, layer]).removeprefix(NODES)!r})."
    )


def _counting(problem: Problem) -> str | None:
    """Sums that no plan can meet: replicas in all, and tokens that ranks may run."""
    budget, least = problem.replica_budget, np.maximum(problem.pinned.sum(axis=2), 1).sum()
    if budget is not None and budget < least:
        return (
            f"{problem.layers} layers of {problem.experts} experts, pins counted, need {least} "
            f"replicas, and the budget is {budget}."
        )
    rules = problem.max_moves
    if rules is not None:
        received = _least_received(problem)
        over = received > rules.allowance()
        if over.any():
            first = int(over.argmax())
            return (
                f"layer {first}: pins and forbids need {received[first]} copies to be received, "
                f"and at most {rules.allowance()[first]} may be."
            )
        if rules.total is not None and received.sum() > rules.total:
            return (
                f"pins and forbids need {received.sum()} copies to be received in all layers, and "
                f"at most {rules.total} may be."
            )
    most = problem.max_off_node
    if most is not None:
        least = least_off_node(problem)
        if (least > most + 1e-9).any():
            window, layer = np.unravel_index(np.argmax(least), least.shape)
            return (
                f"layer {layer}: under {problem.routing} routing at least "
                f"{least[window, layer]:.6g} of the copies in window {window} leave their node "
                f"whatever the plan, and at most {most:g} may."
            )
    capacity = problem.capacity
    if not np.isfinite(capacity).any():
        return None
    over = problem.base > capacity * (1 + CAPACITY_SLACK)
    if over.any():
        window, layer, rank = np.argwhere(over)[0]
        return (
            f"layer {layer}: the base load of rank {rank} in window {window}, "
            f"{problem.base[window, layer, rank]:.12g} tokens, is above its capacity of "
            f"{capacity[rank]:.12g}."
        )
    room = np.where(problem.cluster.slots > 0, np.maximum(capacity - problem.base, 0.0), 0.0)
    short = problem.tokens.sum(axis=2) > room.sum(axis=2) * (1 + CAPACITY_SLACK)
    if short.any():
        window, layer = np.argwhere(short)[0]
        return (
            f"layer {layer}: {problem.tokens[window, layer].sum():.12g} tokens in window {window} "
            f"are more than the {room[window, layer].sum():.12g} that the ranks' token capacities "
            "leave beside their base load."
        )
    return None


def _least_received(problem: Problem) -> IntArray:
    """Copies [layers] that any plan receives: pins, and experts that may stay nowhere."""
    rules = problem.max_moves
    assert rules is not None
    held = rules.current.held()
    pinned = (problem.pinned & ~held).sum(axis=2)  # [layers, experts]
    homeless = ~(held & problem.allowed).any(axis=2)
    received: IntArray = np.maximum(pinned, homeless).sum(axis=1)
    return received


def least_off_node(problem: Problem) -> FloatArray:
    """Share of copies that leave their node under any plan, at least [windows, layers].

    A copy stays with the share of ranks that are on the nodes it may go to. Where dispatch knows
    nothing of nodes that is at most the largest node's share, n; sglang-static serves a node that
    holds a replica there, so each spare slot keeps at most n of one expert's copies more.
    """
    on = np.bincount(problem.cluster.node_of)
    stays = on.max() / problem.ranks
    if problem.routing == "ascend":
        return np.zeros(problem.tokens.shape[:2])
    kept = np.full(problem.tokens.shape[:2], stays)
    total = problem.tokens.sum(axis=2)
    if problem.routing == "sglang-static":
        spare = int(np.minimum(problem.cluster.slots, problem.experts).sum()) - problem.experts
        hot = -np.sort(-problem.tokens, axis=2)
        often = np.repeat(hot, on.size - 1, axis=2)[:, :, :spare].sum(axis=2)
        kept += stays * often / np.where(total > 0, total, 1.0)
    return np.asarray(np.where(total > 0, np.maximum(1 - kept, 0.0), 0.0))


def _unmatched(
    problem: Problem, layer: int, free: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> tuple[list[int], list[int], int] | None:
    """Experts and the only ranks open to them, if their free slots are too few."""
    homeless = np.flatnonzero(~problem.pinned[layer].any(axis=1))
    if _taken_in(problem.allowed[layer, homeless], free):
        return None
    import networkx as nx  # only needed here, and slow to import

    graph: nx.DiGraph[object] = nx.DiGraph()
    for rank in range(problem.ranks):
        graph.add_edge(("rank", rank), "sink", capacity=int(free[rank]))
    for expert in homeless.tolist():
        graph.add_edge("source", ("expert", expert), capacity=1)
        for rank in np.flatnonzero(problem.allowed[layer, expert]).tolist():
            graph.add_edge(("expert", expert), ("rank", rank))  # unbounded: no cut runs here
    if homeless.size == 0:
        return None
    flow, (side, _) = nx.minimum_cut(graph, "source", "sink")
    if flow == homeless.size:
        return None
    experts = sorted(node[1] for node in side if node[0] == "expert")
    ranks = np.flatnonzero(problem.allowed[layer, experts].any(axis=0)).tolist()
    return experts, ranks, int(free[ranks].sum())


def _taken_in(allowed: BoolArray, free: IntArray) -> bool:
    """Whether each expert [experts, ranks] finds a slot one by one, those with least choice first.

    If not, they may still all find one.
    """
    left = free.copy()
    for row in allowed[np.argsort(allowed.sum(axis=1), kind="stable")]:
        rank = int(np.where(row, left, 0).argmax())
        if not row[rank] or left[rank] <= 0:
            return False
        left[rank] -= 1
    return True


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:6])) + (", ..." if len(ids) > 6 else "")
