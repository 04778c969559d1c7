from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.constraints import Forbid
from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible
from moeplace.problem import Problem
from moeplace.search.construct import _count, adopt, construct
from moeplace.search.state import State
from tests.search.checks import assert_consistent, sets_on_ranks, started
from tests.strategies import legal_plans, problem, tiny_problems

MORE = settings(max_examples=5 * settings().max_examples)


@given(tiny_problems(max_layers=2, max_windows=2))
@MORE
def test_a_placement_is_always_found_and_legal(one: Problem) -> None:
    state = started(one)
    assert_consistent(state, one)
    assert evaluate(one, state.plan(one)).legal


@given(tiny_problems(max_experts=5, max_layers=2, constraints=True))
@MORE
def test_pins_and_forbids_are_obeyed_or_cannot_be(one: Problem) -> None:
    state = State.of(one)
    found = construct(state)
    assert (found == -1) == (explain_infeasible(one) is None)
    if found == -1:
        assert_consistent(state, one)
        assert evaluate(one, state.plan(one)).legal


def test_a_copy_that_finds_no_rank_is_given_back() -> None:
    # 1 and 0.9 fill the fast rank, so the two copies of 1.5 would both lie on the slow one
    one = problem([1, 0.9, 1.5], [1, 0.3], 2)
    state = started(one)
    assert_consistent(state, one)
    assert state.copies[0, :3].tolist() == [1, 1, 1]
    assert sets_on_ranks(state.plan(one)) == [[{0, 1}, {2}]]


def test_a_copy_makes_room_for_an_expert_that_may_lie_nowhere_else() -> None:
    # the hot expert lies on both ranks before 1 and 2 come, which may lie on rank 1 only
    rules = [Forbid(1, 0), Forbid(2, 0)]
    one = problem([9, 2, 1], [1, 1], 2, constraints=rules)
    state = started(one)
    assert_consistent(state, one)
    assert sets_on_ranks(state.plan(one)) == [[{0}, {1, 2}]]


def test_experts_make_room_in_a_chain() -> None:
    # 3 may lie on rank 0 only, which 0 and 1 fill; 1 may pass to rank 1, whose 2 may pass to rank 2
    rules = [Forbid(3, 1), Forbid(3, 2), Forbid(0, 1), Forbid(0, 2), Forbid(1, 2)]
    one = problem([9, 8, 7, 1], [1, 0.9, 0.1], [2, 1, 1], constraints=rules)
    state = started(one)
    assert_consistent(state, one)
    assert sets_on_ranks(state.plan(one)) == [[{0, 3}, {1}, {2}]]


def test_experts_without_tokens_are_placed_once_and_the_rest_stays_empty() -> None:
    state = started(problem([0, 0, 0], [1, 1], 3))
    assert state.copies[0, :3].tolist() == [1, 1, 1]


def test_slots_for_every_expert_everywhere_are_used_where_there_are_tokens() -> None:
    one = problem([1, 2, 0], [1, 2], 5)
    assert started(one).copies[0, :3].tolist() == [2, 2, 1]


# Counts


def counted(loads: np.ndarray, pins: np.ndarray, most: np.ndarray, slots: int) -> np.ndarray:
    """The meaning of `_count`: one more copy to the largest load per copy, the first if equal."""
    copies = np.maximum(pins, 1)
    while copies.sum() < slots:
        share = np.where(copies < most, loads / copies, 0.0)
        if share.max() == 0:
            break
        copies[share.argmax()] += 1
    return copies


def compiled_count(loads: np.ndarray, pins: np.ndarray, most: np.ndarray, slots: int) -> np.ndarray:
    copies = np.zeros(loads.size + 1, dtype=np.int64)
    _count(np.append(loads, 0.0), pins, most, slots, copies)
    return copies[:-1]


@given(st.data(), st.integers(1, 12), st.integers(1, 6))
@MORE
def test_counts_are_what_a_loop_over_the_largest_share_gives(
    data: st.DataObject, experts: int, ranks: int
) -> None:
    entry = st.one_of(st.integers(0, 5).map(float), st.floats(0, 5, allow_subnormal=False))
    loads = np.array(data.draw(st.lists(entry, min_size=experts, max_size=experts)))
    most = np.array(data.draw(st.lists(st.integers(1, ranks), min_size=experts, max_size=experts)))
    pins = np.array([data.draw(st.integers(0, int(m))) for m in most])
    slots = data.draw(st.integers(int(np.maximum(pins, 1).sum()), experts * ranks + 2))
    found = compiled_count(loads, pins, most, slots)
    assert found.tolist() == counted(loads, pins, most, slots).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 4))
def test_counts_make_the_largest_share_least(loads: list[int], spare: int) -> None:
    experts, ranks = len(loads), 3
    slots = min(experts + spare, experts * ranks)
    none, most = np.zeros(experts, dtype=np.int64), np.full(experts, ranks)
    found = np.array(loads) / compiled_count(np.array(loads, dtype=float), none, most, slots)
    best = min(
        max(load / c for load, c in zip(loads, counts, strict=True))
        for counts in product(range(1, ranks + 1), repeat=experts)
        if sum(counts) <= slots
    )
    assert found.max() == pytest.approx(best)


# Placement


def placed(one: Problem) -> list[set[int]] | None:
    """The meaning of the placement: each replica, largest first, where it ends earliest.

    None if a replica finds no rank.
    """
    loads, speeds = one.tokens[0, 0] / one.fluid[0, 0], one.cluster.speeds
    free = np.minimum(one.cluster.slots, one.experts)
    ranks = int((free > 0).sum())
    copies = counted(loads, np.zeros(one.experts, int), np.full(one.experts, ranks), free.sum())
    time, on = one.base[0, 0] / one.fluid[0, 0], [set[int]() for _ in range(one.ranks)]
    for e in np.argsort(-loads / copies, kind="stable").tolist():
        for _ in range(copies[e]):
            ends = np.where(
                [free[g] == len(on[g]) or e in on[g] for g in range(one.ranks)],
                np.inf,
                (time + loads[e] / copies[e]) / speeds,
            )
            best = int(ends.argmin())
            if ends[best] == np.inf:
                return None
            on[best].add(e)
            time[best] += loads[e] / copies[e]
    return on


@given(tiny_problems())
@MORE
def test_replicas_go_largest_first_to_the_rank_that_ends_earliest(one: Problem) -> None:
    if one.fluid[0, 0] > 0 and (wanted := placed(one)) is not None:
        assert sets_on_ranks(started(one).plan(one)) == [wanted]


# Going on from a plan


@given(st.data(), tiny_problems(max_layers=3, max_windows=2))
@MORE
def test_a_plan_is_adopted_in_the_layers_asked_for(data: st.DataObject, one: Problem) -> None:
    plan = data.draw(legal_plans(one))
    layers = np.array(sorted(data.draw(st.sets(st.integers(0, one.layers - 1)))), dtype=np.int64)
    state = started(one)
    before = sets_on_ranks(state.plan(one))
    adopt(state, plan, layers)
    assert_consistent(state, one)
    after, wanted = sets_on_ranks(state.plan(one)), sets_on_ranks(plan)
    for layer in range(one.layers):
        assert after[layer] == (wanted if layer in layers else before)[layer]
