import numpy as np
import pytest
from hypothesis import given

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.contiguous import contiguous, round_robin
from tests.policies.cases import assert_complete, assert_no_duplicates, cases, small


def test_contiguous_counts_experts_through_the_slots_and_wraps_around():
    assert contiguous(2, 4, np.array([3, 3])).tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_contiguous_leaves_slots_beyond_the_experts_empty():
    assert contiguous(1, 2, np.array([1, 3, 0, 2])).tolist() == [[0, 1, 0, -1, 0, 1]]


def test_contiguous_needs_a_slot_for_each_expert():
    with pytest.raises(PolicyNotApplicable, match="got 4 slots for 5 experts"):
        contiguous(1, 5, np.array([2, 2]))


@small
@given(cases())
def test_contiguous_is_complete_without_duplicates(case):
    layers, experts = case.loads.shape
    slots = contiguous(layers, experts, case.rank_slots)
    assert_complete(slots, experts, case.rank_slots)
    assert_no_duplicates(slots, case.rank_slots)


def test_round_robin_deals_experts_and_then_copies():
    # copies 0 1 2 3 4 | 0 1 2 3 on ranks 0 1 2 0 1 2 0 1 2
    assert round_robin(1, 5, np.array([3, 3, 3])).tolist() == [[0, 3, 1, 1, 4, 2, 2, 0, 3]]


def test_round_robin_leaves_out_a_copy_that_its_rank_holds():
    assert round_robin(2, 4, np.array([3, 3])).tolist() == [[0, 2, -1, 1, 3, -1]] * 2


@pytest.mark.parametrize(
    ("experts", "rank_slots", "message"),
    [(4, [2, 3], "got 2 to 3"), (5, [2, 2], "got 4 slots for 5 experts")],
)
def test_round_robin_says_why_it_does_not_apply(experts, rank_slots, message):
    with pytest.raises(PolicyNotApplicable, match=message):
        round_robin(1, experts, np.array(rank_slots))


@small
@given(cases(equal=True))
def test_round_robin_is_complete_without_duplicates_as_dealt_by_hand(case):
    experts, ranks = case.loads.shape[1], case.rank_slots.size
    slots = round_robin(1, experts, case.rank_slots)
    assert_complete(slots, experts, case.rank_slots)
    hands = [[] for _ in range(ranks)]
    for i in range(slots.shape[1]):
        hand = hands[i % ranks]
        hand.append(-1 if i % experts in hand else i % experts)
    assert slots[0].tolist() == [e for hand in hands for e in hand]
