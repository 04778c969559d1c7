"""Statistics of benchmarks: paired intervals, shifted geometric means, performance profiles.

The unit is the instance: seeds of one instance are averaged first, since they are not independent.
A run that did not reach its goal in time is censored: its time is unknown, only longer than the
limit, so it is counted as not reached and never as a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import ProblemError

#: Instances below which an interval is told with a warning.
FEW = 30


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A geometric mean of ratios, and where it lies by the bootstrap."""

    estimate: float
    low: float
    high: float
    instances: int
    level: float

    def __str__(self) -> str:
        """Estimate and interval; says where there are few instances."""
        few = "" if self.instances >= FEW else f", {self.instances} instances only"
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]{few}"


def shifted_geometric_mean(values: Any, shift: float) -> float:
    """exp(mean(log(values + shift))) - shift: a mean that neither tail rules.

    Parameters
    ----------
    values : array-like [instances]
        At least 0.
    shift : float
        In the unit of the values, positive if one of them is 0: what counts as small.

    Raises
    ------
    ProblemError
        If there are no values, or one plus the shift is not positive.
    """
    given = np.asarray(values, dtype=float)
    if given.size == 0:
        raise ProblemError("A mean needs at least one value.")
    shifted = given + shift
    if not (np.isfinite(shifted).all() and (shifted > 0).all() and shift >= 0):
        raise ProblemError(
            f"Values plus the shift must be positive and finite, got {given.min()!r} and a shift "
            f"of {shift!r}."
        )
    return float(np.exp(np.log(shifted).mean()) - shift)


def paired_ratio(
    one: Any, other: Any, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Interval:
    """Geometric mean of one / other over instances, with a percentile bootstrap interval.

    Instances are drawn with replacement, both methods' values together: what makes an instance
    hard for both cancels (Efron and Tibshirani 1993, chapter 8).

    Parameters
    ----------
    one, other : array-like [instances]
        Positive values of two methods on the same instances.
    seed, draws : int
    level : float
        Share of draws that the interval holds.

    Raises
    ------
    ProblemError
        If the two have no values, different numbers of them, or one is not positive.
    """
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ProblemError(
            f"Pairs need as many values of one method as of the other, at least one: got "
            f"{first.size} and {second.size}."
        )
    if not ((first > 0).all() and (second > 0).all() and np.isfinite([first, second]).all()):
        raise ProblemError("Ratios need positive, finite values.")
    if not 0 < level < 1:
        raise ProblemError(f"The level must lie between 0 and 1, got {level!r}.")
    logs = np.log(first) - np.log(second)
    generator = np.random.default_rng(seed)
    drawn = logs[generator.integers(logs.size, size=(draws, logs.size))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        estimate=math.exp(logs.mean()), low=math.exp(low), high=math.exp(high),
        instances=logs.size, level=level,
    )  # fmt: skip


def performance_profile(seconds: Any, reached: Any) -> tuple[FloatArray, FloatArray]:
    """Share of instances that each method reaches within a factor of the fastest one.

    Dolan and More (2002). Runs that did not reach the goal never count, whatever their time; an
    instance that no method reached lowers all.

    Parameters
    ----------
    seconds : array-like [methods, instances]
        Time to the goal, positive; ignored where it was not reached.
    reached : array-like of bool [methods, instances]

    Returns
    -------
    factors : array [points]
        Ascending from 1.
    shares : array [methods, points]

    Raises
    ------
    ProblemError
        If the shapes differ, or a time that counts is not positive.
    """
    times, done = np.asarray(seconds, dtype=float), np.asarray(reached, dtype=np.bool_)
    if times.shape != done.shape or times.ndim != 2 or times.size == 0:
        raise ProblemError(
            f"A profile needs times and marks [methods, instances], got {times.shape} and "
            f"{done.shape}."
        )
    if not (times[done] > 0).all():
        raise ProblemError("Times must be positive where the goal was reached.")
    known = np.where(done, times, np.inf)
    best = known.min(axis=0)
    anyone = np.isfinite(best)
    ratio = np.full(times.shape, np.inf)
    ratio[:, anyone] = known[:, anyone] / best[anyone]
    factors = np.unique(np.append(ratio[np.isfinite(ratio)], 1.0))
    return factors, _shares(ratio, factors)


def solved_within(seconds: Any, reached: Any, at: Any) -> FloatArray:
    """Share of instances solved within each of the times `at`, [methods, times].

    With one time limit for all, censored runs are counted as not solved at any time up to it.
    """
    known = np.where(np.asarray(reached, np.bool_), np.asarray(seconds, float), np.inf)
    return _shares(known, np.asarray(at, dtype=float))


def _shares(values: FloatArray, at: FloatArray) -> FloatArray:
    ordered = np.sort(values, axis=1)
    counts = np.array([np.searchsorted(row, at, side="right") for row in ordered], dtype=float)
    return np.asarray(counts / values.shape[1])


def by_instance(values: FloatArray, instances: Sequence[str]) -> tuple[list[str], FloatArray]:
    """Mean of values with one name each, by name in order of appearance."""
    names = list(dict.fromkeys(instances))
    label = np.asarray(instances)
    return names, np.array([values[label == name].mean() for name in names])
