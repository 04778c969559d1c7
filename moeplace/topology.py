"""How much of the traffic of a plan leaves the rank, and the node, where a token is.

Every rank is the source of 1 / ranks of the tokens. Where the dispatch rule knows nothing of the
source (even, weighted, sglang-lp), a copy of a token stays on its rank with probability 1 / ranks
whatever the plan: replicas buy locality only under a rule that looks for near ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.dispatch import FIXED, shares
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import check_fits, evaluate
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem, check_problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What leaves rank and node, for each token of a layer.

    Attributes
    ----------
    problem : Problem
    off_rank, off_node : array [windows, layers]
        Expected copies of a token that leave its rank, its node. From a trace, off-node copies
        to one node count once.
    copies : float
        Experts of each token.
    """

    problem: Problem
    off_rank: FloatArray
    off_node: FloatArray
    copies: float

    def bytes_per_token(
        self, hidden: int, dispatch_bytes: float = 2.0, combine_bytes: float = 2.0
    ) -> tuple[float, float]:
        """Bytes that leave rank and node for each token, over all layers and back.

        Mean over windows by their weights; layers count by theirs.

        Parameters
        ----------
        hidden : int
            Hidden size of the model.
        dispatch_bytes, combine_bytes : float
            Bytes of a number on the way to the experts (fp8: 1) and back (bf16: 2).
        """
        for name, value in (
            ("hidden size", hidden),
            ("dispatch bytes", dispatch_bytes),
            ("combine bytes", combine_bytes),
        ):
            if not value > 0:
                raise ProblemError(f"The {name} must be above 0, got {value!r}.")
        size = hidden * (dispatch_bytes + combine_bytes)
        weight = self.problem.layer_weight
        off_rank, off_node = (
            float((self.problem.mean(off) * weight).sum() * size)
            for off in (self.off_rank, self.off_node)
        )
        return off_rank, off_node


def traffic(problem: Problem, plan: Plan, top_k: float = 1.0) -> Traffic:
    """Traffic of a plan from the histogram: copies of a token are told apart, also to one node.

    Parameters
    ----------
    top_k : float
        Experts of each token, which the histogram does not say; 1 gives shares of copies.

    Raises
    ------
    PlanError
        If the plan does not fit the problem.
    ProblemError
        If `top_k` is out of range.
    """
    check_fits(problem, plan)
    check_top_k(problem, top_k)
    tokens = problem.tokens
    total = tokens.sum(axis=2)
    stays_on = [np.zeros(total.shape), np.zeros(total.shape)]
    for layer in range(problem.layers):
        rank, node = _stays(problem, plan, layer)
        for stays, on in zip(stays_on, (rank, node), strict=True):
            stays[:, layer] = (tokens[:, layer] * on).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        off = [np.where(total > 0, 1 - np.minimum(s / total, 1.0), 0.0) * top_k for s in stays_on]
    return Traffic(problem=problem, off_rank=off[0], off_node=off[1], copies=float(top_k))


def trace_traffic(problem: Problem, plan: Plan, trace: Any) -> Traffic:
    """Traffic of a plan on a token trace; copies of one token to one node cross to it once.

    Token t comes from rank t mod ranks.

    Parameters
    ----------
    problem : Problem
        With one window (`aggregate` it): the trace is not cut into windows.
    trace : array-like [tokens, layers, k]
        Experts of each token.

    Raises
    ------
    ProblemError
        If the trace does not fit the problem, or that has several windows.
    """
    check_fits(problem, plan)
    trace = checked_trace(problem, trace)
    if problem.windows != 1:
        raise ProblemError(
            f"A trace is one window, the problem has {problem.windows}: use problem.aggregate()."
        )
    nodes = problem.cluster.node_of
    source = np.arange(trace.shape[0]) % problem.ranks
    off_rank, off_node = np.empty((1, problem.layers)), np.empty((1, problem.layers))
    for layer in range(problem.layers):
        experts = trace[:, layer]
        goes = _to_nodes(problem, plan, layer)  # [sources, experts, nodes]
        mine = source % goes.shape[0]
        avoided = np.ones((trace.shape[0], goes.shape[2]))
        for choice in range(trace.shape[2]):
            avoided *= 1 - goes[mine, experts[:, choice]]
        avoided[np.arange(trace.shape[0]), nodes[source]] = 1.0
        off_node[0, layer] = (1 - avoided).sum(axis=1).mean()
        own = _own(problem, plan, layer)
        off_rank[0, layer] = (1 - own[source[:, None], experts]).sum(axis=1).mean()
    return Traffic(
        problem=problem, off_rank=off_rank, off_node=off_node, copies=float(trace.shape[2])
    )


