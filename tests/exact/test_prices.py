"""Shadow prices against finite differences."""

from dataclasses import replace

import numpy as np
import pytest

import moeplace as mp
from moeplace.exact.prices import shadow_prices
from moeplace.problem import Problem
from tests.strategies import problem


def _windows(routing: str, windows: int) -> Problem:
    one = mp.instances.generate((2, 10, 14, 3), 3, routing=routing)  # type: ignore[arg-type]
    loads = one.loads.select(range(windows))
    return replace(one, loads=loads, base_load=[1e3, 2e3, 0], window_weight=None)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("fixed", [False, True])
def test_prices_are_slopes_of_the_lp(fixed: bool, windows: int) -> None:
    one = _windows("weighted", windows)
    plan = mp.solve(one, work_limit=500_000).plan if fixed else None
    here = shadow_prices(one, plan)
    if plan is not None and windows == 1:
        assert here.objective == pytest.approx(mp.evaluate(one, plan).makespan[0], rel=1e-9)
    for window, layer, expert in ((0, 0, 0), (windows - 1, 1, 4)):
        tokens = one.loads.tokens.copy()
        tokens[window, layer, expert] += 0.01
        there = shadow_prices(replace(one, loads=mp.LoadHistogram(tokens=tokens)), plan)
        slope = (there.objective[layer] - here.objective[layer]) / 0.01
        assert here.token[window, layer, expert] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    for rank in range(3):
        speeds = one.cluster.speeds.copy()
        speeds[rank] *= 1 + 1e-6
        there = shadow_prices(replace(one, cluster=replace(one.cluster, speeds=speeds)), plan)
        slope = (here.objective - there.objective) * 0.01 / 1e-6
        assert here.speed[:, rank] == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_a_fluid_layer_prices_every_token_alike_and_no_slot() -> None:
    one = problem([4.0, 3, 2, 1], [1, 1], 3, routing="weighted")
    prices = shadow_prices(one)
    assert prices.token == pytest.approx(np.full((1, 1, 4), 0.5))
    assert prices.slot == pytest.approx(np.zeros((1, 2)), abs=1e-9)
    assert prices.speed == pytest.approx(np.full((1, 2), 0.025))  # T = W / V, 1 % of one rank


def test_where_slots_bind_one_more_is_worth_something() -> None:
    """Two slots of a fast rank hold two experts at most: the LP would use more of it."""
    one = problem([1.0, 1, 1, 1], [9, 1], [2, 2], routing="weighted")
    prices = shadow_prices(one)
    assert prices.objective == pytest.approx([2.0])
    more = shadow_prices(problem([1.0, 1, 1, 1], [9, 1], [3, 2], routing="weighted"))
    assert prices.slot[0, 0] >= prices.objective[0] - more.objective[0] - 1e-9
    assert prices.slot[0, 0] > 0.5


def test_what_has_no_price_is_refused() -> None:
    two = problem([[[1.0, 2]], [[2, 1]]], [1, 1], 1, objective="worst")
    with pytest.raises(mp.ProblemError, match="stand alone"):
        shadow_prices(two)
    cluster = mp.Cluster.from_planes([1e-3], [0.0], [1.0], [1, 1], 1)
    planes = Problem(mp.LoadHistogram(tokens=[[[1.0, 2]]], passes=[1.0]), cluster)
    with pytest.raises(mp.ProblemError, match="planes"):
        shadow_prices(planes)
