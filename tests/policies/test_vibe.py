import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import PolicyNotApplicable
from moeplace.policies.vibe import vibe_assignment, vibe_initial, vibe_update
from tests.policies.cases import (
    assert_complete,
    assert_no_duplicates,
    by_rank,
    cases,
    makespans,
    small,
    token_loads,
)


def algorithm_1(load, speeds, room):
    """The rank of each expert of one layer, one by one."""
    target = load.sum() * (speeds / speeds.sum())
    tokens = [0.0] * len(speeds)
    room = list(room)
    rank = [0] * len(load)
    for e in sorted(range(len(load)), key=lambda e: -load[e]):
        open_ranks = [g for g in range(len(speeds)) if room[g] > 0]
        g = max(open_ranks, key=lambda g: target[g] - tokens[g])
        rank[e] = g
        tokens[g] += load[e]
        room[g] -= 1
    return rank


def test_experts_go_to_the_rank_farthest_below_its_target():
    # Targets 4 and 8: 6 -> rank 1, 3 -> rank 0 (4 > 2), 2 -> rank 1 (2 > 1), 1 -> rank 0.
    loads, speeds = np.array([[3.0, 6.0, 1.0, 2.0]]), np.array([1.0, 2.0])
    assert vibe_assignment(loads, speeds).tolist() == [[0, 1, 0, 1]]
    assert vibe_initial(loads, speeds, np.array([2, 2])).tolist() == [[0, 2, 1, 3]]


def test_as_printed_a_rank_may_get_more_experts_than_it_has_slots():
    loads, speeds = np.array([[9.0, 1.0, 1.0, 1.0]]), np.ones(2)
    assert vibe_assignment(loads, speeds).tolist() == [[0, 1, 1, 1]]
    assert vibe_initial(loads, speeds, np.array([2, 2])).tolist() == [[0, 3, 1, 2]]


def test_redundant_slots_stay_empty():
    slots = vibe_initial(np.array([[4.0, 3.0, 2.0]]), np.ones(2), np.array([3, 2]))
    assert slots.tolist() == [[0, -1, -1, 1, 2]]


def test_the_initial_placement_needs_a_slot_for_each_expert():
    with pytest.raises(PolicyNotApplicable, match="got 4 slots for 5 experts"):
        vibe_initial(np.ones((1, 5)), np.ones(2), np.array([2, 2]))


@small
@given(cases())
def test_the_initial_placement_is_algorithm_1_with_and_without_room(case):
    layers, experts = case.loads.shape
    slots = vibe_initial(case.loads, case.speeds, case.rank_slots)
    assert_complete(slots, experts, case.rank_slots)
    assert_no_duplicates(slots, case.rank_slots)
    assert (slots >= 0).sum() == layers * experts
    ranks = vibe_assignment(case.loads, case.speeds)
    free = [experts] * case.speeds.size
    for load, row, rank in zip(case.loads, slots, ranks, strict=True):
        assert rank.tolist() == algorithm_1(load, case.speeds, free)
        held = by_rank(row, case.rank_slots)
        capped = algorithm_1(load, case.speeds, case.rank_slots)
        assert [next(g for g in range(len(held)) if e in held[g]) for e in range(experts)] == capped


@small
@given(cases())
def test_the_initial_placement_does_not_mix_layers(case):
    slots = vibe_initial(case.loads, case.speeds, case.rank_slots)
    for i in range(len(case.loads)):
        alone = vibe_initial(case.layer(i).loads, case.speeds, case.rank_slots)
        assert (alone == slots[i]).all()


def test_the_update_swaps_between_the_latest_and_the_earliest_rank():
    # 9 + 4 against 5 + 2: 9 for 5 gives 9 and 11, 4 for 2 gives 11 and 9; the first is taken.
    slots = np.array([[0, 1, 2, 3, 4, 5]])
    loads = np.array([[9.0, 4.0, 5.0, 2.0, 6.0, 4.0]])
    updated, swaps = vibe_update(slots, loads, np.ones(3), np.array([2, 2, 2]), tolerance=0.1)
    assert updated.tolist() == [[2, 1, 0, 3, 4, 5]]
    assert swaps.tolist() == [1]
    assert slots.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_update_knows_speeds():
    # Latencies 6 and 3. 4 for 1 gives 3 and 4.5, 2 for 1 gives 5 and 3.5.
    loads, speeds = np.array([[4.0, 2.0, 5.0, 1.0]]), np.array([1.0, 2.0])
    updated, _ = vibe_update(np.array([[0, 1, 2, 3]]), loads, speeds, np.array([2, 2]))
    assert makespans(updated, loads, speeds, [2, 2]) == pytest.approx([4.5])


