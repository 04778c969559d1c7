"""What the tokens run on: EP ranks, their slots, nodes and latency.

The latency model lives here and nowhere else: `Cluster.seconds` says how long each rank takes
for its tokens and activated replicas, and `Cluster.fluid_seconds` is its inverse summed over
ranks. It is one speed per rank, or `Planes` on top of that: a maximum of planes in (activated
replicas, tokens).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import FloatArray, IntArray, integers, ndim, numbers
from moeplace.errors import ProblemError

SpeedUnit = Literal["tokens/s", "relative"]

MAX_SLOTS = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """Latency of a rank as a maximum of planes in (activated replicas A, tokens n).

    f_g(A, n) = max_k (startup_k + activation_k A + compute_k n / speed_g), and 0 for an idle
    rank. Memory-bound work (startup, activation) is the same on all GPUs of a type; what differs
    between nominally equal ones is compute.

    Parameters
    ----------
    startup : array-like [planes]
        Seconds.
    activation : array-like [planes]
        Seconds for each replica that runs at least one token.
    compute : array-like [planes]
        Share of a rank's 1 / speed that a token takes; the largest is 1.

    Raises
    ------
    ProblemError
        If a number is negative or not finite, or the three do not have one entry a plane.
    """

    startup: FloatArray
    activation: FloatArray
    compute: FloatArray

    def __post_init__(self) -> None:
        for name in ("startup", "activation", "compute"):
            array = numbers(getattr(self, name), f"Planes' {name}", ("plane",), ProblemError)
            object.__setattr__(self, name, array)
        sizes = {self.startup.size, self.activation.size, self.compute.size}
        if len(sizes) > 1:
            raise ProblemError(
                "Planes need one startup, activation and compute each: got "
                f"{self.startup.size}, {self.activation.size} and {self.compute.size}."
            )
        if abs(self.compute.max() - 1.0) > 1e-12:
            raise ProblemError(
                f"Planes' largest compute must be 1, got {self.compute.max():g}: it is a share of "
                "a rank's 1 / speed. Use Cluster.from_planes for seconds per token."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """EP ranks: how fast each is and how many experts it holds.

    Parameters
    ----------
    speeds : array-like [ranks]
        Tokens per second of each rank, or relative speeds (1 / relative time).
    slots : array-like [ranks]
        Expert slots of each rank, redundant ones included. 0 is allowed: such a rank
        carries only its base load.
    nodes : array-like [ranks], optional
        Node of each rank, counted from 0; all on one node by default.
    speed_unit : {"tokens/s", "relative"}
        With relative speeds, times are in token units (tokens of a rank of speed 1) and
        are never called seconds.
    planes : Planes, optional
        What a rank takes besides tokens / speed; needs speeds in tokens/s.

    Raises
    ------
    ProblemError
        If a speed is zero, negative or not finite, slots are negative, all are 0, or the
        three do not have one entry for each rank.
    """

    speeds: FloatArray
    slots: IntArray
    nodes: IntArray | None = None
    speed_unit: SpeedUnit = "tokens/s"
    planes: Planes | None = None

    def __post_init__(self) -> None:
        speeds = numbers(
            self.speeds, "Speeds", ("rank",), ProblemError, low=1e-9, high=1e18, strict=True
        )
        slots = integers(self.slots, "Slots", ("rank",), ProblemError, low=0, high=MAX_SLOTS)
        given: Any = np.zeros(speeds.size) if self.nodes is None else self.nodes
        nodes = integers(given, "Nodes", ("rank",), ProblemError, low=0, high=MAX_SLOTS)
        for name, array in (("slots", slots), ("nodes", nodes)):
            if array.shape != speeds.shape:
                raise ProblemError(
                    f"Cluster has {speeds.size} speeds but {array.size} {name}: "
                    "give one of each for every rank."
                )
        if not slots.any():
            raise ProblemError("Slots are 0 on every rank: at least one rank must hold experts.")
        if self.speed_unit not in get_args(SpeedUnit):
            raise ProblemError(
                f"Speed unit must be one of {', '.join(get_args(SpeedUnit))}, "
                f"got {self.speed_unit!r}."
            )
        if self.planes is not None and self.speed_unit != "tokens/s":
            raise ProblemError(
                "Planes are in seconds, so speeds must be in tokens/s, not relative ones."
            )
        object.__setattr__(self, "speeds", speeds)
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "nodes", nodes)

    @classmethod
    def from_speeds(
        cls,
        speeds: Any,
        slots: Any,
        nodes: Any = 1,
        speed_unit: SpeedUnit = "tokens/s",
    ) -> "Cluster":
        """Build a cluster from speeds [ranks], with one slot count for all and equal nodes.

        Parameters
        ----------
        speeds : array-like [ranks]
        slots : int or array-like [ranks]
        nodes : int or array-like [ranks]
            A number of equal nodes of consecutive ranks, or the node of each rank.
        speed_unit : {"tokens/s", "relative"}

        Raises
        ------
        ProblemError
            As the class does, and if the ranks do not divide into that many nodes.
        """
        ranks = np.size(speeds) if ndim(speeds) >= 0 else 1  # ragged: the class refuses it
        if ndim(slots) == 0:
            slots = np.full(ranks, slots)
        if ndim(nodes) == 0:
            if not (isinstance(nodes, int | np.integer) and nodes >= 1 and ranks % nodes == 0):
                raise ProblemError(
                    f"{ranks} ranks do not divide into {nodes} equal nodes: give a divisor of "
                    f"{ranks}, or the node of each rank."
                )
            nodes = np.arange(ranks) // (ranks // nodes)
        return cls(speeds=speeds, slots=slots, nodes=nodes, speed_unit=speed_unit)

    @classmethod
    def from_planes(
        cls, startup: Any, activation: Any, compute: Any, slowness: Any, slots: Any, nodes: Any = 1
    ) -> "Cluster":
        """Build a cluster of f_g = max_k (t_k + w_k A + c_k r_g n).

        Parameters
        ----------
        startup, activation, compute : array-like [planes]
            t in seconds, w in seconds per activated replica, c in seconds per token.
        slowness : array-like [ranks]
            r: relative time of each rank's compute.
        slots, nodes
            As in `from_speeds`.

        Raises
        ------
        ProblemError
            As `Planes` and the class do, and if no plane has a positive compute term.
        """
        axes = ("plane",)
        compute = numbers(compute, "Planes' compute", axes, ProblemError)
        steepest = float(compute.max())
        if steepest <= 0:
            raise ProblemError("At least one plane needs a positive compute term, all are 0.")
        slow = numbers(slowness, "Slowness", ("rank",), ProblemError, strict=True)
        built = cls.from_speeds(1.0 / (steepest * slow), slots, nodes)
        planes = Planes(startup=startup, activation=activation, compute=compute / steepest)
        return replace(built, planes=planes)

    @property
    def ranks(self) -> int:
        """Number of EP ranks."""
        return self.speeds.size

    @property
    def total_slots(self) -> int:
        """Number of expert slots over all ranks."""
        return int(self.slots.sum())

    @property
    def time_unit(self) -> str:
        """What times are in: seconds, or token units when speeds are only relative."""
        return "s" if self.speed_unit == "tokens/s" else "token units"

    def activated(self, slot_tokens: FloatArray) -> FloatArray | None:
        """Expected activated replicas [..., ranks] for tokens [..., ranks, slots] of one pass.

        A replica that n tokens of a pass choose on average runs with probability 1 - exp(-n).
        None where latency does not depend on it.
        """
        if self.planes is None:
            return None
        return np.asarray(-np.expm1(-slot_tokens).sum(axis=-1))

    def seconds(self, tokens: FloatArray, activated: FloatArray | None = None) -> FloatArray:
        """Time of each rank for its tokens and activated replicas, [..., ranks] -> the same."""
        if self.planes is None:
            return tokens / self.speeds
        replicas = np.zeros(1) if activated is None else activated
        most = np.zeros(np.broadcast_shapes(tokens.shape, replicas.shape))
        planes = self.planes
        for startup, activation, compute in zip(
            planes.startup, planes.activation, planes.compute, strict=True
        ):
            plane = startup + activation * replicas + compute * (tokens / self.speeds)
            most = np.maximum(most, plane)
        return np.where((tokens > 0) | (replicas > 0), most, 0.0)

    def fluid_seconds(self, tokens: FloatArray, base: FloatArray) -> FloatArray:
        """Makespan if tokens could be poured freely over the ranks on top of their base load.

        By speed alone: `Planes` add to it (see `bounds.planes`).

        Parameters
        ----------
        tokens : array [...]
            Tokens of a layer.
        base : array [..., ranks]
            Tokens that each rank must run whatever the plan.

        Returns
        -------
        array [...]
            Least T with sum over ranks with slots of (T v_g - b_g)+ >= tokens, and at least
            every rank's base time. No plan can be faster: it is the fluid bound.
        """
        base_seconds = base / self.speeds
        if not base.any():
            return np.asarray(tokens / self.speeds[self.slots > 0].sum())
        holds = self.slots > 0
        level = np.where(holds, base_seconds, np.inf)
        order = np.argsort(level, axis=-1, kind="stable")
        level = np.take_along_axis(level, order, axis=-1)
        speed = np.where(holds, self.speeds, 0.0)[order].cumsum(axis=-1)
        filled = np.take_along_axis(np.where(holds, base, 0.0), order, axis=-1).cumsum(axis=-1)
        # With the n lowest ranks in use the level is (tokens + their base) / their speed; the
        # true one is the least of these, since adding a rank that stays dry only raises it.
        reached = (tokens[..., None] + filled) / speed
        fluid = np.where(np.isfinite(level), reached, np.inf).min(axis=-1)
        return np.asarray(np.maximum(fluid, base_seconds.max(axis=-1)))
