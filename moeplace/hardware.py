"""What the tokens run on: EP ranks, their slots, nodes and latency.

`Cluster.seconds` says how long each rank takes for its tokens and activated replicas,
`Cluster.tokens_by` how many tokens it can run by then, and `Cluster.fluid_seconds` is that
inverse summed over ranks. The model is one speed per rank, or one of `moeplace.latency`: `Planes`
in (activated replicas, tokens), or a `Table` of tokens for each rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import FloatArray, IntArray, frozen, integers, ndim, numbers
from moeplace.errors import ProblemError
from moeplace.latency import Knots, Planes, Table, tokens_by

SpeedUnit = Literal["tokens/s", "relative"]

MAX_SLOTS = 1 << 20


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
    table : Table, optional
        Times of each rank by its tokens; `speeds` must then be `Table.speeds`, the tokens per
        second at best, and in tokens/s (`from_table` sees to it).

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
    table: Table | None = None

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
        if self.nonlinear and self.speed_unit != "tokens/s":
            raise ProblemError(
                "Planes and tables are in seconds, so speeds must be in tokens/s, not relative."
            )
        if self.table is not None:
            if self.planes is not None:
                raise ProblemError("Cluster has planes and a table: give one latency model.")
            if self.table.ranks != speeds.size:
                raise ProblemError(
                    f"Cluster has {speeds.size} ranks but the table has {self.table.ranks}: "
                    "give one row of times for each rank."
                )
            if not np.allclose(speeds, self.table.speeds, rtol=1e-9, atol=0.0):
                raise ProblemError(
                    "With a table, speeds must be its tokens per second at best "
                    f"({self.table.speeds.tolist()}), got {speeds.tolist()}. "
                    "Use Cluster.from_table, or leave the speeds of an instance file out."
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

    @classmethod
    def from_table(cls, tokens: Any, seconds: Any, slots: Any, nodes: Any = 1) -> "Cluster":
        """Build a cluster whose ranks take measured times.

        Parameters
        ----------
        tokens : array-like [points] or [ranks, points]
        seconds : array-like [ranks, points]
        slots, nodes
            As in `from_speeds`.

        Raises
        ------
        ProblemError
            As `Table` and the class do.
        """
        table = Table(tokens=tokens, seconds=seconds)
        return replace(cls.from_speeds(table.speeds, slots, nodes), table=table)

    @classmethod
    def from_profile(
        cls,
        file: Any,
        slots: Any,
        nodes: Any = 1,
        *,
        uuids: Sequence[str] | None = None,
        hosts: Sequence[str] | None = None,
        model: str = "planes",
        **wanted: Any,
    ) -> "Cluster":
        """Build a cluster of the GPUs that ranks have, by the times of a profile.

        Parameters
        ----------
        file : path or Profile
            Of `moeplace calibrate`.
        slots, nodes
            As in `from_speeds`.
        uuids : sequence of str [ranks], optional
            Device of each rank: ranks change GPUs when a job restarts. By default the devices of
            the latest measuring job, in its order.
        hosts : sequence of str [ranks], optional
            Machine of each rank; not compared by default.
        model : str
            As in `moeplace.fit.fit`; GPUs that cannot be told apart count as equal.
        **wanted
            What else `moeplace.profile.match` takes: phase, kernel, dtype, now, max_age_days.

        Returns
        -------
        Cluster
            With equal relative speeds, and one warning logged, where an entry is missing, stale
            or measured otherwise than the others.

        Raises
        ------
        FormatError
            If the file cannot be read.
        ProblemError
            If it has no devices and none are given, or the fit or the class refuses.
        """
        from moeplace.fit import fit
        from moeplace.profile import Profile, match, measured_devices, read_profile
        from moeplace.samples import Samples

        profile = file if isinstance(file, Profile) else read_profile(file)
        devices = measured_devices(profile) if uuids is None else list(uuids)
        if not devices:
            raise ProblemError(
                "The profile has no devices, and no uuids are given: nothing says how many ranks "
                "there are. Calibrate, or give the device of each rank."
            )
        entries = match(profile, devices, hosts=hosts, **wanted).entries
        if entries is None:
            return cls.from_speeds(np.ones(len(devices)), slots, nodes, "relative")
        return fit(Samples.of(entries), model).cluster(slots, nodes)  # type: ignore[arg-type]

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
        if self.table is not None:
            return self.table.at(tokens)
        if self.planes is None:
            return tokens / self.speeds
        replicas = np.zeros(1) if activated is None else activated
        return self.planes.seconds(tokens, replicas, self.speeds)

    @property
    def nonlinear(self) -> bool:
        """Whether latency is more than tokens / speed, so that the scale of loads matters."""
        return self.planes is not None or self.table is not None

    @cached_property
    def node_of(self) -> IntArray:
        """Nodes of the ranks [ranks], counted from 0 without gaps."""
        assert self.nodes is not None  # set on construction
        node = np.unique(self.nodes, return_inverse=True)[1].astype(np.int64)
        node.setflags(write=False)
        return node

    @cached_property
    def knots(self) -> Knots:
        """Corners of what n tokens take a rank at the least, whatever it activates."""
        if self.table is not None:
            knots = self.table.tokens, self.table.seconds, self.table.rate
        elif self.planes is not None:
            knots = self.planes.knots(self.speeds)
        else:
            nothing = np.zeros((self.ranks, 1))
            knots = nothing, nothing, self.speeds
        at, height, rate = (frozen(array) for array in knots)
        return at, height, rate

    def tokens_by(self, seconds: FloatArray) -> FloatArray:
        """Most tokens of each rank that take at most `seconds` [..., 1 or ranks]; 0 if none.

        Whatever it activates: the inverse of the least time. For a table that is not convex it
        is the inverse of its monotone envelope, which is all that bounds need.
        """
        return tokens_by(self.knots, seconds)

    def of(self, ranks: Any) -> "Cluster":
        """The cluster of some ranks, nodes as they are."""
        assert self.nodes is not None
        return replace(
            self,
            speeds=self.speeds[ranks],
            slots=self.slots[ranks],
            nodes=self.nodes[ranks],
            table=None if self.table is None else self.table.of(ranks),
        )

    def fluid_seconds(self, tokens: FloatArray, base: FloatArray) -> FloatArray:
        """Makespan if tokens could be poured freely over the ranks on top of their base load.

        Whatever ranks activate: that adds to it under `Planes` (see `planes_bound.planes`).

        Parameters
        ----------
        tokens : array [...]
            Tokens of a layer.
        base : array [..., ranks]
            Tokens that each rank must run whatever the plan.

        Returns
        -------
        array [...]
            Least T with sum over ranks with slots of (tokens_by(T)_g - b_g)+ >= tokens, and at
            least every rank's base time. No plan can be faster: it is the fluid bound.
        """
        if self.nonlinear:
            return self._poured(tokens, base)
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

    def _poured(self, tokens: FloatArray, base: FloatArray) -> FloatArray:
        """`fluid_seconds` by bisection: any monotone model."""
        holds = self.slots > 0
        low = self.seconds(base).max(axis=-1)
        low = np.broadcast_to(low, np.broadcast_shapes(low.shape, tokens.shape)).copy()

        def short(seconds: FloatArray) -> FloatArray:
            room = np.maximum(self.tokens_by(seconds[..., None]) - base, 0.0)
            return np.asarray(room[..., holds].sum(axis=-1) < tokens)

        open_ = short(low)
        high = np.maximum(low, tokens / self.speeds[holds].sum())  # never enough, but above 0
        while (more := short(high)).any():
            low, high = np.where(more, high, low), np.where(more, 2 * high, high)
        for _ in range(60):
            middle = 0.5 * (low + high)
            more = short(middle)
            low, high = np.where(more, middle, low), np.where(more, high, middle)
            if (high - low <= 1e-15 * high).all():
                break
        return np.where(open_, high, low)
