"""Slowness of ranks from layer totals, where only the slowest rank of each pass is seen.

A layer's total says when its slowest rank ended, not which one it was: of all others it is only
known that they were faster (censored data). Each rank's time is taken as (t + w A + c_g n) times
lognormal noise, independent between ranks; the likelihood of a total y is that of the largest of
them, sum_g phi(z_g) prod_{h != g} Phi(z_h), z_g = (log y - log f_g) / sigma. It is maximised over
t, w, c_g and sigma, with a weak prior that draws c_g to their mean, for ranks that were never the
slowest. Intervals come from the curvature there; GPUs whose intervals share a value are tied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeplace._check import FloatArray, IntArray, numbers
from moeplace.errors import ProblemError
from moeplace.fit import ties

#: Standard deviation of log c_g about their mean, before anything is seen.
PRIOR = 0.3
#: A rank of which less than this is known, against the others, does not count for their mean.
KNOWN = 0.1
#: Passes below which nothing is said.
LEAST = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Passive:
    """What layer totals say about ranks.

    Attributes
    ----------
    startup, activation : float
        s, s per activated replica.
    compute : float
        s per token of a rank of slowness 1.
    slowness : array [ranks]
        Geometric mean 1, of the ranks that much is known of; equal for ranks that cannot be told
        apart.
    intervals : array [ranks, 2]
        95 % intervals of each rank's own slowness.
    tied : array [ranks]
        Number of the group of ranks that count as equal.
    noise : float
        Standard deviation of log seconds.
    slowest : array [ranks]
        Part of the passes in which the rank was probably the slowest: what it is known by.
    """

    startup: float
    activation: float
    compute: float
    slowness: FloatArray
    intervals: FloatArray
    tied: IntArray
    noise: float
    slowest: FloatArray


def fit_totals(
    tokens: FloatArray, seconds: FloatArray, activated: FloatArray | None = None
) -> Passive:
    """Fit ranks' slowness to totals.

    Parameters
    ----------
    tokens : array [passes, ranks]
        Token assignments of each rank.
    seconds : array [passes]
        Time of the layer's slowest rank; what else a layer takes must be subtracted or constant.
    activated : array [passes, ranks], optional
        Replicas with tokens; without them no activation term is fitted.

    Raises
    ------
    ProblemError
        If shapes differ, numbers are not positive, or there are too few passes.
    """
    from scipy.optimize import minimize

    tokens = numbers(tokens, "Tokens", ("pass", "rank"), ProblemError)
    seconds = numbers(seconds, "Seconds", ("pass",), ProblemError, strict=True)
    given = np.zeros(tokens.shape) if activated is None else activated
    active = numbers(given, "Activated", ("pass", "rank"), ProblemError)
    if active.shape != tokens.shape:
        raise ProblemError(
            f"Activated has the shape {active.shape}, tokens {tokens.shape}: give both for each "
            "pass and rank."
        )
    if seconds.size != tokens.shape[0]:
        raise ProblemError(
            f"Tokens are of {tokens.shape[0]} passes, seconds of {seconds.size}: give one total "
            "for each pass."
        )
    if seconds.size < LEAST:
        raise ProblemError(f"Totals of {seconds.size} passes say too little: give {LEAST} or more.")
    if not tokens.any(axis=1).all():
        raise ProblemError("A pass has no tokens on any rank: leave it out.")
    ranks, scale = tokens.shape[1], float(np.median(seconds))
    fair = float(np.median(tokens.max(axis=1)))
    most = float(active.max())
    # parts of the median time: startup, activation at `most`, compute at `fair`, noise
    start = np.log(np.concatenate([[0.2, 0.2 if most else 1e-9], np.full(ranks, 0.7), [0.05]]))

    def negative(x: FloatArray) -> tuple[float, FloatArray]:
        t, w = np.exp(x[:2])
        c, sigma = np.exp(x[2:-1]), float(np.exp(x[-1]))
        parts = (np.full(tokens.shape, t), w * active / max(most, 1.0), c * tokens / fair)
        f = np.maximum(parts[0] + parts[1] + parts[2], 1e-12)
        z = (np.log(seconds / scale)[:, None] - np.log(f)) / sigma
        z = np.where(tokens > 0, z, 40.0)  # an idle rank is never the slowest
        tail, mills = _tail(z)
        each = -0.5 * z**2 - tail  # log phi - log Phi
        top = each.max(axis=1, keepdims=True)
        part = np.exp(each - top)
        total = part.sum(axis=1, keepdims=True)
        likely = (top + np.log(total))[:, 0] + tail.sum(axis=1) - np.log(sigma)
        slope = np.where(tokens > 0, mills + part / total * (-z - mills), 0.0)
        by_f = -slope / sigma
        gradient = np.empty(x.size)
        gradient[0] = (by_f * parts[0] / f).sum()
        gradient[1] = (by_f * parts[1] / f).sum()
        gradient[2:-1] = (by_f * parts[2] / f).sum(axis=0)
        gradient[-1] = -(slope * z).sum() - seconds.size
        apart = x[2:-1] - x[2:-1].mean()
        prior = 0.5 * (apart**2).sum() / PRIOR**2 + 0.5 * ((x[:2] - start[:2]) ** 2).sum() / 25
        gradient[2:-1] -= apart / PRIOR**2
        gradient[:2] -= (x[:2] - start[:2]) / 25
        return float(prior - likely.sum()), -gradient

    found = minimize(negative, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    x = found.x
    spread, known = _spread(negative, x)
    # ranks that nothing is known of must not blur the mean
    weight = (known[2:-1] > KNOWN * np.median(known[2:-1])).astype(np.float64)
    weight /= weight.sum()
    log = x[2:-1] - weight @ x[2:-1]
    center = np.eye(ranks) - weight
    deviation = np.sqrt(np.maximum(np.diag(center @ spread[2:-1, 2:-1] @ center.T), 0.0))
    low, high = np.exp(log - 1.96 * deviation), np.exp(log + 1.96 * deviation)
    slowness, tied = ties(np.exp(log), low, high)
    t, w = np.exp(x[:2]) * scale
    c = np.exp(x[2:-1])
    f = t + w * active / max(most, 1.0) + c * scale * tokens / fair
    z = (np.log(seconds)[:, None] - np.log(np.maximum(f, 1e-300))) / np.exp(x[-1])
    each = np.where(tokens > 0, -0.5 * z**2 - _tail(z)[0], -np.inf)
    part = np.exp(each - each.max(axis=1, keepdims=True))
    return Passive(
        startup=float(t),
        activation=float(w / max(most, 1.0)) if most else 0.0,
        compute=float(np.exp(weight @ x[2:-1]) * scale / fair),
        slowness=slowness,
        intervals=np.stack([low, high], axis=1),
        tied=tied,
        noise=float(np.exp(x[-1])),
        slowest=(part / part.sum(axis=1, keepdims=True)).mean(axis=0),
    )


def _tail(z: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log of Phi(z), and its derivative phi(z) / Phi(z)."""
    from scipy.special import log_ndtr

    log = log_ndtr(z)
    return log, np.exp(-0.5 * z**2 - 0.9189385332046727 - log)


def _spread(
    negative: Callable[[FloatArray], tuple[float, FloatArray]], x: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Covariance at a minimum, the inverse of the Hessian by differences, and its diagonal."""
    step = 1e-4
    rows = []
    for i in range(x.size):
        ahead, behind = x.copy(), x.copy()
        ahead[i] += step
        behind[i] -= step
        rows.append((negative(ahead)[1] - negative(behind)[1]) / (2 * step))
    hessian = np.array(rows)
    hessian = 0.5 * (hessian + hessian.T)
    value, vector = np.linalg.eigh(hessian)
    value = np.maximum(value, 1e-9 * value.max())
    return np.asarray((vector / value) @ vector.T), np.diag(hessian)
