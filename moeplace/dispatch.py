"""How the engine shares an expert's tokens among its replicas.

=================  ============================================================================
even               1 / replicas: vLLM, SGLang `dynamic`, and TensorRT-LLM, whose round robin is
                   even in the long run
weighted           what the plan stores
sglang-static      each source rank uses one replica: its own, else the first on its node (where
                   the expert lies on other nodes too), else one that it is dealt; the ranks
                   left are dealt over all replicas, as evenly as possible
ascend             source rank r uses replica r mod n of n, in slot order (vllm-ascend)
sglang-lp          shares chosen anew by a linear program that balances tokens, not time
=================  ============================================================================

Histograms do not say where tokens come from: every rank is the source of 1 / ranks of them.

`sglang-static` draws by a seed which replicas take one source rank more where ranks do not divide;
here a hash of layer, expert and rank decides it. As fair, but the engine's own draw differs in
which replicas these are. Plans for the rule are sought that are no slower under any draw.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._check import BoolArray, FloatArray, IntArray, frozen, ndim, numbers
from moeplace.errors import PlanError, ProblemError
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem

#: Rules under which every source rank always uses the same replica of an expert.
FIXED = ("sglang-static", "ascend")
#: Multipliers of the hash that deals the ranks left over (SplitMix64, Steele et al. 2014).
MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def shares(problem: Problem, plan: Plan) -> FloatArray:
    """Share of its expert's tokens that each slot takes, [layers, slots] or with windows first.

    Two copies on one rank count as two replicas. Under weighted routing a plan without shares is
    priced evenly, as an engine that was given no shares would run it.

    Raises
    ------
    PlanError
        If the plan stores shares that the routing cannot realise, or for another number of
        windows.
    """
    if plan.split is not None:
        return _stored(problem, plan)
    if problem.routing in FIXED:
        return sources(problem, plan) / problem.ranks
    if problem.routing == "sglang-lp":
        return _token_balancing(problem, plan)
    held = plan.slots != EMPTY
    count = np.take_along_axis(plan.replicas, np.where(held, plan.slots, 0), axis=1)
    return np.where(held, 1.0 / count, 0.0)


def sources(problem: Problem, plan: Plan, draw: int = 0) -> IntArray:
    """Source ranks that use each slot [layers, slots], under a rule of `FIXED`.

    `draw` numbers other draws that sglang-static might make; prices use draw 0.
    """
    held = plan.slots != EMPTY
    layer = np.arange(plan.layers)[:, None]
    expert = np.where(held, plan.slots, 0)
    place = layer * plan.experts + expert  # the expert, in its layer
    count = plan.replicas[layer, expert]
    ranks = problem.ranks
    if problem.routing == "ascend":
        turn = _turn(place, held, np.zeros(place.shape, dtype=np.uint64))
        return np.where(held, ranks // count + (turn < ranks % count), 0)
    rank = np.broadcast_to(plan.rank_of_slot, place.shape)
    node_of = problem.cluster.node_of
    ranks_on = np.bincount(node_of)
    node, nodes = node_of[rank], ranks_on.size
    own = _first(place * ranks + rank, held)
    # ranks of the node that hold the expert, and whether it lies on other nodes too
    holders = np.bincount((place * nodes + node)[own], minlength=plan.layers * plan.experts * nodes)
    spread = (holders.reshape(-1, nodes) > 0).sum(axis=1)[place] > 1
    first = _first(place * nodes + node, held) & spread
    near = np.where(first, ranks_on[node] - holders[place * nodes + node], 0)
    dealt = own + near  # so far; the other source ranks are left
    taken = np.bincount(place[held], weights=dealt[held], minlength=plan.layers * plan.experts)
    left = ranks - taken.astype(np.int64)[place]
    turn = _turn(place, held, _hash((draw * place.size + place) * ranks + rank))
    return np.where(held, dealt + left // count + (turn < left % count), 0)


def waterfill(problem: Problem, plan: Plan, shared: Any) -> Problem:
    """The problem with a shared expert's tokens as base load, on the ranks with fewest tokens.

    So SGLang's waterfill dispatch uses an expert that every rank holds: a free load. It levels
    tokens, not time. Price the plan on what is returned.

    Parameters
    ----------
    problem : Problem
    plan : Plan
    shared : array-like [layers] or [windows, layers]
        Tokens of the shared expert, in the unit of the loads.

    Raises
    ------
    ProblemError
        If `shared` has another shape, or holds a number below 0.
    """
    from moeplace.evaluate import evaluate

    ranks = evaluate(problem, plan).rank_tokens
    passes = problem.loads.passes
    scale = np.ones(problem.windows) if passes is None else passes
    tokens = ranks * scale[:, None, None]
    axes = ("window", "layer")[-max(ndim(shared), 1) :]
    amount = numbers(shared, "Tokens of the shared expert", axes, ProblemError)
    if amount.shape != tokens.shape[:2][-amount.ndim :]:
        raise ProblemError(
            f"Tokens of the shared expert must have the shape {tokens.shape[1:2]} or "
            f"{tokens.shape[:2]}, got {amount.shape}."
        )
    amount = np.broadcast_to(amount, tokens.shape[:2])
    ordered = np.sort(tokens, axis=2)
    # the water level if only the n emptiest ranks are filled; the true one is the least
    levels = (ordered.cumsum(axis=2) + amount[:, :, None]) / np.arange(1, problem.ranks + 1)
    poured = np.maximum(levels.min(axis=2)[:, :, None] - tokens, 0.0)
    return replace(problem, base_load=problem.base * scale[:, None, None] + poured)


def _stored(problem: Problem, plan: Plan) -> FloatArray:
    assert plan.split is not None
    if problem.routing != "weighted":
        raise PlanError(
            f"Plan stores shares but the problem's routing is {problem.routing}: the engine would "
            'ignore them. Drop the shares or set routing="weighted".'
        )
    if plan.split.ndim == 3 and plan.split.shape[0] != problem.windows:
        raise PlanError(
            f"Plan stores shares for {plan.split.shape[0]} windows but the problem has "
            f"{problem.windows}. Re-split the placement for this problem."
        )
    return plan.split


def _token_balancing(problem: Problem, plan: Plan) -> FloatArray:
    """Shares [windows, layers, slots] that level the tokens of the ranks, blind to speeds.

    One of the linear program's optima; batches are taken to be like their window.
    """
    from moeplace.search.flow import shares as flow  # compiled: imported to be used

    split = np.empty((problem.windows, *plan.slots.shape))
    begin = np.concatenate([[0], plan.rank_slots.cumsum()])
    flow(
        problem.tokens,
        frozen(np.zeros(problem.base.shape)),
        frozen(np.ones(problem.base.shape)),
        frozen(np.full(problem.base.shape, np.inf)),
        begin,
        plan.slots,
        split,
    )
    return split


def _first(label: IntArray, held: BoolArray) -> BoolArray:
    """Whether a slot [layers, slots] is the first of its label (labels differ by layer)."""
    first = np.zeros(label.shape, dtype=np.bool_)
    first.ravel()[np.flatnonzero(held)[np.unique(label[held], return_index=True)[1]]] = True
    return first


def _turn(place: IntArray, held: BoolArray, key: npt.NDArray[np.uint64]) -> IntArray:
    """Position of each slot [layers, slots] among its expert's, by key and then slot order."""
    turn = np.zeros(place.shape, dtype=np.int64)
    label = place[held]
    order = np.lexsort((key[held], label))
    size = np.bincount(label)
    begin = size.cumsum() - size
    position = np.empty(label.size, dtype=np.int64)
    position[order] = np.arange(label.size) - begin[label[order]]
    turn[held] = position
    return turn


def _hash(number: IntArray) -> npt.NDArray[np.uint64]:
    """SplitMix64 of whole numbers, as uint64."""
    x = (number.astype(np.uint64) + np.uint64(1)) * np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[1])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[2])
    return x ^ (x >> np.uint64(31))