def test_a_balanced_layer_is_left_alone():
    slots = np.array([[0, 1, 2, 3]])
    loads = np.array([[5.0, 5.0, 4.9, 4.9]])
    updated, swaps = vibe_update(slots, loads, np.ones(2), np.array([2, 2]))
    assert updated.tolist() == slots.tolist()
    assert swaps.tolist() == [0]


def test_the_update_stops_at_the_largest_number_of_swaps():
    generator = np.random.default_rng(6)
    loads = generator.gamma(0.7, 1000.0, (3, 64))
    slots = np.tile(np.arange(64), (3, 1))
    rank_slots = np.full(8, 8)
    free = vibe_update(slots, loads, np.ones(8), rank_slots)[1]
    assert free.min() > 2
    limited, swaps = vibe_update(slots, loads, np.ones(8), rank_slots, max_swaps=2)
    assert swaps.tolist() == [2, 2, 2]
    assert ((limited != slots).sum(axis=1) <= 4).all()
    assert (vibe_update(slots, loads, np.ones(8), rank_slots, max_swaps=0)[0] == slots).all()


def test_ranks_without_experts_take_no_part_in_swaps():
    slots = np.array([[0, 1, -1, 2, 3]])
    loads = np.array([[9.0, 8.0, 1.0, 2.0]])
    updated, swaps = vibe_update(slots, loads, np.ones(4), np.array([2, 1, 2, 0]))
    assert updated.tolist() == [[3, 1, -1, 2, 0]]
    assert swaps.tolist() == [1]


def test_experts_with_several_copies_are_refused():
    slots = np.array([[0, 1, 2], [1, 0, 1]])
    with pytest.raises(PolicyNotApplicable, match="got several of expert 1 in layer 1"):
        vibe_update(slots, np.ones((2, 3)), np.ones(3), np.array([1, 1, 1]))


@small
@given(cases(), st.data())
def test_the_update_keeps_experts_and_never_raises_the_makespan(case, data):
    speeds, rank_slots = case.speeds, case.rank_slots
    slots = vibe_initial(case.loads, speeds, rank_slots)
    loads = data.draw(token_loads(*case.loads.shape))
    updated, swaps = vibe_update(slots, loads, speeds, rank_slots)
    assert_complete(updated, loads.shape[1], rank_slots)
    assert ((updated < 0) == (slots < 0)).all()
    before = np.array(makespans(slots, loads, speeds, rank_slots))
    after = np.array(makespans(updated, loads, speeds, rank_slots))
    assert (after <= before * (1 + 1e-12)).all()
    assert (updated[swaps == 0] == slots[swaps == 0]).all()
    for i in range(len(loads)):
        alone, count = vibe_update(slots[i : i + 1], loads[i : i + 1], speeds, rank_slots)
        assert (alone == updated[i]).all()
        assert count == swaps[i]


def test_layers_and_memory_layout_do_not_matter_at_the_size_of_a_real_model():
    generator = np.random.default_rng(7)
    old, new = generator.gamma(0.7, 1000.0, (2, 6, 256))
    speeds, rank_slots = generator.uniform(0.85, 1.15, 8), np.full(8, 32)
    start = vibe_initial(old, speeds, rank_slots)
    slots, swaps = vibe_update(start, new, speeds, rank_slots)
    assert swaps.min() > 0
    assert (vibe_initial(np.asfortranarray(old), speeds, rank_slots) == start).all()
    turned = vibe_update(np.asfortranarray(start), np.asfortranarray(new), speeds, rank_slots)
    assert (turned[0] == slots).all()
    for i in range(6):
        assert (vibe_initial(old[i : i + 1], speeds, rank_slots) == start[i]).all()
        alone = vibe_update(start[i : i + 1], new[i : i + 1], speeds, rank_slots)
        assert (alone[0] == slots[i]).all()
