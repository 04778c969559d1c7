"""Fit latency models to measured times: of `moeplace calibrate`, or traces of production.

One model for all GPUs of a type, f(A, n) = max_k (t_k + w_k A + c_k r_g n): what differs between
them is the slowness r_g of compute. Parameters are never negative, so that f is monotone. A
single plane (with hinges in n: convex and separable) is one linear program, least sum of relative
errors. The maximum of two planes alternates: each sample is assigned to the plane that is highest
there, and one linear program asks that plane not to be below it and no plane to be above it
(convex-concave procedure: the error never rises), from several starts.

Forms and their errors on public measurements: docs/hardware.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.errors import ProblemError
from moeplace.fit_shapes import SHAPES
from moeplace.hardware import Cluster
from moeplace.latency import Table
from moeplace.samples import Samples

Model = Literal["speed", "offset", "plane", "hinges", "planes", "table"]

#: Bootstrap draws, and the part of them that an interval holds.
DRAWS, LEVEL = 400, 0.95
#: Samples further off than so many robust standard deviations, and this at least, are outliers.
OUTLYING, FAR = 8.0, 0.25
#: Folds of the cross-validation; turns of planes and slowness.
FOLDS, ROUNDS = 5, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A latency model, and how well it fits.

    Attributes
    ----------
    model : str
    planes : array [planes, 3], or None
        t in s, w in s per activated replica, c in s per token, of a GPU of slowness 1.
    table : Table or None
        [gpus, points], of the model "table".
    slowness : array [gpus]
        r_g, geometric mean 1; equal for GPUs that cannot be told apart.
    intervals : array [gpus, 2]
        Bootstrap intervals of each GPU's own slowness (points drawn together for all GPUs).
    tied : array [gpus]
        Number of the group of GPUs that count as equal.
    mean_error, max_error : float
        Relative errors in sample.
    cv_mean, cv_max : float
        The same at points left out (folds over points, all GPUs together); nan if too few.
    outliers : array
        Samples that were left out as outliers.
    """

    samples: Samples
    model: Model
    planes: FloatArray | None
    table: Table | None
    slowness: FloatArray
    intervals: FloatArray
    tied: IntArray
    mean_error: float
    max_error: float
    cv_mean: float
    cv_max: float
    outliers: IntArray

    def seconds(self, samples: Samples) -> FloatArray:
        """What the model says [samples]."""
        if self.table is not None:
            every = self.table.at(np.tile(samples.tokens[:, None], self.table.ranks))
            return np.asarray(every[np.arange(samples.gpu.size), samples.gpu])
        assert self.planes is not None
        return _value(self.planes, self.slowness, samples)

    def cluster(self, slots: Any, nodes: Any = 1, gpus: Sequence[int] | None = None) -> Cluster:
        """A cluster whose ranks are these GPUs (by default all, in their order)."""
        which = np.arange(self.slowness.size) if gpus is None else np.asarray(gpus)
        if self.table is not None:
            table = self.table.of(which)
            return Cluster.from_table(table.tokens, table.seconds, slots, nodes)
        assert self.planes is not None
        t, w, c = self.planes.T
        if self.model == "speed":
            return Cluster.from_speeds(1 / (c[0] * self.slowness[which]), slots, nodes)
        return Cluster.from_planes(t, w, c, self.slowness[which], slots, nodes)


