"""What a plan must obey beyond slots: small frozen classes that check a plan.

Each class checks itself against a problem (`check`), lists its `violations` in a plan, given
the tokens [windows, layers, ranks] that ranks run under it, and has a `key` for the problem's
digest. Planners read them as arrays: `Problem.allowed`, `pinned`, `capacity`, `most_replicas`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeplace._check import FloatArray, IntArray, integers, ndim, numbers
from moeplace.errors import PlanError, ProblemError
from moeplace.hardware import Cluster
from moeplace.plan import EMPTY, Plan

if TYPE_CHECKING:
    from moeplace.problem import Problem

#: A rank may exceed its token capacity by this share: rounding of shares.
CAPACITY_SLACK = 1e-9


@dataclass(frozen=True)
class _Pair:
    """One expert and one rank, in one layer or (layer None) in all."""

    expert: int
    rank: int
    layer: int | None = None

    def __post_init__(self) -> None:
        for name in ("expert", "rank", "layer"):  # numpy's whole numbers are as good
            value = getattr(self, name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if expert, rank or layer does not exist."""
        limits: tuple[tuple[str, int, int], ...]
        limits = (("expert", self.expert, problem.experts), ("rank", self.rank, problem.ranks))
        if self.layer is not None:
            limits += (("layer", self.layer, problem.layers),)
        for name, value, limit in limits:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
                raise ProblemError(
                    f"{self} names {name} {value!r}: {name}s are whole numbers from 0 to "
                    f"{limit - 1}."
                )

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return repr(self).encode()

    def _held(self, plan: Plan) -> Iterator[tuple[int, bool]]:
        rank_slots = plan.slots[:, plan.rank_of_slot == self.rank]
        held = (rank_slots == self.expert).any(axis=1)
        for layer in range(plan.layers) if self.layer is None else [self.layer]:
            yield layer, bool(held[layer])


@dataclass(frozen=True)
class Pin(_Pair):
    """The expert must have a replica on the rank (others elsewhere are allowed)."""

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each layer that breaks the rule."""
        return [
            f"layer {layer}: expert {self.expert} is pinned to rank {self.rank} but not there"
            for layer, held in self._held(plan)
            if not held
        ]


@dataclass(frozen=True)
class Forbid(_Pair):
    """The expert must have no replica on the rank."""

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each layer that breaks the rule."""
        return [
            f"layer {layer}: expert {self.expert} is forbidden on rank {self.rank} but there"
            for layer, held in self._held(plan)
            if held
        ]


@dataclass(frozen=True, eq=False)
class MaxMoves:
    """At most so many copies may be received, compared with the current plan.

    Parameters
    ----------
    current : Plan
        What the ranks hold now.
    per_layer : int, optional
        Copies that all ranks together may receive in each layer.
    total : int, optional
        The same over all layers.
    """

    current: Plan
    per_layer: int | None = None
    total: int | None = None

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if a limit is negative or the current plan has another shape."""
        if not isinstance(self.current, Plan):
            raise ProblemError(
                f"MaxMoves needs the current Plan, got {type(self.current).__name__}."
            )
        for name, value in (("per_layer", self.per_layer), ("total", self.total)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                raise ProblemError(f"MaxMoves {name} must be a whole number from 0, got {value!r}.")
        mine = (self.current.layers, self.current.experts, self.current.rank_slots.tolist())
        if mine != (problem.layers, problem.experts, problem.cluster.slots.tolist()):
            raise ProblemError(
                "MaxMoves: the current plan has other layers, experts or slots per rank than "
                "the problem. Give the plan that the ranks hold now."
            )

    def allowance(self) -> IntArray:
        """Copies that each layer may receive [layers], the total aside."""
        most = self.current.slots.shape[1]
        limit = most if self.per_layer is None else min(self.per_layer, most)
        return np.full(self.current.layers, limit, dtype=np.int64)

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        limits = f"max moves {self.per_layer} {self.total} "
        return limits.encode() + self.current.slots.tobytes()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each layer over its limit, and one for the total."""
        try:
            moves = plan.moves_from(self.current).sum(axis=1)
        except PlanError as cause:
            return [str(cause)]
        found = []
        if self.per_layer is not None:
            found = [
                f"layer {layer}: {moves[layer]} copies are received, at most {self.per_layer} may"
                for layer in np.flatnonzero(moves > self.per_layer)
            ]
        if self.total is not None and moves.sum() > self.total:
            found.append(f"{moves.sum()} copies are received in all, at most {self.total} may")
        return found


@dataclass(frozen=True, eq=False)
class NodeGroups:
    """All replicas of an expert group lie on one node (group-limited routing).

    Parameters
    ----------
    groups : array-like [experts], or int
        Group of each expert, counted from 0; or a number of equal groups of consecutive experts.
    """

    groups: IntArray | int

    def of(self, experts: int) -> IntArray:
        """Group of each expert [experts].

        Raises
        ------
        ProblemError
            If the experts do not divide into that many groups, or the array has another length.
        """
        if isinstance(self.groups, int | np.integer):
            if not 1 <= self.groups <= experts or experts % self.groups:
                raise ProblemError(
                    f"{experts} experts do not divide into {self.groups} equal groups: give a "
                    f"divisor of {experts}, or the group of each expert."
                )
            return np.arange(experts) // (experts // self.groups)
        groups = integers(
            self.groups, "Expert groups", ("expert",), ProblemError, low=0, high=experts - 1
        )
        if groups.size != experts:
            raise ProblemError(
                f"Expert groups need one entry for each of the {experts} experts, "
                f"got {groups.size}."
            )
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if the groups do not fit the experts."""
        self.of(problem.experts)

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return b"node groups " + self.of(experts).tobytes()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each layer and group that lies on several nodes."""
        assert cluster.nodes is not None
        groups = self.of(plan.experts)
        node = cluster.nodes[plan.rank_of_slot]
        lies = np.zeros((plan.layers, int(groups.max()) + 1, int(node.max()) + 1), dtype=np.bool_)
        layer, slot = np.nonzero(plan.slots != EMPTY)
        lies[layer, groups[plan.slots[layer, slot]], node[slot]] = True
        return [
            f"layer {layer}: expert group {group} lies on nodes "
            f"{np.flatnonzero(lies[layer, group]).tolist()}, one is allowed"
            for layer, group in np.argwhere(lies.sum(axis=2) > 1)
        ]


