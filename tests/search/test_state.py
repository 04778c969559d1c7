import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import Forbid, Pin
from moeplace.plan import by_rank
from moeplace.problem import Problem
from moeplace.search.state import BARRED, PINNED, State, to_slots
from tests.search.checks import started
from tests.strategies import legal_plans, problem, tiny_problems


def test_loads_are_in_units_of_the_fluid_bound() -> None:
    state = State.of(problem([[6, 2], [0, 0]], [1, 3], 1, base_load=[0, 4]))
    assert state.unit.tolist() == [3.0, 4 / 3]
    assert state.load.tolist() == [[2.0, 2 / 3, 0.0], [0.0, 0.0, 0.0]]
    assert state.base[0].tolist() == [0.0, 4 / 3]
    assert state.tokens.tolist() == state.base.tolist()


def test_a_layer_without_tokens_is_in_units_of_one() -> None:
    assert State.of(problem([0, 0], [1], 2)).unit.tolist() == [1.0]


def test_the_mean_over_windows_is_planned_on() -> None:
    one = problem([[[4, 0]], [[0, 8]]], [1], 2, window_weight=[3, 1])
    state = State.of(one)
    assert (state.load[0, :2] * state.unit).tolist() == [3.0, 2.0]


def test_rules_become_bits_and_ranks_without_slots_are_barred() -> None:
    rules = [Pin(0, 1), Forbid(1, 0)]
    state = State.of(problem([1, 2], [1, 1, 1], [2, 1, 0], constraints=rules))
    assert state.on[0].tolist() == [[0, BARRED, 0], [PINNED, 0, 0], [BARRED, BARRED, BARRED]]


def test_slots_beyond_the_number_of_experts_are_left_out() -> None:
    state = State.of(problem([1, 2], [1, 1], [5, 1]))
    assert state.cap.tolist() == [2, 1]
    assert state.slot.shape == (1, 2, 2)


def test_every_layer_and_seed_has_random_numbers_of_its_own() -> None:
    one = problem(np.ones((50, 2)), [1], 2)
    streams = np.concatenate([State.of(one, seed).random for seed in range(20)])
    assert np.unique(streams).size == streams.size
    assert (streams != 0).all(), "xorshift never leaves 0"
    assert (State.of(one, 7).random == State.of(one, 7).random).all()


def test_a_layer_has_the_same_random_numbers_whatever_layers_follow() -> None:
    few, many = problem(np.ones((2, 2)), [1], 2), problem(np.ones((9, 2)), [1], 2)
    assert (State.of(few, 3).random == State.of(many, 3).random[:2]).all()


def test_a_plan_lists_experts_in_order_with_empty_slots_last() -> None:
    one = problem([1, 1, 1], [1, 1, 1], [3, 0, 5])
    state = started(one)
    state.slot[0] = [[2, 3, 0], [3, 3, 3], [2, 1, 3]]  # 3 is EMPTY; a rank's tail does not count
    assert state.plan(one).slots.tolist() == [[0, 2, -1, 1, 2, -1, -1, -1]]


def test_what_lies_beyond_the_slots_of_a_rank_is_never_read() -> None:
    one = problem([1, 1], [1, 1], [2, 1])
    state = started(one)
    state.slot[0] = [[0, 1], [1, 0]]
    assert state.plan(one).slots.tolist() == [[0, 1, 1]]


@given(st.data(), tiny_problems(max_layers=2))
def test_to_slots_undoes_by_rank(data: st.DataObject, one: Problem) -> None:
    plan = data.draw(legal_plans(one))
    assert (to_slots(by_rank(plan.slots, plan.rank_slots), plan.rank_slots) == plan.slots).all()


def test_to_slots_fills_slots_that_no_rank_can_use() -> None:
    table = np.array([[[0.5, 0.5], [1.0, 0.0]]])
    assert to_slots(table, np.array([3, 2]), fill=0.0).tolist() == [[0.5, 0.5, 0.0, 1.0, 0.0]]


@given(tiny_problems(max_layers=2, routing="even"))
def test_makespan_is_that_of_the_mean_load(one: Problem) -> None:
    state = started(one)
    tokens, base = one.mean_load
    plan = state.plan(one)
    share = np.where(plan.slots >= 0, 1.0, 0.0)
    share *= np.take_along_axis(
        tokens / plan.replicas, np.where(plan.slots >= 0, plan.slots, 0), axis=1
    )
    on_rank = np.maximum(plan.by_rank(share), 0).sum(axis=2)
    wanted = ((base + on_rank) / one.cluster.speeds).max(axis=1)
    assert state.makespan * state.unit == pytest.approx(wanted, rel=1e-12, abs=1e-300)