def check_top_k(problem: Problem, top_k: float) -> None:
    """Raise ProblemError unless a token can go to so many experts, a mean number."""
    if not 0 < top_k <= problem.experts:
        raise ProblemError(
            f"Experts of each token (top-k) must be above 0 and at most the {problem.experts} "
            f"experts of a layer, got {top_k!r}."
        )


def rank_plans(
    problem: Problem,
    plans: Sequence[Plan],
    *,
    alpha: float,
    beta: float,
    hidden: int,
    tokens: float,
    top_k: float = 1.0,
) -> list[tuple[float, Plan]]:
    """Plans by objective + alpha x off-rank bytes + beta x off-node bytes, best first.

    Parameters
    ----------
    alpha, beta : float
        Time for each byte that leaves a rank and, beyond that, a node.
    hidden : int
        As in `Traffic.bytes_per_token`.
    tokens : float
        Tokens in what the objective is the time of (a forward pass, or a window).
    top_k : float
        As in `traffic`.
    """
    check_problem(problem)
    if not (alpha >= 0 and beta >= 0 and tokens >= 0):
        raise ProblemError(
            f"Prices of bytes and tokens must be at least 0, got {alpha!r}, {beta!r}, {tokens!r}."
        )
    priced = []
    for plan in plans:
        rank, node = traffic(problem, plan, top_k).bytes_per_token(hidden)
        cost = evaluate(problem, plan).objective + tokens * (alpha * rank + beta * node)
        priced.append((float(cost), plan))
    return sorted(priced, key=lambda one: one[0])


