"""Shapes of latency models and the linear programs that fit them (see `fit`).

A shape takes activated replicas, tokens and seconds [samples], a seed, and planes to look next to
(or None), and gives planes [planes, 3]: t in s, w in s per activated replica, c in s per token.
"""

from collections.abc import Callable

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import ProblemError

#: Most turns of assignment and program from one start.
STEPS = 30


def _program(
    features: FloatArray, seconds: FloatArray, assigned: IntArray, planes: int
) -> FloatArray:
    """Parameters [planes, features] >= 0 of the least sum of relative errors.

    A sample's error is at least what its assigned plane is below it, and what any is above it.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    count, width = features.shape
    scale = np.maximum(features.max(axis=0), 1e-300)
    rows = features / scale / seconds[:, None]
    own = sparse.lil_matrix((count, planes * width))
    for k in range(planes):
        mine = np.flatnonzero(assigned == k)
        own[mine, k * width : (k + 1) * width] = -rows[mine]
    every = sparse.block_diag([rows] * planes)
    minus = -sparse.identity(count)
    left = sparse.vstack(
        [sparse.hstack([own, minus]), sparse.hstack([every, sparse.vstack([minus] * planes)])]
    )
    right = np.concatenate([-np.ones(count), np.ones(planes * count)])
    cost = np.concatenate([np.zeros(planes * width), np.ones(count)])
    found = linprog(cost, A_ub=left.tocsr(), b_ub=right, bounds=(0, None), method="highs")
    if found.x is None:
        raise ProblemError(f"The fit's linear program failed: {found.message}")
    return np.asarray(found.x[: planes * width].reshape(planes, width) / scale)


def _plane(columns: tuple[bool, bool]) -> Callable[..., FloatArray]:
    """One plane with a startup and an activation term, or without."""

    def shape(
        activated: FloatArray, tokens: FloatArray, seconds: FloatArray, *_: object
    ) -> FloatArray:
        used = [*columns, True]
        features = np.stack([np.ones_like(tokens), activated, tokens], axis=1)[:, used]
        planes = np.zeros((1, 3))
        planes[0, used] = _program(features, seconds, np.zeros(tokens.size, dtype=int), 1)[0]
        return planes

    return shape


def _hinged(
    activated: FloatArray, tokens: FloatArray, seconds: FloatArray, *_: object
) -> FloatArray:
    """T + w A + c n + hinges (n - kappa)+ at quantiles of the tokens, as planes of equal w."""
    kappa = np.unique(np.quantile(np.unique(tokens), [0.3, 0.5, 0.65, 0.8, 0.9]))
    hinges = np.maximum(tokens[:, None] - kappa, 0.0)
    features = np.column_stack([np.ones_like(tokens), activated, tokens, hinges])
    t, w, c, *steps = _program(features, seconds, np.zeros(tokens.size, dtype=int), 1)[0]
    planes = [(t, w, c)]
    for at, step in zip(kappa, steps, strict=True):
        if step > 0:
            t, c = t - step * at, c + step
            planes.append((t, w, c))
    return np.array(planes)


def _two_planes(
    activated: FloatArray,
    tokens: FloatArray,
    seconds: FloatArray,
    seed: int,
    near: FloatArray | None,
) -> FloatArray:
    """The maximum of two planes: the best of several starts, or next to known ones."""
    features = np.stack([np.ones_like(tokens), activated, tokens], axis=1)
    each = tokens / np.maximum(activated, 1.0)
    starts = [
        values > np.quantile(values, q)
        for values in (tokens, each, seconds)
        for q in (0.35, 0.6, 0.8)
    ]
    generator = np.random.default_rng(seed)
    starts += [generator.random(tokens.size) < 0.5 for _ in range(2)]
    if near is not None:
        starts = [(features @ near.T).argmax(axis=1)]
    best, least = _plane((True, True))(activated, tokens, seconds), np.inf
    for start in starts:
        assigned, before = start.astype(int), np.inf
        for _ in range(STEPS):
            planes = _program(features, seconds, assigned, 2)
            value = features @ planes.T
            error = float(np.abs(value.max(axis=1) / seconds - 1).sum())
            if error < least:
                best, least = planes, error
            if error >= before * (1 - 1e-6):
                break
            before, assigned = error, value.argmax(axis=1)
    return best


#: By name, as in `fit.Model`.
SHAPES: dict[str, Callable[..., FloatArray]] = {
    "speed": _plane((False, False)),
    "offset": _plane((True, False)),
    "plane": _plane((True, True)),
    "hinges": _hinged,
    "planes": _two_planes,
}
