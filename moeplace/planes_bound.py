"""Lower bounds under latency planes: what activated replicas add to the tokens."""

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.arguments import SLACK, ceiling, usable_slots
from moeplace.problem import Problem

#: `planes` counts the replicas that so many experts of a layer need.
HOTTEST = 32


def planes(
    problem: Problem, window: int, layers: IntArray, seconds: FloatArray
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Latency planes: whether tokens and activations cannot be poured into `seconds` [layers].

    Any routing. Proof: by T rank g runs n_g tokens and activates A_g <= K_g replicas with
    t_k + w_k A_g + c_k (b_g + n_g) / v_g <= T for every plane k, or is idle. Together the ranks
    must run sum n_g >= W and activate sum A_g >= sum_e A_e, A_e the least that replicas of e can
    activate: a(n) = 1 - exp(-n) is concave with a(0) = 0, so few replicas activate least. Under
    even routing e needs c copies (see `even_copies`) and A_e = c a(w_e / c), which grows with c;
    else no replica runs more than r = max_g r_g, and A_e is that of as many full ones as fit into
    w_e and one with the rest. What a rank can run is a concave function of A_g, so the most that
    all can run at a total of activations is found by spending activations where they cost the
    fewest tokens first. The `HOTTEST` experts are looked at so, the others count as single ones.
    """
    cluster, model = problem.cluster, problem.cluster.planes
    assert model is not None
    if layers.size == 0:
        return np.zeros(0, dtype=np.bool_)
    t, w, c = model.startup, model.activation, model.compute
    tokens, base = problem.tokens[window, layers], problem.base[window, layers]
    need = tokens.sum(axis=1) * (1 - SLACK)
    if layers.size == 0:
        return np.zeros(0, dtype=np.bool_)
    active = _least_activated(problem, tokens, base, seconds) * (1 - SLACK)
    time = seconds[:, None, None]  # [layers, ranks, points]
    caps = usable_slots(problem)[None, :, None].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        # where two planes allow equally many tokens, and where one allows none, on any rank
        cross = [
            ((time - t[k]) / c[k] - (time - t[m]) / c[m]) / (w[k] / c[k] - w[m] / c[m])
            for k in range(t.size)
            for m in range(k)
        ]
        points = [np.zeros_like(time), *cross]
        rate = cluster.speeds[None, :, None]
        full = [caps]
        for k in range(t.size):
            full.append((time - t[k] - c[k] * base[:, :, None] / rate) / w[k])
        most = np.nan_to_num(np.minimum.reduce(np.broadcast_arrays(*full)), nan=np.inf)
        at = np.concatenate(np.broadcast_arrays(*(p + 0 * caps for p in points), caps), axis=2)
        at = np.sort(np.clip(np.nan_to_num(at), 0.0, np.clip(most, 0.0, caps)), axis=2)
        runs = np.full(at.shape, np.inf)
        for k in range(t.size):
            allowed = (time - t[k] - w[k] * at) * rate
            # where activations just fit, rounding must not make it look as if they did not
            fits = allowed >= -1e-9 * time * rate
            each = allowed / c[k] if c[k] > 0 else np.where(fits, np.inf, -np.inf)
            runs = np.minimum(runs, each)
        runs = runs - base[:, :, None]
    idle = (runs[:, :, :1] < 0) | (caps == 0)
    late = (idle[:, :, 0] & (cluster.seconds(base) > seconds[:, None] * (1 + SLACK))).any(axis=1)
    runs = np.where(idle, 0.0, np.maximum(runs, 0.0))
    width = np.where(idle, 0.0, np.diff(at, axis=2)).reshape(layers.size, -1)
    loss = -np.diff(runs, axis=2).reshape(layers.size, -1)
    slope = np.where(width > 0, loss / np.where(width > 0, width, 1.0), np.inf)
    order = np.argsort(slope, axis=1, kind="stable")
    width = np.take_along_axis(width, order, axis=1)
    slope = np.take_along_axis(np.where(np.isfinite(slope), slope, 0.0), order, axis=1)
    before = width.cumsum(axis=1) - width
    spent = np.clip(active[:, None] - before, 0.0, width)
    can = runs[:, :, 0].sum(axis=1) - (spent * slope).sum(axis=1)
    short = width.sum(axis=1) < active
    return np.asarray(late | short | (can * (1 + SLACK) < need))


def _least_activated(
    problem: Problem, tokens: FloatArray, base: FloatArray, seconds: FloatArray
) -> FloatArray:
    """Sum of A_e [layers] for tokens [layers, experts] and base [layers, ranks]; see `planes`."""
    load = -np.sort(-tokens, axis=1)
    hot, rest = load[:, :HOTTEST], load[:, HOTTEST:]
    reach = np.minimum(problem.cluster.tokens_by(seconds[:, None]), ceiling(problem)) - base
    room = -np.sort(-np.maximum(reach[:, usable_slots(problem) > 0], 0.0), axis=1)
    if problem.routing == "even":
        most = np.maximum.accumulate(room * np.arange(1, room.shape[1] + 1), axis=1)
        copies = 1 + (most[:, None, :] < hot[:, :, None] * (1 - SLACK)).sum(axis=2)
        each = -copies * np.expm1(-hot / copies)
    else:
        largest = np.maximum(room[:, :1], 1e-300) * (1 + SLACK)
        full = np.where(room[:, :1] > 0, np.floor(hot / largest), 0.0)
        left = np.where(room[:, :1] > 0, hot - full * largest, hot)
        each = -full * np.expm1(-largest) - np.expm1(-np.maximum(left, 0.0))
    return np.asarray(each.sum(axis=1) - np.expm1(-rest).sum(axis=1))


def planes_bound(problem: Problem, start: FloatArray) -> FloatArray:
    """Largest makespans [windows, layers] that `planes` refutes, at least `start`; by bisection."""
    value = start.copy()
    for window in range(problem.windows):
        layers = np.flatnonzero(problem.tokens[window].any(axis=1))
        layers = layers[planes(problem, window, layers, value[window, layers])]
        low = value[window, layers]
        high = 2 * low
        while (bad := planes(problem, window, layers, high)).any():
            low, high = np.where(bad, high, low), np.where(bad, 2 * high, high)
        for _ in range(46):
            middle = 0.5 * (low + high)
            bad = planes(problem, window, layers, middle)
            low, high = np.where(bad, middle, low), np.where(bad, high, middle)
        value[window, layers] = low
    return value
