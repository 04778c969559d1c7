"""What to solve: loads, cluster, routing, objective and constraints, validated once."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray, frozen, ndim, numbers
from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxMoves,
    MaxOffNode,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.errors import ProblemError
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram

Routing = Literal["even", "weighted", "sglang-static", "ascend", "sglang-lp"]
Objective = Literal["mean", "worst", "cvar"]

_RULES = get_args(Constraint)
_ONCE = (MaxMoves, NodeGroups, TokenCapacity, MaxReplicas, ReplicaBudget, MaxOffNode)
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Problem:
    """Place experts on ranks so that the slowest rank of every layer ends early.

    Parameters
    ----------
    loads : LoadHistogram
    cluster : Cluster
    routing : {"even", "weighted", "sglang-static", "ascend", "sglang-lp"}
        How the engine shares an expert's tokens over its replicas: evenly (vLLM,
        TensorRT-LLM, SGLang dynamic), by shares that the plan chooses, or by an engine's own
        rule (`moeplace.dispatch` has them; "sglang-static" uses the cluster's nodes).
    objective : {"mean", "worst", "cvar"}
        Over windows, of the step time (the sum over layers of the slowest rank's time). CVaR
        is the mean of the worst 1 - `cvar_alpha` of the windows, by their weights.
    constraints : sequence of the classes in `moeplace.constraints`
    base_load : array-like [ranks], [layers, ranks] or [windows, layers, ranks], optional
        Tokens that each rank runs whatever the plan, in the unit of the loads.
    layer_weight : array-like [layers], optional
        Calls per step of each layer; 1 by default.
    window_weight : array-like [windows], optional
        Weights of mean and CVaR, normalised to sum 1; by default the windows' passes, or equal.
    cvar_alpha : float
        From 0 (the mean) up to, but not, 1; used by the objective "cvar" alone.
    name, origin : str
        For people: what it is called, where its numbers come from. Not part of the digest.

    Raises
    ------
    ProblemError
        If a part breaks a rule, or parts do not fit each other, e.g. fewer slots than experts.
    """

    loads: LoadHistogram
    cluster: Cluster
    _: KW_ONLY
    routing: Routing = "even"
    objective: Objective = "mean"
    constraints: Sequence[Constraint] = ()
    base_load: Any = None
    layer_weight: Any = None
    window_weight: Any = None
    cvar_alpha: float = 0.9
    name: str = ""
    origin: str = ""

    def __post_init__(self) -> None:
        for value, kind, name in (
            (self.loads, LoadHistogram, "Loads"),
            (self.cluster, Cluster, "Cluster"),
        ):
            if not isinstance(value, kind):
                raise ProblemError(
                    f"{name} must be a {kind.__name__}, got {type(value).__name__}: "
                    f"build one with moeplace.{kind.__name__}."
                )
        for choice, choices, name in (
            (self.routing, get_args(Routing), "Routing"),
            (self.objective, get_args(Objective), "Objective"),
        ):
            if choice not in choices:
                raise ProblemError(f"{name} must be one of {', '.join(choices)}, got {choice!r}.")
        usable = int(np.minimum(self.cluster.slots, self.experts).sum())
        if usable < self.experts:
            raise ProblemError(
                f"{self.experts} experts do not fit: every expert needs at least one slot, and "
                f"the {self.ranks} ranks offer {usable} usable slots. Add slots or ranks."
            )
        if isinstance(self.constraints, Constraint):
            raise ProblemError(f"Constraints must be a list: give [{self.constraints!r}].")
        constraints = tuple(self.constraints)
        for constraint in constraints:
            if not isinstance(constraint, Constraint):
                raise ProblemError(
                    f"Constraints may be {', '.join(kind.__name__ for kind in _RULES)}, got "
                    f"{type(constraint).__name__}."
                )
        checked: dict[str, Any] = {"constraints": constraints}
        shape = (self.windows, self.layers, self.ranks)
        base = np.zeros(self.ranks) if self.base_load is None else self.base_load
        axes = ("window", "layer", "rank")
        base = numbers(base, "Base load", axes[3 - _axes(base) :], ProblemError)
        if base.shape != shape[3 - base.ndim :]:
            raise ProblemError(
                f"Base load must have the shape {shape[2:]}, {shape[1:]} or {shape} "
                f"(the last axis is the ranks), got {base.shape}."
            )
        checked["base_load"] = base
        for field, axis, size in (
            ("layer_weight", "layer", self.layers),
            ("window_weight", "window", self.windows),
        ):
            given = getattr(self, field)
            if given is None:
                passes = self.loads.passes
                given = np.ones(size) if axis == "layer" or passes is None else passes
            name = field.replace("_", " ").capitalize()
            weight = numbers(given, name, (axis,), ProblemError)
            if weight.shape != (size,):
                raise ProblemError(
                    f"{name} needs one number for each of the {size} {axis}s, got {weight.size}."
                )
            if not weight.any():
                raise ProblemError(f"{name} is 0 everywhere: at least one must be positive.")
            if axis == "window" and abs(math.fsum(weight) - 1.0) > 1e-13:  # else keep the bits
                weight = weight / math.fsum(weight)
                weight.setflags(write=False)
            checked[field] = weight
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        for constraint in constraints:
            constraint.check(self)
        alpha = self.cvar_alpha
        real = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
        if not (real and 0 <= alpha < 1):
            raise ProblemError(
                f"The CVaR alpha must be a number from 0 up to, but not, 1, got {alpha!r}."
            )
        if self.cluster.nonlinear and self.loads.passes is None:
            raise ProblemError(
                "Latency planes and tables need tokens per forward pass: give the loads `passes`, "
                "the number of forward passes in each window."
            )
        for rule in _ONCE:
            if sum(isinstance(constraint, rule) for constraint in constraints) > 1:
                raise ProblemError(f"{rule.__name__} may be given once.")

    @property
    def windows(self) -> int:
        """Number of windows."""
        return self.loads.windows

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return self.loads.layers

    @property
    def experts(self) -> int:
        """Number of logical experts in a layer."""
        return self.loads.experts

    @property
    def ranks(self) -> int:
        """Number of EP ranks."""
        return self.cluster.ranks

    @cached_property
    def tokens(self) -> FloatArray:
        """Tokens per expert [windows, layers, experts]: per forward pass if passes are known."""
        if self.loads.passes is None:
            return self.loads.tokens
        return frozen(self.loads.tokens / self.loads.passes[:, None, None])

    @cached_property
    def base(self) -> FloatArray:
        """Base load [windows, layers, ranks], in the unit of `tokens`."""
        shape = (self.windows, self.layers, self.ranks)
        base = np.broadcast_to(self.base_load, shape)
        if self.loads.passes is not None:
            base = base / self.loads.passes[:, None, None]
        return frozen(base)

    @cached_property
    def fluid(self) -> FloatArray:
        """Fluid bound [windows, layers]: the makespan if tokens could be poured freely."""
        return self.cluster.fluid_seconds(self.tokens.sum(axis=2), self.base)

    @cached_property
    def mean_load(self) -> tuple[FloatArray, FloatArray]:
        """Weighted mean over windows of tokens [layers, experts] and base load [layers, ranks]."""
        return frozen(self.mean(self.tokens)), frozen(self.mean(self.base))

    @cached_property
    def allowed(self) -> BoolArray:
        """Where experts may lie [layers, experts, ranks], by `Forbid` and ranks without slots."""
        shape = (self.layers, self.experts, self.ranks)
        allowed = np.broadcast_to(self.cluster.slots > 0, shape).copy()
        for rule in self.constraints:
            if isinstance(rule, Forbid):
                allowed[_layers(rule.layer), rule.expert, rule.rank] = False
        return allowed

    @cached_property
    def pinned(self) -> BoolArray:
        """Where experts must lie [layers, experts, ranks], by `Pin`."""
        pinned = np.zeros((self.layers, self.experts, self.ranks), dtype=np.bool_)
        for rule in self.constraints:
            if isinstance(rule, Pin):
                pinned[_layers(rule.layer), rule.expert, rule.rank] = True
        return pinned

    @cached_property
    def capacity(self) -> FloatArray:
        """Tokens that each rank may run [ranks], base load included; infinite without a rule."""
        rule = self._only(TokenCapacity)
        return frozen(np.full(self.ranks, np.inf) if rule is None else rule.of(self.ranks))

    @cached_property
    def most_replicas(self) -> IntArray:
        """Most replicas of each expert [experts]: ranks with slots, or fewer by `MaxReplicas`."""
        ranks = int((self.cluster.slots > 0).sum())
        rule = self._only(MaxReplicas)
        return np.minimum(ranks, ranks if rule is None else rule.of(self.experts)) * np.ones(
            self.experts, dtype=np.int64
        )

    @property
    def replica_budget(self) -> int | None:
        """Replicas allowed over all layers, if that is limited."""
        rule = self._only(ReplicaBudget)
        return None if rule is None else int(rule.total)

    @property
    def max_moves(self) -> MaxMoves | None:
        """The move budget, if there is one."""
        return self._only(MaxMoves)

    @property
    def node_groups(self) -> NodeGroups | None:
        """The rule on expert groups, if there is one."""
        return self._only(NodeGroups)

    @property
    def max_off_node(self) -> float | None:
        """Share of the copies of tokens that may leave their node, if that is limited."""
        rule = self._only(MaxOffNode)
        return None if rule is None else float(rule.fraction)

    def _only(self, kind: type[R]) -> R | None:
        return next((rule for rule in self.constraints if isinstance(rule, kind)), None)

    def mean(self, values: FloatArray) -> FloatArray:
        """Weighted mean over windows, [windows, ...] -> [...]."""
        weight = self.window_weight.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray((values * weight).sum(axis=0))

    def step_seconds(self, layer_seconds: FloatArray) -> FloatArray:
        """Sum [windows, layers] over layers with their weights -> [windows]."""
        weighted = layer_seconds * self.layer_weight
        return np.array([math.fsum(row) for row in weighted])

    def total(self, layer_seconds: FloatArray) -> float:
        """Objective of [windows, layers] seconds: mean, worst window or CVaR of the step time.

        The sum over layers comes first: per-layer worst cases are never added. CVaR = min_t t +
        sum_w p_w (z_w - t)+ / (1 - alpha) (Rockafellar and Uryasev 2000), reached at the
        quantile: the worst windows count until their weights fill 1 - alpha.
        """
        steps = self.step_seconds(layer_seconds)
        if self.objective == "worst":
            return float(steps.max())
        return math.fsum(steps * self.risk_weight(steps))

    def risk_weight(self, steps: FloatArray) -> FloatArray:
        """Weights [windows] whose sum with the step times is the objective.

        For mean and CVaR; any other weights that these could be for other times give less.
        """
        if self.objective == "worst":
            return np.where(np.arange(steps.size) == steps.argmax(), 1.0, 0.0)
        if self.objective == "mean":
            return np.asarray(self.window_weight)
        worst = np.argsort(-steps, kind="stable")
        filled = np.minimum(self.window_weight[worst].cumsum() / (1 - self.cvar_alpha), 1.0)
        weight = np.empty(steps.size)
        weight[worst] = np.diff(filled, prepend=0.0)
        return weight

    def aggregate(self) -> "Problem":
        """The same problem on the sum of all windows."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        base = np.broadcast_to(self.base_load, (self.windows, self.layers, self.ranks))
        given |= {"loads": self.loads.aggregate(), "window_weight": None}
        if self.loads.passes is None and np.isfinite(self.capacity).any():  # of a longer window
            rest = [rule for rule in self.constraints if not isinstance(rule, TokenCapacity)]
            given["constraints"] = [*rest, TokenCapacity(self.capacity * self.windows)]
        given |= {"base_load": base.sum(axis=0, keepdims=True)}
        return Problem(**given)

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256(b"moeplace problem 1")
        objective = self.objective
        if objective == "cvar":
            objective += f" {float(self.cvar_alpha)!r}"  # type: ignore[assignment]
        choices = (self.routing, objective, self.cluster.speed_unit)
        rules = sorted(rule.key(self.experts) for rule in self.constraints)
        for key in (*map(str.encode, choices), *rules):
            state.update(key + b"\0")
        cluster = self.cluster
        planes, table = cluster.planes, cluster.table
        for array in (
            self.tokens,
            self.base,
            self.layer_weight,
            self.window_weight,
            cluster.speeds,
            cluster.slots,
            cluster.nodes,
            *(() if planes is None else (planes.startup, planes.activation, planes.compute)),
            *(() if table is None else (table.tokens, table.seconds)),
        ):
            assert array is not None
            state.update(repr((array.dtype.str, array.shape)).encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def digest(self) -> str:
        """SHA-256 over all that changes price or feasibility; equal problems have equal ones."""
        return self._digest


def _axes(value: Any) -> int:
    """Axes of a base load, 1 to 3; ragged lists are refused later, with their place."""
    return min(max(ndim(value), 1), 3)


def _layers(layer: int | None) -> int | slice:
    return slice(None) if layer is None else layer


def check_problem(value: object) -> None:
    """Raise ProblemError unless it is a problem: what most functions take first."""
    if not isinstance(value, Problem):
        raise ProblemError(
            f"A problem must be a moeplace.Problem, got {type(value).__name__}: build one from "
            "loads and a cluster, or read an instance (read_instance)."
        )
