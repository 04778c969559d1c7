import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.errors import PlanError
from moeplace.plan import EMPTY, Plan, by_rank
from tests.strategies import legal_plans, plan, tiny_problems


class TestErrors:
    @pytest.mark.parametrize(
        ("slots", "message"),
        [
            ([0, 1, 1, 0], "Plan misses expert 2 in layer 0: .* slot"),
            ([[0, 1, 2, 0], [0, 1, 1, 0]], "misses expert 2 in layer 1"),
            ([0, 1, 2, 3], r"at most 2: got 3\.0 at layer 0, slot 3"),
            ([0, 1, 2, -2], r"at least -1 .*: got -2\.0 at layer 0, slot 3"),
            ([0, 1, 2, 0.5], "whole numbers"),
            ([0, 1, 2], "3 slots a layer but its ranks have 4"),
            ([0, 0, 1, 2], "holds expert 0 twice on rank 0 in layer 0: .* Empty the slot"),
            ([[0, 1, 2, -1], [0, 1, 2, 2]], "holds expert 2 twice on rank 1 in layer 1"),
        ],
    )
    def test_a_plan_must_hold_every_expert_once_on_a_rank(
        self, slots: object, message: str
    ) -> None:
        with pytest.raises(PlanError, match=message):
            plan(slots, [2, 2], 3)

    @pytest.mark.parametrize(
        ("slots", "message"),
        [
            ([[[0, 1]]], r"axes \[layers, slots\]"),
            ([["a", "b"]], "must hold numbers"),
            ([[0, 1], [0]], "ragged"),
            ([[]], "empty"),
        ],
    )
    def test_slots_must_be_a_full_table_of_numbers(self, slots: object, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            Plan(slots=slots, rank_slots=[2], experts=2)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("rank_slots", "message"),
        [
            ([2, -1], "Slots per rank must be finite, at least 0"),
            ([2.5], "whole numbers"),
            ([], "Slots per rank is empty"),
            ([[2]], r"axes \[ranks\]"),
        ],
    )
    def test_slots_per_rank_must_be_counts(self, rank_slots: object, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            plan([0, 1], rank_slots, 2)

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            ([[0.5, 1, 1, 0.4]], r"Shares of expert 0 sum to 0\.9 in layer 0: .* Normalise"),
            ([[0.5, 1, 1, 0.5 + 1e-8]], "sum to 1.00000001"),
            ([[-0.5, 1, 1, 1.5]], r"Shares must be finite.* got -0\.5 at layer 0, slot 0"),
            ([[float("nan"), 1, 1, 1]], "got nan"),
            ([[1.5, 1, 1, 0]], r"got 1\.5 at layer 0, slot 0"),
            ([[0.5, 1, 0.5]], r"one number for each slot \(1, 4\), got shape \(1, 3\)"),
            ([[0.5, 1, 1, 0.5]] * 2, r"got shape \(2, 4\)"),
            ([0.5, 1, 1, 0.5], "axes"),
            (
                [[[0.5, 1, 1, 0.5]], [[0.5, 1, 0.9, 0.5]]],
                "expert 2 sum to 0.9 in layer 0 of window 1",
            ),
        ],
    )
    def test_shares_must_sum_to_one_for_every_expert(self, split: object, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            plan([0, 1, 2, 0], [2, 2], split=split)

    def test_an_empty_slot_takes_no_share(self) -> None:
        with pytest.raises(PlanError, match=r"give 0\.25 to an EMPTY slot at layer 0, slot 1"):
            plan([0, -1, 1], [3], split=[[1, 0.25, 1]])
        with pytest.raises(PlanError, match="EMPTY slot at window 1, layer 0, slot 1"):
            plan([0, -1, 1], [3], split=[[[1, 0, 1]], [[1, 0.25, 1]]])


def test_ragged_shares_are_refused() -> None:
    with pytest.raises(PlanError, match="Shares is ragged"):
        plan([[0, 1], [1, 0]], [2], split=[[1, 1], [1]])


def test_shares_may_be_the_same_in_all_windows_or_differ() -> None:
    assert plan([0, 0], [1, 1], split=[[0.25, 0.75]]).split.shape == (1, 2)  # type: ignore[union-attr]
    both = plan([0, 0], [1, 1], split=[[[0.25, 0.75]], [[0.5, 0.5]]])
    assert both.split.shape == (2, 1, 2)  # type: ignore[union-attr]


def test_rounding_of_shares_is_forgiven() -> None:
    plan([0, 0, 0], [1, 1, 1], split=[[1 / 3, 1 / 3, 1 / 3 + 5e-10]])


def test_derived_maps_of_a_small_plan() -> None:
    one = plan([[0, 1, 2, 0, EMPTY], [2, 1, 0, 1, 2]], [2, 0, 3])
    assert (one.layers, one.ranks) == (2, 3)
    assert one.rank_of_slot.tolist() == [0, 0, 2, 2, 2]
    assert one.replicas.tolist() == [[2, 1, 1], [1, 2, 2]]
    assert one.duplicates.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_by_rank_pads_unequal_ranks_with_empty() -> None:
    one = plan([[0, 1, 2, 0, 1]], [2, 0, 3])
    assert one.by_rank(one.slots).tolist() == [[[0, 1, -1], [-1, -1, -1], [2, 0, 1]]]


def test_by_rank_reshapes_equal_ranks_and_keeps_leading_axes() -> None:
    values = np.arange(12.0).reshape(1, 2, 6)
    laid = by_rank(values, np.array([3, 3]))
    assert laid.shape == (1, 2, 2, 3)
    assert laid[0, 1].tolist() == [[6, 7, 8], [9, 10, 11]]
    uneven = by_rank(values, np.array([1, 5]))
    assert uneven.shape == (1, 2, 2, 5)
    assert uneven[0, 1].tolist() == [[6, -1, -1, -1, -1], [7, 8, 9, 10, 11]]


@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any))
def test_by_rank_keeps_every_value_in_order_on_its_rank(
    data: st.DataObject, rank_slots: list[int]
) -> None:
    size = sum(rank_slots)
    values = data.draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    laid = by_rank(np.array([values]), np.array(rank_slots))[0].tolist()
    rest = iter(values)
    for row, slots in zip(laid, rank_slots, strict=True):
        assert row == [next(rest) for _ in range(slots)] + [EMPTY] * (max(rank_slots) - slots)


