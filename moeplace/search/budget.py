"""How a budget of replicas over all layers is shared out."""

import numpy as np

from moeplace._check import FloatArray, IntArray


def points(most: int) -> IntArray:
    """Numbers of further replicas in a layer that are tried: 0 to 4, then fewer and fewer."""
    tried = list(range(min(most, 4) + 1))
    while tried[-1] < most:
        tried.append(min(tried[-1] * 3 // 2, most))
    return np.array(tried)


def allot(cost: FloatArray, extra: IntArray, total: int) -> tuple[IntArray, IntArray]:
    """Further replicas of each layer [layers], and the point tried that each takes [layers].

    The sum over layers of the cost is least, by dynamic programming over the total; what is
    left goes to the layers that cost most.

    Parameters
    ----------
    cost : array [layers, points]
        Infinite where no legal placement was found.
    extra : array [layers, points]
        Further replicas at each point, ascending.
    total : int
    """
    layers = np.arange(cost.shape[0])
    finite = cost[np.isfinite(cost)]
    cost = np.where(np.isfinite(cost), cost, 1e6 * (1 + finite.max(initial=0.0)))
    best = np.zeros(total + 1)  # with at most so many replicas for the layers so far
    choice = np.zeros((layers.size, total + 1), dtype=np.int64)
    for layer in layers:
        before, best = best, np.full(total + 1, np.inf)
        for point, more in enumerate(extra[layer]):
            if more > total:
                break
            value = before[: total + 1 - more] + cost[layer, point]
            better = value < best[more:]
            best[more:][better] = value[better]
            choice[layer, more:][better] = point
    of = np.zeros(layers.size, dtype=np.int64)
    left = total
    for layer in layers[::-1]:
        of[layer] = choice[layer, left]
        left -= int(extra[layer, of[layer]])
    given = extra[layers, of]
    for layer in np.argsort(-cost[layers, of], kind="stable"):
        more = min(left, int(extra[layer, -1] - given[layer]))
        given[layer] += more
        left -= more
    return given, of
