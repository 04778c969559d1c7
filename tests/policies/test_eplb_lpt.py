import numpy as np
import pytest
from hypothesis import given

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.eplb import eplb, replicate
from moeplace.policies.eplb_lpt import eplb_lpt
from tests.policies.cases import (
    Case,
    assert_complete,
    assert_no_duplicates,
    by_rank,
    cases,
    copies,
    makespans,
    small,
)


def run(case: Case):
    return eplb_lpt(case.loads, case.speeds, case.rank_slots)


def test_copies_go_where_they_end_first():
    # 6 -> rank 1 (6/2), 5 -> rank 0 (5/1 < 11/2), 3 -> rank 1 (9/2 < 8), 1 -> rank 0, the last
    loads = np.array([[5.0, 6.0, 3.0, 1.0]])
    assert eplb_lpt(loads, np.array([1.0, 2.0]), np.array([2, 2])).tolist() == [[0, 3, 1, 2]]


def test_one_number_of_slots_stands_for_every_rank():
    loads = np.random.default_rng(4).random((2, 6))
    speeds = np.array([1.0, 0.8, 1.1])
    assert (eplb_lpt(loads, speeds, 3) == eplb_lpt(loads, speeds, np.array([3, 3, 3]))).all()


def test_a_copy_without_a_legal_rank_is_let_in_by_a_full_one():
    # 1 and 0.9 fill the fast rank, the first 0.75 takes the slow one, which alone has room for
    # the second. Handing over 0.9 ends at 5.5, handing over 1 at 5.83.
    loads = np.array([[1.0, 0.9, 1.5]])
    slots = eplb_lpt(loads, np.array([1.0, 0.3]), np.array([2, 2]))
    assert slots.tolist() == [[0, 2, 2, 1]]
    assert makespans(slots, loads, [1.0, 0.3], [2, 2]) == pytest.approx([5.5])


def test_a_dead_end_in_one_layer_leaves_the_others_alone():
    dead, plain = [1.0, 0.9, 1.5], [1.0, 3.0, 0.5]
    speeds, rank_slots = np.array([1.0, 0.3]), np.array([2, 2])
    both = eplb_lpt(np.array([plain, dead, plain]), speeds, rank_slots)
    alone = eplb_lpt(np.array([plain]), speeds, rank_slots)
    assert both.tolist() == [alone[0].tolist(), [0, 2, 2, 1], alone[0].tolist()]


def test_a_copy_that_no_exchange_lets_in_is_given_up():
    # Experts 0 and 1 should have a copy on all three ranks, but the last rank has one slot.
    loads = np.array([[30.0, 30.0, 10.0, 0.0, 0.0, 0.0]])
    rank_slots = np.array([5, 5, 1])
    assert replicate(loads, 11, most=3)[2].tolist() == [[3, 3, 2, 1, 1, 1]]
    slots = eplb_lpt(loads, np.ones(3), rank_slots)
    assert sorted(copies(slots[0], 6)) == [1, 1, 1, 2, 2, 3]
    assert (slots == -1).sum() == 1
    assert_no_duplicates(slots, rank_slots)


def test_no_expert_gets_more_copies_than_ranks_and_spare_slots_stay_empty():
    slots = eplb_lpt(np.array([[9.0, 1.0]]), np.ones(2), np.array([3, 4]))
    assert by_rank(slots[0], [3, 4]) == [[0, 1], [0, 1]]
    assert slots[0].tolist() == [0, 1, -1, 0, 1, -1, -1]


def test_layers_without_load_get_a_legal_placement():
    slots = eplb_lpt(np.zeros((2, 16)), np.linspace(0.9, 1.1, 4), np.full(4, 5))
    assert_complete(slots, 16, [5] * 4)
    assert_no_duplicates(slots, [5] * 4)
    assert (slots >= 0).all()


def test_it_needs_a_slot_for_each_expert():
    with pytest.raises(PolicyNotApplicable, match="got 4 slots for 5 experts"):
        eplb_lpt(np.ones((1, 5)), np.ones(2), np.array([1, 3]))


def test_at_unequal_speeds_it_beats_eplb():
    generator = np.random.default_rng(5)
    loads = generator.gamma(0.7, 1000.0, (4, 64))
    speeds = generator.uniform(0.85, 1.15, 8)
    rank_slots = np.full(8, 9)
    aware = sum(makespans(eplb_lpt(loads, speeds, rank_slots), loads, speeds, rank_slots))
    blind = sum(makespans(eplb(loads, 8, 9), loads, speeds, rank_slots))
    assert aware < 0.95 * blind


@small
@given(cases())
def test_placements_are_complete_without_duplicates(case):
    slots = run(case)
    assert_complete(slots, case.loads.shape[1], case.rank_slots)
    assert_no_duplicates(slots, case.rank_slots)


@small
@given(cases(equal=True))
def test_with_equal_slots_every_copy_of_the_replication_is_placed(case):
    ranks, experts = case.rank_slots.size, case.loads.shape[1]
    usable = ranks * min(int(case.rank_slots[0]), experts)
    counts = replicate(case.loads, usable, most=ranks)[2]
    assert [copies(row, experts) for row in run(case)] == counts.tolist()


@small
@given(cases())
def test_it_gives_the_same_again_and_layers_do_not_matter_to_each_other(case):
    slots = run(case)
    assert (run(case) == slots).all()
    for i in range(len(case.loads)):
        assert (run(case.layer(i)) == slots[i]).all()
