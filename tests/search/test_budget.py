"""A budget of replicas is shared out so that the sum over layers is least."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import MaxMoves, MaxReplicas, ReplicaBudget
from moeplace.plan import EMPTY
from moeplace.search.budget import allot, points
from moeplace.solve import solve
from tests.strategies import plan, problem


@pytest.mark.parametrize("most", [0, 1, 4, 5, 32, 1000])
def test_points_ascend_from_none_to_most(most: int) -> None:
    tried = points(most)
    assert tried[0] == 0
    assert tried[-1] == most
    assert (np.diff(tried) > 0).all()
    assert tried[:5].tolist() == list(range(min(most, 4) + 1))


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_no_other_way_to_share_out_costs_less(
    data: st.DataObject, layers: int, size: int, total: int
) -> None:
    costs = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    cost = np.array([data.draw(costs) for _ in range(layers)], dtype=float)
    steps = st.lists(st.integers(1, 3), min_size=size - 1, max_size=size - 1)
    extra = np.array([[0, *np.cumsum(data.draw(steps))] for _ in range(layers)], dtype=np.int64)
    given_, of = allot(cost, extra, total)
    every = np.arange(layers)
    best = min(
        cost[every, list(choice)].sum()
        for choice in product(range(size), repeat=layers)
        if extra[every, list(choice)].sum() <= total
    )
    assert cost[every, of].sum() == best
    assert (given_ >= extra[every, of]).all()
    assert (given_ <= extra[:, -1]).all()
    assert given_.sum() == min(total, extra[:, -1].sum())


def test_layers_without_a_legal_placement_get_more_first() -> None:
    cost = np.array([[3.0, 1.0], [np.inf, 5.0]])
    assert allot(cost, np.array([[0, 1], [0, 1]]), 1)[0].tolist() == [0, 1]


def test_the_layer_that_gains_most_gets_the_replica() -> None:
    one = problem([[4, 4, 4, 4], [9, 1, 1, 1]], [1, 1], 3, constraints=[ReplicaBudget(total=9)])
    found = solve(one, gap=0)
    assert found.plan.replicas.sum(axis=1).tolist() == [4, 5]
    assert found.objective == 8 + 6.5


@pytest.mark.parametrize("rule", [MaxReplicas(1), ReplicaBudget(3)])
def test_replicas_are_given_up_without_a_move(rule: MaxReplicas | ReplicaBudget) -> None:
    current = plan([0, 1, EMPTY, 0, 1, 2], [3, 3])
    one = problem([4, 3, 2], [1, 1], 3, constraints=[MaxMoves(current, total=0), rule])
    found = solve(one, gap=0)
    assert found.plan.replicas.tolist() == [[1, 1, 1]]
    assert found.plan.moves_from(current).sum() == 0
    assert found.objective == 5
