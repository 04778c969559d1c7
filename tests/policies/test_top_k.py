import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.top_k import top_k
from tests.policies.cases import (
    assert_complete,
    assert_no_duplicates,
    by_rank,
    cases,
    copies,
    small,
)


def test_the_hottest_experts_are_on_every_rank_and_the_others_are_spread():
    loads = np.array([[1.0, 9.0, 4.0, 3.0, 2.0], [5.0, 5.0, 1.0, 1.0, 1.0]])
    slots = top_k(loads, np.array([3, 4]), 1)
    assert slots.tolist() == [[1, 2, 0, 1, 3, 4, -1], [0, 1, -1, 0, 2, 3, 4]]


def test_no_replicas_and_all_replicas_are_allowed():
    loads = np.array([[1.0, 2.0]])
    assert top_k(loads, np.array([1, 1]), 0).tolist() == [[1, 0]]
    assert top_k(loads, np.array([2, 3]), 2).tolist() == [[1, 0, 1, 0, -1]]


@pytest.mark.parametrize(
    ("k", "rank_slots", "message"),
    [
        (-1, [4, 4], "got k = -1"),
        (6, [6, 6], "got k = 6"),
        (2, [9, 1], "got 1 slots on rank 1 for k = 2"),
        (2, [3, 3], "got 2 slots beside the k = 2 hottest for 3 experts"),
    ],
)
def test_it_says_why_it_does_not_apply(k, rank_slots, message):
    with pytest.raises(PolicyNotApplicable, match=message):
        top_k(np.ones((1, 5)), np.array(rank_slots), k)


@small
@given(cases(), st.integers(0, 3))
def test_each_layer_is_complete_with_the_hottest_everywhere(case, k):
    experts, ranks = case.loads.shape[1], case.rank_slots.size
    k = min(k, experts)
    rank_slots = case.rank_slots + k
    slots = top_k(case.loads, rank_slots, k)
    assert_complete(slots, experts, rank_slots)
    assert_no_duplicates(slots, rank_slots)
    for load, row in zip(case.loads, slots, strict=True):
        hottest = sorted(range(experts), key=lambda e: -load[e])[:k]
        assert all(held[:k] == hottest for held in by_rank(row, rank_slots))
        assert sorted(copies(row, experts)) == [1] * (experts - k) + [ranks] * k
        assert (top_k(load[None], rank_slots, k) == row).all()