def fit(samples: Samples, model: Model = "planes", *, seed: int = 0) -> Fit:
    """Fit a latency model, after leaving outliers out.

    Parameters
    ----------
    samples : Samples
    model : {"speed", "offset", "plane", "hinges", "planes", "table"}
        c r_g n; t + c r_g n; t + w A + c r_g n; the same with hinges in n; the maximum of two
        planes; a table of each GPU over its tokens, at the most activated replicas of each.
    seed : int
        Of starts and bootstrap.

    Raises
    ------
    ProblemError
        If there are too few samples, or their times do not rise with tokens.
    """
    if model not in get_args(Model):
        raise ProblemError(f"Model must be one of {', '.join(get_args(Model))}, got {model!r}.")
    if np.unique(samples.point).size < 3:
        raise ProblemError(
            f"A fit needs at least 3 points (activated, tokens), got "
            f"{np.unique(samples.point).size}. Measure more."
        )
    shape = "planes" if model == "table" else model
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ProblemError(f"The seed must be a whole number from 0, got {seed!r}.")
    planes, slowness = _fitted(samples, "planes", seed)  # the form that fits best names outliers
    keep = _near(samples, _value(planes, slowness, samples))
    kept = samples.take(keep)
    if not (keep.all() and shape == "planes"):
        planes, slowness = _fitted(kept, shape, seed)
    slowness, intervals, tied = _told_apart(kept, planes, slowness, seed)
    table = _table(kept) if model == "table" else None
    result = Fit(
        samples=samples,
        model=model,
        planes=None if table is not None else planes,
        table=table,
        slowness=slowness,
        intervals=intervals,
        tied=tied,
        mean_error=0.0,
        max_error=0.0,
        cv_mean=float("nan"),
        cv_max=float("nan"),
        outliers=np.flatnonzero(~keep),
    )
    error = np.abs(result.seconds(kept) / kept.seconds - 1)
    held_out = _held_out(kept, model, seed, planes)
    return replace(
        result,
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        cv_mean=float(held_out.mean()) if held_out.size else float("nan"),
        cv_max=float(held_out.max()) if held_out.size else float("nan"),
    )


def _value(planes: FloatArray, slowness: FloatArray, samples: Samples) -> FloatArray:
    """max_k (t_k + w_k A + c_k r_g n) [samples]."""
    tokens = samples.tokens * slowness[samples.gpu]
    t, w, c = planes.T[:, :, None]
    return np.asarray((t + w * samples.activated + c * tokens).max(axis=0))


def _near(samples: Samples, value: FloatArray) -> BoolArray:
    """Which samples are no outliers; all, if the form fits so badly that none can be named."""
    off = value / samples.seconds - 1
    usual = 1.4826 * float(np.median(np.abs(off - np.median(off))))
    near = np.abs(off - np.median(off)) <= max(OUTLYING * usual, FAR)
    least = np.bincount(samples.gpu[near], minlength=samples.gpus).min()
    return near if usual < FAR and least >= 3 and near.mean() > 0.9 else np.ones_like(near)


