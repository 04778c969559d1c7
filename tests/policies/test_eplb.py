import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.eplb import balanced_packing, duplicates, eplb, replicate
from tests.policies import reference
from tests.policies.cases import Case, assert_complete, by_rank, cases, small, token_loads

PUBLISHED_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
PUBLISHED_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_comes_out_exactly():
    slots = eplb(PUBLISHED_LOADS, ranks=8, slots_per_rank=2, groups=4, nodes=2)
    assert slots.tolist() == PUBLISHED_SLOTS
    assert slots.dtype == np.int64


def test_global_eplb_on_a_case_solved_by_hand():
    # Copies: 8 -> 4 4, 3, 1. On two ranks: 4 (first), 4 (second), 3 (first), 1 (second).
    assert eplb(np.array([[3.0, 8.0, 1.0]]), 2, 2).tolist() == [[1, 0, 1, 2]]


def test_eplb_may_put_two_copies_of_an_expert_on_a_rank():
    # Shares 8 8 8 8, 7 and 1: rank 0 gets 8, 8, 7, rank 1 gets 8, 8, 1.
    slots = eplb(np.array([[32.0, 7.0, 1.0]]), 2, 3)
    assert by_rank(slots[0], [3, 3]) == [[0, 0, 1], [0, 0, 2]]
    assert duplicates(slots, np.array([3, 3])).tolist() == [2]


def test_one_slot_to_a_rank_keeps_the_order_of_copies():
    assert eplb(np.array([[1.0, 5.0, 2.0]]), 4, 1).tolist() == [[0, 1, 2, 1]]


def test_groups_change_the_order_of_experts_even_on_one_node():
    # Groups (0, 1) and (2, 3) with 2 and 5 tokens: experts in the order 2, 3, 0, 1, so that
    # 2 is the first of the three that tie.
    assert eplb(np.array([[1.0, 1.0, 1.0, 4.0]]), 2, 2, groups=2).tolist() == [[3, 1, 2, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 2, "slots_per_rank": 2}, "got 4 slots for 6 experts. Give 2 more slots"),
        ({"ranks": 4, "slots_per_rank": 2, "groups": 4}, "got 6 experts for 4 groups"),
        ({"ranks": 4, "slots_per_rank": 2, "groups": 3, "nodes": 2}, "got 3 groups for 2 nodes"),
        ({"ranks": 3, "slots_per_rank": 2, "groups": 2, "nodes": 2}, "got 3 ranks for 2 nodes"),
        ({"ranks": 3, "slots_per_rank": 2, "nodes": 2}, "Use groups=1, nodes=1"),
        ({"ranks": 3, "slots_per_rank": 2, "groups": 0}, "got 6 experts for 0 groups"),
    ],
)
def test_eplb_says_why_it_does_not_apply(arguments, message):
    with pytest.raises(PolicyNotApplicable, match=message):
        eplb(np.ones((1, 6)), **arguments)


@small
@given(cases(equal=True))
def test_global_eplb_is_that_of_the_reference_in_every_layer(case):
    ranks, slots_per_rank = case.rank_slots.size, int(case.rank_slots[0])
    slots = eplb(case.loads, ranks, slots_per_rank)
    expected = [reference.eplb(row, ranks, slots_per_rank) for row in case.loads.tolist()]
    assert slots.tolist() == expected
    assert_complete(slots, case.loads.shape[1], case.rank_slots)


@small
@given(st.data())
def test_hierarchical_eplb_is_that_of_the_reference_in_every_layer(data):
    nodes = data.draw(st.integers(1, 3))
    groups = nodes * data.draw(st.integers(1, 3))
    ranks = nodes * data.draw(st.integers(1, 3))
    experts = groups * data.draw(st.integers(1, 3))
    slots_per_rank = -(-experts // ranks) + data.draw(st.integers(0, 2))
    loads = data.draw(token_loads(2, experts))
    slots = eplb(loads, ranks, slots_per_rank, groups, nodes)
    expected = [reference.eplb(row, ranks, slots_per_rank, groups, nodes) for row in loads.tolist()]
    assert slots.tolist() == expected


def test_eplb_is_that_of_the_reference_at_the_size_of_a_real_model():
    loads = np.random.default_rng(1).poisson(20.0, (2, 256)).astype(np.float64)  # many ties
    for groups, nodes in ((1, 1), (8, 4)):
        slots = eplb(loads, 32, 9, groups, nodes)
        expected = [reference.eplb(row, 32, 9, groups, nodes) for row in loads.tolist()]
        assert slots.tolist() == expected


def test_packing_fills_the_lightest_pack_with_room_first_on_ties():
    pack, place = balanced_packing(np.array([[1.0, 5.0, 1.0, 2.0]]), 2)
    assert pack.tolist() == [[1, 0, 0, 1]]
    assert place.tolist() == [[1, 0, 1, 0]]


def test_packing_needs_packs_of_equal_count():
    with pytest.raises(PolicyNotApplicable, match="got 3 items for 2 packs"):
        balanced_packing(np.ones((1, 3)), 2)


def test_replication_appends_copies_and_numbers_them():
    phy2log, rank, counts = replicate(np.array([[2.0, 6.0], [4.0, 2.0]]), 5)
    assert phy2log.tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert rank.tolist() == [[0, 0, 1, 2, 1], [0, 0, 1, 2, 1]]
    assert counts.tolist() == [[2, 3], [3, 2]]


def test_replication_keeps_to_the_largest_number_of_copies():
    assert replicate(np.array([[9.0, 1.0, 0.0]]), 5, most=2)[2].tolist() == [[2, 2, 1]]
    assert replicate(np.array([[9.0, 1.0, 0.0]]), 3, most=1)[2].tolist() == [[1, 1, 1]]


def test_duplicates_are_counted_within_ranks_and_not_among_empty_slots():
    slots = np.array([[0, 0, 0, -1, -1, 1], [0, 1, 2, 0, 1, 2], [1, 0, 1, 2, 1, 2]])
    assert duplicates(slots, np.array([3, 3])).tolist() == [2, 0, 2]
    assert duplicates(slots, np.array([1, 0, 5])).tolist() == [1, 2, 2]


def test_duplicates_of_nothing_are_none():
    assert duplicates(np.full((1, 3), -1), np.array([3])).tolist() == [0]


@small
@given(cases(equal=True))
def test_eplb_gives_the_same_again_and_layers_do_not_matter_to_each_other(case: Case):
    ranks, slots_per_rank = case.rank_slots.size, int(case.rank_slots[0])
    slots = eplb(case.loads, ranks, slots_per_rank)
    assert (eplb(case.loads, ranks, slots_per_rank) == slots).all()
    for i in range(len(case.loads)):
        assert (eplb(case.layer(i).loads, ranks, slots_per_rank) == slots[i]).all()
