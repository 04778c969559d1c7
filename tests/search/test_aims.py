"""Token capacities as speeds: what ends by its aim so measured is legal, and the other way round."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import CAPACITY_SLACK, TokenCapacity
from moeplace.evaluate import evaluate
from moeplace.problem import Problem
from moeplace.search.aims import Aims
from tests.search.checks import started
from tests.strategies import legal_plans, problem, tiny_problems


@given(
    st.data(),
    tiny_problems(routing="even", max_layers=2, limits=True),
    st.sampled_from([0.5, 1.0, 1.3, 4.0]),
)
def test_what_ends_by_its_aim_obeys_the_capacities(
    data: st.DataObject, one: Problem, factor: float
) -> None:
    placed = data.draw(legal_plans(one))
    state = started(one, placed)
    aims = Aims(one, state, np.full(one.layers, factor))
    priced = evaluate(one, placed)
    makespan = priced.makespan[0] / state.unit
    used = (priced.rank_tokens[0] / np.maximum(one.capacity, 1e-9)).max(axis=1)
    for layer in range(one.layers):
        meets = makespan[layer] <= factor and used[layer] <= 1.0
        if abs(makespan[layer] - factor) < 1e-9 or abs(used[layer] - 1.0) < 2 * CAPACITY_SLACK:
            continue  # rounding decides
        assert (state.makespan[layer] <= aims.aim[layer]) == meets


def test_without_capacities_speeds_and_aims_stay() -> None:
    one = problem([3, 2, 1], [1, 0.5], 2)
    state = started(one)
    aims = Aims(one, state, np.ones(1))
    aims.follow()
    assert not aims.limited
    assert aims.aim.tolist() == [1.0]
    assert state.speed.tolist() == [[1.0, 0.5]]


def test_aims_rise_until_a_placement_is_legal_and_then_lie_below_what_is_reached() -> None:
    # rank 1 is fast and may hardly run anything
    one = problem([4, 3, 2, 1], [1, 4], 4, constraints=[TokenCapacity(np.array([20, 2]))])
    state = started(one)
    aims = Aims(one, state, np.array([1.0]))
    for _ in range(40):
        if aims.aim[0] >= 9 / state.unit[0]:
            break
        before = aims.aim[0]
        aims.follow()
        assert aims.aim[0] > before, "what is held is too much for rank 1"
    aims.state.slot[0, 0] = [0, 1, 2, 4]
    aims.state.slot[0, 1] = [3, 4, 4, 4]
    aims.state.tokens[0] = np.array([9, 1]) / state.unit[0]
    aims.follow()
    assert 1.0 < aims.aim[0] < 9 / state.unit[0]


def test_a_rank_without_room_is_measured_as_next_to_standing_still() -> None:
    one = problem([4, 0], [1, 1], 2, constraints=[TokenCapacity(np.array([5, 0]))])
    state = started(one)
    Aims(one, state, np.array([4 / 2]))
    assert state.speed[0] == pytest.approx(np.array([1.0, 1e-100]))