def checked_trace(problem: Problem, trace: Any) -> IntArray:
    """The trace as int64 [tokens, layers, k], or ProblemError if it does not fit the problem."""
    array = np.asarray(trace)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iu":
        raise ProblemError(
            f"A trace must hold whole numbers [tokens, layers, k], got {array.dtype} of shape "
            f"{array.shape}."
        )
    if array.shape[1] != problem.layers:
        raise ProblemError(
            f"The trace has {array.shape[1]} layers, the problem {problem.layers}: select the same."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= problem.experts:
        raise ProblemError(
            f"The trace names the expert {low if low < 0 else high}: experts are 0 to "
            f"{problem.experts - 1}."
        )
    return array.astype(np.int64)


def off_node_excess(problem: Problem, plan: Plan, fraction: float) -> FloatArray:
    """By how much the share of copies off their node is above `fraction`, [windows, layers]."""
    off = traffic(problem, plan).off_node
    return np.asarray(np.where(off > fraction + 1e-9, off - fraction, 0.0))


def _stays(problem: Problem, plan: Plan, layer: int) -> tuple[FloatArray, FloatArray]:
    """Probability that a copy stays on its rank and on its node, [windows or 1, experts]."""
    ranks, nodes = problem.ranks, problem.cluster.node_of
    if problem.routing in FIXED:
        goes = _to_nodes(problem, plan, layer)
        source = np.arange(goes.shape[0])
        on = goes[source, :, nodes[source]].mean(axis=0)
        return _own(problem, plan, layer).mean(axis=0)[None], on[None]
    share = shares(problem, plan)
    share = (share[None] if share.ndim == 2 else share)[:, layer]
    held = plan.slots[layer] != EMPTY
    near = np.bincount(nodes)[nodes[plan.rank_of_slot]] / ranks
    on_node = np.zeros((share.shape[0], problem.experts))
    for window, row in enumerate(share):
        on_node[window] = np.bincount(
            plan.slots[layer][held], (row * near)[held], minlength=problem.experts
        )
    return np.full_like(on_node, 1 / ranks), on_node


def _own(problem: Problem, plan: Plan, layer: int) -> FloatArray:
    """Probability [sources, experts] that a token of a rank is served there."""
    ranks = problem.ranks
    if problem.routing not in FIXED:
        share = _one_window(problem, plan)[layer]
        return _table(plan, layer, share, plan.rank_of_slot, ranks, problem.experts)
    if problem.routing == "sglang-static":
        one = np.ones(plan.slots.shape[1])
        held = _table(plan, layer, one, plan.rank_of_slot, ranks, problem.experts)
        return np.minimum(held, 1.0)
    return _table(plan, layer, *_ascend(plan, layer, ranks), ranks, problem.experts)


def _to_nodes(problem: Problem, plan: Plan, layer: int) -> FloatArray:
    """Probability [sources, experts, nodes] that a token goes to a node; 1 source if all alike."""
    nodes, experts = problem.cluster.node_of, problem.experts
    count = int(nodes.max()) + 1
    slot_node = nodes[plan.rank_of_slot]
    if problem.routing == "ascend":
        turn, number = _turns(plan, layer)
        goes = np.zeros((problem.ranks, experts, count))
        for slot in np.flatnonzero(plan.slots[layer] != EMPTY):
            sources = np.arange(turn[slot], problem.ranks, number[slot])
            goes[sources, plan.slots[layer, slot], slot_node[slot]] = 1.0
        return goes
    if problem.routing != "sglang-static":
        share = _one_window(problem, plan)[layer]
        return _table(plan, layer, share, slot_node, count, experts).T[None]
    share = 1.0 / np.maximum(plan.replicas[layer], 1)[np.maximum(plan.slots[layer], 0)]
    fair = _table(plan, layer, share, slot_node, count, experts).T  # [experts, nodes]
    here = np.eye(count)[nodes]  # [sources, nodes]
    near = fair.T[nodes] > 0  # [sources, experts]: the node has a replica
    return np.where(near[:, :, None], here[:, None, :], fair)


def _one_window(problem: Problem, plan: Plan) -> FloatArray:
    """Shares [layers, slots] in the problem's only window, or the same in all."""
    share = shares(problem, plan)
    if share.ndim == 3 and share.shape[0] > 1:
        raise PlanError("Shares differ between windows: aggregate the problem, and re-split.")
    return share if share.ndim == 2 else share[0]


def _table(
    plan: Plan, layer: int, values: FloatArray, label: IntArray, labels: int, experts: int
) -> FloatArray:
    """Sum a layer's slot values [slots] by label and expert -> [labels, experts]."""
    held = plan.slots[layer] != EMPTY
    place = label[held] * experts + plan.slots[layer][held]
    table = np.bincount(place, values[held], minlength=labels * experts).astype(np.float64)
    return table.reshape(labels, experts)


def _turns(plan: Plan, layer: int) -> tuple[IntArray, IntArray]:
    """Position of each slot among its expert's, and their number, [slots]."""
    row = plan.slots[layer]
    order = np.argsort(row, kind="stable")
    begin = np.searchsorted(row[order], row[order])
    turn = np.empty(row.size, dtype=np.int64)
    turn[order] = np.arange(row.size) - begin
    return turn, plan.replicas[layer][np.maximum(row, 0)]


def _ascend(plan: Plan, layer: int, ranks: int) -> tuple[FloatArray, IntArray]:
    """Whether each slot's own rank uses it (1 or 0), and that rank, [slots]."""
    turn, number = _turns(plan, layer)
    rank = plan.rank_of_slot
    return (rank % np.maximum(number, 1) == turn).astype(np.float64), rank
