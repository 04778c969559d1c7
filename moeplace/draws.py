"""Compiled draws of the serving simulation: how many tokens of a batch choose each expert.

Draws come from a hash of (seed, step, layer, expert) and are monotone in the mean, so that plans
that are compared see the same luck.
"""

import math

import numpy as np
from numba import njit

import moeplace.search.compiling  # noqa: F401 - tells when kernels are compiled

#: Expected tokens of an expert from which counts are normal, rounded to whole ones.
NORMAL = 12.0
#: Expected tokens that count as none: what is left when the last request with an expert has gone.
NONE = 1e-9
#: 1 / c for the counts that are drawn one by one.
INVERSE = 1.0 / np.maximum(np.arange(4096.0), 1.0)
STEP, MIX1, MIX2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
# Acklam's rational approximation of the normal quantile, relative error below 1.2e-9
_A = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02,
      1.383577518672690e02, -3.066479806614716e01, 2.506628277459239e00)  # fmt: skip
_B = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02,
      6.680131188771972e01, -1.328068155288572e01)  # fmt: skip
_C = (-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00,
      -2.549732539343734e00, 4.374664141464968e00, 2.938163982698783e00)  # fmt: skip
_D = (7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00, 3.754408661907416e00)


@njit(cache=True, nogil=True, error_model="numpy")
def mixed(key):  # type: ignore[no-untyped-def]
    """Hash of 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    key = (key ^ (key >> _S30)) * MIX1
    key = (key ^ (key >> _S27)) * MIX2
    return key ^ (key >> _S31)


@njit(cache=True, nogil=True, error_model="numpy")
def quantile(u):  # type: ignore[no-untyped-def]
    """Quantile of the standard normal distribution."""
    if 0.02425 <= u <= 0.97575:
        q = u - 0.5
        r = q * q
        top = ((((_A[0] * r + _A[1]) * r + _A[2]) * r + _A[3]) * r + _A[4]) * r + _A[5]
        low = ((((_B[0] * r + _B[1]) * r + _B[2]) * r + _B[3]) * r + _B[4]) * r + 1.0
        return q * top / low
    q = math.sqrt(-2.0 * math.log(min(u, 1.0 - u)))
    top = ((((_C[0] * q + _C[1]) * q + _C[2]) * q + _C[3]) * q + _C[4]) * q + _C[5]
    low = (((_D[0] * q + _D[1]) * q + _D[2]) * q + _D[3]) * q + 1.0
    return top / low if u < 0.5 else -top / low


@njit(cache=True, nogil=True, error_model="numpy")
def draw(mean, tokens, key, counts, scratch):  # type: ignore[no-untyped-def]
    """Draw how many of a batch's tokens choose each expert of one layer.

    A token chooses an expert once at most, so a count is binomial (`tokens`, mean / tokens).
    Counts are then corrected to the sum that they must have, each by its part of the variance:
    to first order the covariance of choosing k of E without replacement (Hajek 1964). The
    correction makes them fractional; those that were 0 stay 0.

    Short loops over all experts without branches: the compiler makes vector code of them.

    Parameters
    ----------
    mean : [experts]
    tokens : int
    key : uint64
    counts : [experts]
        Written.
    scratch : [4, experts]
        Written.

    Returns
    -------
    float
        Sum of the counts.
    """
    luck, variances = scratch[0], scratch[2]
    experts = mean.size
    total = 0.0
    few = 0
    for e in range(experts):
        m = mean[e]
        total += m if m > NONE else 0.0
        few += (m > NONE) & (m < NORMAL)
    for e in range(experts):
        bits = mixed(key + np.uint64(e + 1) * STEP) >> _S11
        luck[e] = (np.float64(bits) + 0.5) * (1.0 / 9007199254740992.0)
        counts[e] = 0.0
    each = 1.0 / tokens
    if few > 0:
        _count(mean, tokens, few, counts, scratch)
    if few < experts:
        large = scratch[1]  # their numbers first: no branch that is hard to foresee
        found = 0
        for e in range(experts):
            large[found] = e
            found += mean[e] >= NORMAL
        for i in range(found):
            e = int(large[i])
            m = mean[e]
            scatter = math.sqrt(m * max(1.0 - m * each, 0.0))
            counts[e] = max(math.floor(m + scatter * quantile(luck[e]) + 0.5), 0.0)
    drawn = 0.0
    spread = 0.0
    for e in range(experts):
        m = mean[e]
        variances[e] = m * max(1.0 - m * each, 0.0) if counts[e] > 0 else 0.0
    for e in range(experts):
        drawn += counts[e]
        spread += variances[e]
    if drawn <= 0:
        counts[:] = mean
        return total
    if spread <= 0:
        return drawn
    share = (drawn - total) / spread
    cut = 0
    for e in range(experts):
        c = counts[e] - share * variances[e]
        below = (c <= 0) & (counts[e] > 0)
        cut += below
        counts[e] = 1e-9 if below else c
    if cut > 0:
        share = total / counts.sum()
        for e in range(experts):
            counts[e] *= share
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _count(mean, tokens, few, counts, scratch):  # type: ignore[no-untyped-def]
    """Binomial counts of the `few` experts with small means, by inversion of `luck`.

    The chance of none is a power by repeated squaring. Then all experts are counted at once,
    until few are left to count, which go on alone.
    """
    luck, chance, until, odds = scratch[0], scratch[1], scratch[2], scratch[3]
    experts = mean.size
    each = 1.0 / tokens
    for e in range(experts):
        m = mean[e]
        p = m * each if (m > NONE) & (m < NORMAL) & (m * each < 1.0) else 0.0
        until[e] = 1.0 - p
        odds[e] = p / (1.0 - p)
        chance[e] = 1.0
    power = tokens
    while power > 0:
        if power & 1:
            for e in range(experts):
                chance[e] *= until[e]
        for e in range(experts):
            until[e] *= until[e]
        power >>= 1
    for e in range(experts):
        until[e] = chance[e]
    most = min(tokens, 4095)
    left = few
    c = 0
    while left > few >> 4 and c < most:
        c += 1
        factor = (tokens - c + 1) * INVERSE[c]
        left = 0
        for e in range(experts):
            more = luck[e] > until[e]
            counts[e] += more
            left += more
            chance[e] *= odds[e] * factor
            until[e] += chance[e]
    if left > 0:
        for e in range(experts):
            if luck[e] > until[e]:
                n = c
                part, end = chance[e], until[e]
                while luck[e] > end and n < most and part >= 1e-18:
                    n += 1
                    part *= odds[e] * (tokens - n + 1) * INVERSE[n]
                    end += part
                    counts[e] += 1.0
    for e in range(experts):
        if mean[e] * each >= 1.0 and mean[e] < NORMAL:  # every token chooses it
            counts[e] = mean[e]
