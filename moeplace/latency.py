"""Latency models beyond one speed per rank: a maximum of planes, and a measured table.

`Cluster` holds one of them, or none, and asks it three things: the seconds of tokens and
activated replicas (`seconds`), the knots of what a rank takes at the least for its tokens
(`knots`, from which `tokens_by`, the inverse, and all bounds follow), and its tokens per second
at best. Idle ranks take 0.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray, first, ndim, numbers
from moeplace.errors import ProblemError

#: Tokens [ranks, points], seconds [ranks, points], tokens per second beyond the last [ranks].
Knots = tuple[FloatArray, FloatArray, FloatArray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """Latency of a rank as a maximum of planes in (activated replicas A, tokens n).

    f_g(A, n) = max_k (startup_k + activation_k A + compute_k n / speed_g), and 0 for an idle
    rank. Memory-bound work (startup, activation) is the same on all GPUs of a type; what differs
    between nominally equal ones is compute.

    Parameters
    ----------
    startup : array-like [planes]
        Seconds. May be negative (planes that begin to count at many tokens), but not all.
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
            low = -1e18 if name == "startup" else 0.0
            given = getattr(self, name)
            array = numbers(given, f"Planes' {name}", ("plane",), ProblemError, low=low)
            object.__setattr__(self, name, array)
        sizes = {self.startup.size, self.activation.size, self.compute.size}
        if len(sizes) > 1:
            raise ProblemError(
                "Planes need one startup, activation and compute each: got "
                f"{self.startup.size}, {self.activation.size} and {self.compute.size}."
            )
        if self.startup.max() < 0:
            raise ProblemError(
                "Planes' startup is negative in all planes: one token would take less than none. "
                "At least one must be 0 or more."
            )
        if abs(self.compute.max() - 1.0) > 1e-12:
            raise ProblemError(
                f"Planes' largest compute must be 1, got {self.compute.max():g}: it is a share of "
                "a rank's 1 / speed. Use Cluster.from_planes for seconds per token."
            )

    def seconds(self, tokens: FloatArray, replicas: FloatArray, speeds: FloatArray) -> FloatArray:
        """f_g(A, n) [..., ranks] for tokens and activated replicas [..., ranks]."""
        most = np.zeros(np.broadcast_shapes(tokens.shape, replicas.shape))
        for startup, activation, compute in zip(
            self.startup, self.activation, self.compute, strict=True
        ):
            plane = startup + activation * replicas + compute * (tokens / speeds)
            most = np.maximum(most, plane)
        return np.where((tokens > 0) | (replicas > 0), most, 0.0)

    def knots(self, speeds: FloatArray) -> Knots:
        """Knots of f_g(0, n), the least that n tokens take: the upper hull of the planes."""
        at, height = [0.0], [float(self.startup.max())]
        line = max(zip(self.startup, self.compute, strict=True))
        while True:  # the next line that crosses from below
            cross = [
                ((line[0] - t) / (c - line[1]), float(c), float(t))
                for t, c in zip(self.startup, self.compute, strict=True)
                if c > line[1]
            ]
            if not cross:
                break
            where, c, t = min(cross, key=lambda one: (one[0], -one[1]))
            at.append(float(where))
            height.append(float(line[0] + line[1] * where))
            line = (t, c)
        shape = (speeds.size, len(at))
        return np.outer(speeds, at), np.broadcast_to(height, shape).copy(), speeds / line[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Latency of each rank as a table of its tokens (the ViBE paper's form).

    Linear between the points; before the first its time holds, since a kernel's start costs it
    however few the tokens; beyond the last, the last slope goes on. Times that fall are lifted
    to the highest before them (monotone envelope). An idle rank takes 0.

    Parameters
    ----------
    tokens : array-like [points] or [ranks, points]
        Tokens of one forward pass, ascending, above 0.
    seconds : array-like [ranks, points]

    Raises
    ------
    ProblemError
        If a number is not positive and finite, tokens do not ascend, the shapes differ, or the
        last two times of a rank (envelope taken) are equal, so that nothing beyond them follows.

    Attributes
    ----------
    lifted : array [ranks]
        How many points the envelope lifted.
    """

    tokens: FloatArray
    seconds: FloatArray
    lifted: IntArray = field(init=False)

    def __post_init__(self) -> None:
        axes = ("rank", "point")
        given = self.tokens
        if ndim(given) == 1:
            given = np.broadcast_to(np.asarray(given), (len(self.seconds), np.size(given)))
        tokens = numbers(given, "A table's tokens", axes, ProblemError, strict=True)
        seconds = numbers(self.seconds, "A table's seconds", axes, ProblemError, strict=True)
        if tokens.shape != seconds.shape:
            raise ProblemError(
                "A table needs as many times as points: its tokens have the shape "
                f"{tokens.shape} and its seconds {seconds.shape} ([ranks, points])."
            )
        if (falls := np.diff(tokens, axis=1) <= 0).any():
            rank, point = first(falls)
            raise ProblemError(
                f"A table's tokens must ascend: rank {rank} has {tokens[rank, point]:g} before "
                f"{tokens[rank, point + 1]:g} (point {point + 1}). Sort the points, each once."
            )
        envelope = np.maximum.accumulate(seconds, axis=1)
        if tokens.shape[1] > 1 and (flat := envelope[:, -1] <= envelope[:, -2]).any():
            (rank,) = first(flat)
            raise ProblemError(
                f"A table's last time of rank {rank} is {seconds[rank, -1]:g}, not above the "
                f"times before it ({envelope[rank, -2]:g}): nothing says what more tokens take. "
                "Measure up to more tokens, or leave the last point out."
            )
        envelope.setflags(write=False)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "seconds", envelope)
        object.__setattr__(self, "lifted", (envelope > seconds).sum(axis=1))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return int(self.tokens.shape[0])

    @property
    def rate(self) -> FloatArray:
        """Tokens per second beyond the last point [ranks]."""
        if self.tokens.shape[1] == 1:
            return np.asarray(self.tokens[:, 0] / self.seconds[:, 0])
        step = np.diff(self.tokens[:, -2:], axis=1) / np.diff(self.seconds[:, -2:], axis=1)
        return np.asarray(step[:, 0])

    @property
    def speeds(self) -> FloatArray:
        """Tokens per second at best [ranks], so that n tokens never take less than n / speed.

        n / f(n) is monotone on each piece: it is largest at a point or without end.
        """
        return np.asarray(np.maximum((self.tokens / self.seconds).max(axis=1), self.rate))

    def at(self, tokens: FloatArray) -> FloatArray:
        """f_g(n) [..., ranks] for tokens [..., ranks]."""
        found = np.empty(tokens.shape)
        rate = self.rate
        for g in range(self.ranks):
            n, known, seconds = tokens[..., g], self.tokens[g], self.seconds[g]
            beyond = seconds[-1] + (n - known[-1]) / rate[g]
            found[..., g] = np.where(n > known[-1], beyond, np.interp(n, known, seconds))
        return np.where(tokens > 0, found, 0.0)

    def of(self, ranks: Any) -> "Table":
        """The table of some ranks."""
        return Table(tokens=self.tokens[ranks], seconds=self.seconds[ranks])


def tokens_by(knots: Knots, seconds: FloatArray) -> FloatArray:
    """Most tokens [..., ranks] with a time of at most `seconds` [..., 1 or ranks]; 0 if none."""
    at, height, rate = knots
    shape = np.broadcast_shapes(seconds.shape, rate.shape)
    time = np.broadcast_to(seconds, shape)
    n = (height <= time[..., None]).sum(axis=-1) - 1  # the last knot reached
    rank = np.arange(rate.size)
    below = np.maximum(n, 0)
    above = np.minimum(below + 1, at.shape[1] - 1)
    last = below == at.shape[1] - 1
    rise = np.where(last, 1.0, height[rank, above] - height[rank, below])
    slope = np.where(last, rate, (at[rank, above] - at[rank, below]) / np.where(rise > 0, rise, 1))
    found = at[rank, below] + (time - height[rank, below]) * slope
    return np.where(n < 0, 0.0, found)
