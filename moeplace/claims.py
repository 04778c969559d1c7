"""Bounds as data: proven layer by layer, and what solvers claim beyond."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moeplace._check import FloatArray
from moeplace.problem import Problem

#: Who tried every placement of a tiny layer.
EXHAUSTIVE = "exhaustive"


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """A bound on windows or layers together: what a solver claims, or our exhaustive search.

    Of a solver's, the problem alone shows nothing.

    Attributes
    ----------
    layers : tuple of int
    weight : array [windows] or None
        No plan has a smaller sum over these layers and all windows of weight x layer weight x
        makespan, prices below included. None: of the problem's objective, over all layers.
    value : float
    by : str
        Method, solver and version; or EXHAUSTIVE, of one layer: then it is recomputed.
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
class Prices:
    """What a layer's ranks charge in one window; see `dual_bound`. None is negative.

    Attributes
    ----------
    token : array [ranks]
        Of a token.
    slot : array [ranks]
        Of a replica.
    cut : array [cuts, ranks]
        Of a replica with more than 1 / (k + 1) of the rank's room, k = 1, 2, ...
    copy, replica : float
        Of a received copy, and of a replica wherever it lies.
    worth : array [parts, experts]
        Of a token of each expert, by node under `NodeGroups`; unused under even routing.
    """

    token: FloatArray
    slot: FloatArray
    cut: FloatArray
    copy: float
    replica: float
    worth: FloatArray


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
        What solvers claim beyond; `total` uses them, nothing else does. Our own among them count
        in `recomputed`, too.
    prices : mapping of (window, layer) to Prices
        What the argument "lp dual" needs.
    """

    per_layer: FloatArray
    source: np.ndarray[tuple[int, int], np.dtype[np.str_]]
    total: float
    coupled: bool = False
    claims: tuple[Claim, ...] = ()
    proven: float | None = None
    prices: Mapping[tuple[int, int], Prices] = field(default_factory=dict)

    @property
    def recomputed(self) -> float:
        """The part of `total` that `recompute` can check without believing a solver."""
        return self.total if self.proven is None else self.proven

    @property
    def sources(self) -> dict[str, int]:
        """How many (window, layer) pairs each argument decides, most first.

        Then how many layers were searched in all windows together.
        """
        counts = dict(Counter(self.source.ravel().tolist()).most_common())
        together = {claim.layers for claim in own(self.claims)}
        return counts | ({f"{EXHAUSTIVE}, all windows": len(together)} if together else {})


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
    total = max(bound.total, claimed(problem, bound.per_layer, every))
    proven = max(bound.recomputed, claimed(problem, bound.per_layer, own(every)))
    return replace(bound, total=total, claims=every, proven=proven)


def own(claims: Sequence[Claim]) -> list[Claim]:
    """Those that are no solver's word: they can be checked again."""
    return [claim for claim in claims if claim.by == EXHAUSTIVE]


def claimed(problem: Problem, per_layer: FloatArray, claims: Sequence[Claim]) -> float:
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
