import numpy as np
import pytest

from moeplace.dispatch import shares
from moeplace.errors import PlanError
from tests.strategies import plan, problem

EVEN = problem([4, 2, 1], [1, 1], [2, 3])
WEIGHTED = problem([4, 2, 1], [1, 1], [2, 3], routing="weighted")


@pytest.mark.parametrize("one", [EVEN, WEIGHTED])
def test_without_shares_the_replicas_share_evenly(one: object) -> None:
    placed = plan([0, 1, 2, 0, -1], [2, 3])
    assert shares(one, placed).tolist() == [[0.5, 1.0, 1.0, 0.5, 0.0]]  # type: ignore[arg-type]


def test_two_copies_on_one_rank_take_two_shares() -> None:
    twice = plan([0, 1, 2, 0, 0], [2, 3], allow_duplicates=True)
    assert shares(EVEN, twice)[0] == pytest.approx([1 / 3, 1, 1, 1 / 3, 1 / 3])


def test_under_weighted_routing_stored_shares_rule() -> None:
    split = [[0.25, 1, 1, 0.75, 0]]
    assert shares(WEIGHTED, plan([0, 1, 2, 0, -1], [2, 3], split=split)).tolist() == split


def test_an_engine_that_shares_evenly_would_ignore_stored_shares() -> None:
    with pytest.raises(PlanError, match=r"routing is even: .* Drop the shares"):
        shares(EVEN, plan([0, 1, 2, 0, -1], [2, 3], split=[[0.5, 1, 1, 0.5, 0]]))


def test_shares_per_window_must_be_for_as_many_windows() -> None:
    split = np.array([[[0.5, 1, 1, 0.5, 0]]] * 2)
    with pytest.raises(PlanError, match="for 2 windows but the problem has 1"):
        shares(WEIGHTED, plan([0, 1, 2, 0, -1], [2, 3], split=split))


def test_each_layer_counts_its_own_replicas() -> None:
    two = problem([[1, 1], [1, 1]], [1, 1], [2, 1])
    placed = plan([[0, 1, 0], [0, 1, 1]], [2, 1])
    assert shares(two, placed).tolist() == [[0.5, 1, 0.5], [1, 0.5, 0.5]]