class TestDuplicates:
    def test_a_published_map_may_hold_two_copies_on_a_rank(self) -> None:
        one = plan([[0, 0, 1, 0], [1, 0, 1, 1]], [2, 2], allow_duplicates=True)
        assert one.duplicates.tolist() == [[1, 0], [0, 1]]
        assert one.replicas.tolist() == [[3, 1], [1, 3]]

    def test_each_copy_beyond_the_first_is_counted(self) -> None:
        one = plan([[0, 0, 0, 1, 1, -1, -1]], [7], allow_duplicates=True)
        assert one.duplicates.tolist() == [[3]]

    def test_empty_slots_are_no_duplicates(self) -> None:
        assert plan([0, -1, -1, 1], [4]).duplicates.tolist() == [[0]]

    def test_experts_of_neighbouring_ranks_are_not_mixed_up(self) -> None:
        assert plan([0, 1, 1, 0], [2, 2]).duplicates.tolist() == [[0, 0]]


class TestMoves:
    def test_a_move_is_a_copy_that_a_rank_did_not_have(self) -> None:
        old = plan([[0, 1, 2, 3], [0, 1, 2, 3]], [2, 2])
        new = plan([[0, 2, 1, 3], [1, 0, 3, 2]], [2, 2])
        assert new.moves_from(old).tolist() == [[1, 1], [0, 0]]

    def test_dropping_a_copy_is_no_move(self) -> None:
        old, new = plan([0, 1, 2, 0], [2, 2]), plan([0, 1, 2, -1], [2, 2])
        assert new.moves_from(old).tolist() == [[0, 0]]
        assert old.moves_from(new).tolist() == [[0, 1]]

    def test_a_duplicate_is_received_once(self) -> None:
        old = plan([0, 1, 2, -1], [2, 2])
        new = plan([0, 1, 2, 0], [2, 2]).with_split(None)
        twice = plan([0, 1, 2, 0, 0], [2, 3], allow_duplicates=True)
        assert new.moves_from(old).tolist() == twice.moves_from(old).tolist() == [[0, 1]]

    def test_ranks_may_have_gained_slots(self) -> None:
        old, new = plan([0, 1], [1, 1]), plan([0, -1, 1, 0], [2, 2])
        assert new.moves_from(old).tolist() == [[0, 1]]

    def test_plans_of_different_shapes_cannot_be_compared(self) -> None:
        with pytest.raises(PlanError, match=r"got \(1, 2, 1\) and \(1, 2, 2\)"):
            plan([0, 1], [1, 1]).moves_from(plan([0, 1], [2]))


def test_with_split_changes_shares_only() -> None:
    one = plan([0, 1, 0, 0], [2, 2], allow_duplicates=True)
    two = one.with_split(np.array([[0.5, 1, 0.25, 0.25]]))
    assert two.slots.tolist() == one.slots.tolist()
    assert two.allow_duplicates
    assert two.split is not None
    assert two.with_split(None).split is None


@given(st.data())
def test_a_plan_from_drawn_slots_is_what_was_drawn(data: st.DataObject) -> None:
    problem = data.draw(tiny_problems(max_layers=2))
    one = data.draw(legal_plans(problem))
    for layer in range(one.layers):
        on = [set(row) - {EMPTY} for row in one.by_rank(one.slots)[layer].tolist()]
        assert one.replicas[layer].tolist() == [
            sum(e in held for held in on) for e in range(one.experts)
        ]
    assert not one.duplicates.any()
    assert not one.moves_from(one).any()


def test_arrays_of_a_plan_are_read_only_copies() -> None:
    slots = np.array([[0, 1]])
    one = Plan(slots=slots, rank_slots=np.array([1, 1]), experts=2, split=np.array([[1.0, 1.0]]))
    slots[0] = [1, 0]
    assert one.slots.tolist() == [[0, 1]]
    for array in (one.slots, one.rank_slots, one.split):
        assert array is not None
        assert not array.flags.writeable