@dataclass(frozen=True, eq=False)
class TokenCapacity:
    """A rank runs at most so many tokens of a layer in each window, base load included.

    Parameters
    ----------
    tokens : array-like [ranks], or number
        In the unit of `Problem.tokens`: per forward pass if passes are known.
    """

    tokens: FloatArray | float

    def of(self, ranks: int) -> FloatArray:
        """Capacity of each rank [ranks].

        Raises
        ------
        ProblemError
            If one is negative or not a number, or the array has another length.
        """
        given = np.full(ranks, self.tokens) if ndim(self.tokens) == 0 else self.tokens
        tokens = numbers(given, "Token capacity", ("rank",), ProblemError)
        if tokens.size != ranks:
            raise ProblemError(
                f"Token capacity needs one number for each of the {ranks} ranks, got {tokens.size}."
            )
        return tokens

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if the capacities do not fit the ranks."""
        self.of(problem.ranks)

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return b"token capacity " + np.asarray(self.tokens, dtype=np.float64).tobytes()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each window, layer and rank over its capacity."""
        capacity = self.of(cluster.ranks)
        over = tokens > capacity * (1 + CAPACITY_SLACK)
        return [
            f"layer {layer}: rank {rank} runs {tokens[window, layer, rank]:.12g} tokens in window "
            f"{window}, its capacity is {capacity[rank]:.12g}"
            for window, layer, rank in np.argwhere(over)
        ]


@dataclass(frozen=True, eq=False)
class MaxReplicas:
    """An expert has at most so many replicas in each layer.

    Parameters
    ----------
    limit : int, or array-like [experts]
    """

    limit: IntArray | int

    def of(self, experts: int) -> IntArray:
        """Most replicas of each expert [experts].

        Raises
        ------
        ProblemError
            If a limit is below 1, or the array has another length.
        """
        given: object = np.full(experts, self.limit) if ndim(self.limit) == 0 else self.limit
        limit = integers(given, "Most replicas", ("expert",), ProblemError, low=1, high=1 << 20)
        if limit.size != experts:
            raise ProblemError(
                f"Most replicas need one entry for each of the {experts} experts, got {limit.size}."
            )
        return limit

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if the limits do not fit the experts."""
        self.of(problem.experts)

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return b"max replicas " + self.of(experts).tobytes()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence for each layer and expert over its limit."""
        limit = self.of(plan.experts)
        return [
            f"layer {layer}: expert {expert} has {plan.replicas[layer, expert]} replicas, at most "
            f"{limit[expert]} are allowed"
            for layer, expert in np.argwhere(plan.replicas > limit)
        ]


@dataclass(frozen=True)
class ReplicaBudget:
    """All layers together hold at most so many replicas, first copies included: memory.

    Parameters
    ----------
    total : int
        At least layers x experts, else no plan exists.
    """

    total: int

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if the total is not a whole number."""
        if isinstance(self.total, bool) or not isinstance(self.total, int | np.integer):
            raise ProblemError(f"ReplicaBudget needs a whole number, got {self.total!r}.")
        if self.total < 1:
            raise ProblemError(f"ReplicaBudget must be at least 1, got {self.total}.")

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return f"replica budget {int(self.total)}".encode()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """One sentence if there are too many replicas."""
        held = int((plan.slots != EMPTY).sum())
        if held <= self.total:
            return []
        return [f"{held} replicas are held in all layers, at most {self.total} may be"]


@dataclass(frozen=True)
class MaxOffNode:
    """In each layer and window at most a share of the copies of tokens leaves its node.

    Copies as in `topology.traffic`, under the problem's routing. Where dispatch knows nothing of
    nodes (even, weighted, sglang-lp) and nodes are of equal size, every plan sends the same share;
    under sglang-static and ascend plans are sought that keep more. It sees experts one by one:
    experts that fire together are for `affinity.gather`.

    Parameters
    ----------
    fraction : float
        From 0 to 1.
    """

    fraction: float

    def check(self, problem: "Problem") -> None:
        """Raise ProblemError if the fraction is not one."""
        real = isinstance(self.fraction, int | float | np.number)
        if isinstance(self.fraction, bool) or not (real and 0 <= self.fraction <= 1):
            raise ProblemError(f"MaxOffNode must be a number from 0 to 1, got {self.fraction!r}.")

    def key(self, experts: int) -> bytes:
        """Bytes that are equal for equal rules."""
        return f"max off node {float(self.fraction)!r}".encode()

    def violations(self, plan: Plan, cluster: Cluster, tokens: FloatArray) -> list[str]:
        """Nothing: tokens of ranks do not say it; `evaluate` asks `topology` instead."""
        return []


Constraint = (
    Pin | Forbid | MaxMoves | NodeGroups | TokenCapacity | MaxReplicas | ReplicaBudget | MaxOffNode
)