def _fitted(
    samples: Samples, model: str, seed: int, planes: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Planes [planes, 3] and slowness [gpus], in turns, from planes next to which to look."""
    slowness = _first_slowness(samples)
    for _ in range(ROUNDS if samples.gpus > 1 else 1):
        tokens = samples.tokens * slowness[samples.gpu]
        planes = SHAPES[model](samples.activated, tokens, samples.seconds, seed, planes)
        if planes[:, 2].max() <= 0:
            raise ProblemError(
                "The times do not rise with tokens: no latency model of tokens fits. Measure up "
                "to more tokens."
            )
        own = _own_slowness(samples, planes, slowness, np.ones(samples.gpu.size))
        changed = np.abs(own / slowness - 1).max()
        slowness = own
        if changed < 1e-4:
            break
    assert planes is not None
    return planes, slowness


def _first_slowness(samples: Samples) -> FloatArray:
    """Median time over the mean time of all GPUs at the same point, where tokens are many."""
    point = samples.point
    count = np.bincount(point)
    mean = np.bincount(point, weights=np.log(samples.seconds)) / np.maximum(count, 1)
    ratio = np.log(samples.seconds) - mean[point]
    found = np.zeros(samples.gpus)
    for gpu in range(samples.gpus):
        mine = (samples.gpu == gpu) & (count[point] == count.max())
        if mine.any():
            many = mine & (samples.tokens >= np.median(samples.tokens[mine]))
            found[gpu] = np.median(ratio[many])
    return np.asarray(np.exp(found - found.mean()))


def _own_slowness(
    samples: Samples, planes: FloatArray, slowness: FloatArray, weight: FloatArray
) -> FloatArray:
    """Each GPU's slowness [gpus], geometric mean 1, by the planes.

    The weighted median of what each sample alone would say, by how much its time depends on it:
    the minimum of the sum of relative errors next to the planes' present values.
    """
    t, w, c = planes.T[:, :, None]
    rest = t + w * samples.activated
    each = rest + c * samples.tokens * slowness[samples.gpu]
    top = each.argmax(axis=0)
    at = np.arange(top.size)
    slope = c[top, 0] * samples.tokens
    says = (samples.seconds - rest[top, at]) / np.maximum(slope, 1e-300)
    says = np.clip(says, 0.05, 20.0)
    weight = weight * slope / samples.seconds
    found = np.ones(samples.gpus)
    for gpu in range(samples.gpus):
        mine = np.flatnonzero((samples.gpu == gpu) & (weight > 0))
        if mine.size:
            order = mine[np.argsort(says[mine], kind="stable")]
            half = weight[order].cumsum()
            found[gpu] = says[order[np.searchsorted(half, half[-1] / 2)]]
    return np.asarray(found / np.exp(np.log(found).mean()))


def _told_apart(
    samples: Samples, planes: FloatArray, slowness: FloatArray, seed: int
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Slowness with ties, intervals [gpus, 2] and groups [gpus].

    Points are drawn with replacement, the same for all GPUs, so that what the model misses alike
    on all of them cancels. GPUs in order of slowness join a group while all intervals share a
    value.
    """
    generator = np.random.default_rng(seed)
    points = int(samples.point.max()) + 1
    draws = np.empty((DRAWS, samples.gpus))
    for n in range(DRAWS):
        drawn = np.bincount(generator.integers(points, size=points), minlength=points)
        weight = drawn[samples.point].astype(np.float64)
        draws[n] = _own_slowness(samples, planes, slowness, weight)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    low, high = np.minimum(low, slowness), np.maximum(high, slowness)
    equal, group = ties(slowness, low, high)
    return equal, np.stack([low, high], axis=1), group


def ties(slowness: FloatArray, low: FloatArray, high: FloatArray) -> tuple[FloatArray, IntArray]:
    """Slowness [gpus] with those made equal whose intervals share a value, and their groups."""
    group = np.zeros(slowness.size, dtype=np.int64)
    number, least, most = 0, -np.inf, np.inf
    for gpu in np.argsort(slowness, kind="stable").tolist():
        if max(least, low[gpu]) > min(most, high[gpu]):
            number, least, most = number + 1, -np.inf, np.inf
        least, most = max(least, low[gpu]), min(most, high[gpu])
        group[gpu] = number
    mean = np.bincount(group, weights=np.log(slowness)) / np.bincount(group)
    return np.exp(mean[group]), group


def _held_out(samples: Samples, model: Model, seed: int, planes: FloatArray) -> FloatArray:
    """Relative errors at points that the fit did not see; empty if there are too few."""
    points = np.unique(samples.point)
    if points.size < 2 * FOLDS:
        return np.zeros(0)
    fold = np.random.default_rng(seed).permutation(points.size) % FOLDS
    errors = []
    for n in range(FOLDS):
        out = fold[np.searchsorted(points, samples.point)] == n
        if np.setdiff1d(samples.gpu, samples.gpu[~out]).size:
            continue
        known, new = samples.take(~out), samples.take(out)
        try:
            if model == "table":
                every = _table(known).at(np.tile(new.tokens[:, None], samples.gpus))
                value = every[np.arange(new.gpu.size), new.gpu]
            else:
                value = _value(*_fitted(known, model, seed, planes), new)
        except ProblemError:
            continue
        errors.append(np.abs(value / new.seconds - 1))
    return np.concatenate(errors) if errors else np.zeros(0)


def _table(samples: Samples) -> Table:
    """Times of each GPU over its tokens, at the most activated replicas of each, all GPUs' points.

    A GPU that lacks a point of the others gets it by interpolation; a last time that does not
    rise is left out.
    """
    rows = []
    for gpu in range(samples.gpus):
        mine = samples.gpu == gpu
        tokens = np.unique(samples.tokens[mine])
        times = []
        for n in tokens:
            at = mine & (samples.tokens == n)
            most = at & (samples.activated == samples.activated[at].max())
            times.append(float(np.median(samples.seconds[most])))
        rows.append((tokens, np.maximum.accumulate(times)))
    known = np.unique(np.concatenate([tokens for tokens, _ in rows]))
    seconds = np.stack([np.interp(known, tokens, times) for tokens, times in rows])
    while known.size > 1 and (seconds[:, -1] <= seconds[:, -2]).any():
        known, seconds = known[:-1], seconds[:, :-1]
    return Table(tokens=np.tile(known, (samples.gpus, 1)), seconds=seconds)
