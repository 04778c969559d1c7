"""Search at the best shares: priced as `evaluate` prices the re-split plan, and never worse."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible
from moeplace.plan import EMPTY
from moeplace.problem import Problem
from moeplace.search.polish import Polish
from moeplace.search.split import resplit
from moeplace.search.state import HELD, OLD, State
from tests.brute_force import optimum
from tests.search.checks import assert_consistent, started
from tests.strategies import legal_plans, plan, problem, tiny_problems

MORE = settings(max_examples=3 * settings().max_examples)
UNLIMITED = 1 << 40


@st.composite
def states(draw: st.DrawFn, **options: Any) -> tuple[Problem, State]:
    """A weighted problem and a state that holds some placement of it."""
    options = {"max_layers": 2, "max_windows": 2, "constraints": True} | options
    one = draw(tiny_problems(routing="weighted", **options))
    assume(explain_infeasible(one) is None)
    drawn = draw(legal_plans(one))
    held = drawn if evaluate(one, drawn).legal else None
    return one, started(one, held, seed=draw(st.integers(0, 9)))


def polished(
    one: Problem,
    state: State,
    trials: int,
    *,
    allowance: Any = UNLIMITED,
    target: float = 0.0,
    layers: Any = None,
    workers: int = 1,
) -> np.ndarray:
    """Cost of the layers in seconds."""
    polish = Polish(one, state, np.broadcast_to(np.asarray(allowance), one.layers))
    part = np.arange(one.layers) if layers is None else np.array(layers)
    with ThreadPoolExecutor(workers) as pool:
        polish.improve(part, trials, np.full(part.size, target), pool, workers)
    return polish.cost


def at_best_shares(one: Problem, state: State) -> np.ndarray:
    """Mean [layers] over windows of the makespan of the state's placement, re-split."""
    makespan = evaluate(one, resplit(one, state.plan(one))).makespan
    return np.asarray((makespan * one.window_weight[:, None]).sum(axis=0))


def mark_old(state: State) -> None:
    """The ranks hold now what the state holds."""
    held = state.on[:, :, :-1]
    held |= np.where(held & HELD, np.uint8(OLD), np.uint8(0))


@given(states(), st.integers(0, 60))
@MORE
def test_it_costs_what_evaluate_says_at_the_best_shares_and_is_never_worse(
    case: tuple[Problem, State], trials: int
) -> None:
    one, state = case
    before = at_best_shares(one, state)
    for _ in range(2):
        cost = polished(one, state, trials)
        assert cost == pytest.approx(at_best_shares(one, state), rel=1e-9, abs=1e-300)
        assert (cost <= before * (1 + 1e-9)).all()
        before = cost


@given(states(), st.integers(0, 60))
@MORE
def test_whatever_it_does_the_state_is_sound_and_the_plan_legal(
    case: tuple[Problem, State], trials: int
) -> None:
    one, state = case
    polished(one, state, trials)
    assert_consistent(state, one, values=False)
    assert evaluate(one, state.plan(one)).legal


@given(states(), st.integers(0, 60), st.data())
@MORE
def test_a_budget_of_moves_is_kept(
    case: tuple[Problem, State], trials: int, data: st.DataObject
) -> None:
    one, state = case
    current = state.plan(one)
    mark_old(state)
    some = st.lists(st.integers(0, 3), min_size=one.layers, max_size=one.layers)
    allowance = np.array(data.draw(some))
    for _ in range(3):
        polished(one, state, trials, allowance=allowance)
        received = state.plan(one).moves_from(current).sum(axis=1)
        assert (received <= allowance).all()
        assert_consistent(state, one, values=False)


def test_what_a_rank_had_may_come_back_without_a_move() -> None:
    # the current plan is the best one; the state has lost it by one exchange
    one = problem([8, 7, 2, 1], [1, 1], 2, routing="weighted")
    current, now = plan([0, 3, 1, 2], [2, 2]), plan([0, 1, 2, 3], [2, 2])
    state = started(one, current)
    mark_old(state)
    lost = state.on[0, :, :-1] & OLD
    state = started(one, now)
    state.on[0, :, :-1] |= lost
    assert polished(one, state, 200, allowance=2) == pytest.approx(9)
    assert state.plan(one).moves_from(current).sum() == 0


@given(states())
def test_only_the_layers_asked_for_change(case: tuple[Problem, State]) -> None:
    one, state = case
    slots, bits = state.slot.copy(), state.on.copy()
    cost = polished(one, state, 40, layers=[0])
    assert (state.slot[1:] == slots[1:]).all()
    assert (state.on[1:] == bits[1:]).all()
    assert not state.work[1:].any()
    assert np.isinf(cost[1:]).all()


@given(states())
def test_a_layer_at_its_target_is_left_alone(case: tuple[Problem, State]) -> None:
    one, state = case
    slots = state.slot.copy()
    polished(one, state, 40, target=float(at_best_shares(one, state).max()) * (1 + 1e-9))
    assert (state.slot == slots).all()
    assert not state.work.any()


def test_it_stops_when_the_target_is_reached() -> None:
    one = problem([8, 7, 2, 1], [1, 1], 2, routing="weighted")
    state = started(one, plan([0, 1, 2, 3], [2, 2]))
    assert polished(one, state, 10_000, target=9 * (1 + 1e-9)) == pytest.approx(9)
    assert state.work[0] < 10_000


def test_a_copy_is_priced_at_its_best_shares() -> None:
    # even halves of 8 reach 7.5; shares of 3.25 and 4.75 balance the ranks
    one = problem([8, 3.5, 2], [1, 1], 2, routing="weighted")
    state = started(one, plan([0, EMPTY, 1, 2], [2, 2]))
    assert polished(one, state, 300) == pytest.approx(6.75)


def test_several_windows_share_one_placement_but_not_their_shares() -> None:
    one = problem([[[6, 2, 1]], [[1, 2, 6]]], [1, 1], 2, routing="weighted")
    state = started(one, plan([0, 2, 1, EMPTY], [2, 2]))
    cost = polished(one, state, 500)
    assert cost[0] == pytest.approx(optimum(one))


def tiny_set() -> list[Problem]:
    """Eighty fixed problems of up to 5 experts and 3 ranks, half of them with few spare slots."""
    random = np.random.default_rng(7)
    chosen: list[Problem] = []
    while len(chosen) < 80:
        experts, ranks = int(random.integers(2, 6)), int(random.integers(2, 4))
        slots = random.integers(1, experts + 1, ranks)
        spare = int(slots.sum()) - experts
        if spare < 0 or (len(chosen) % 2 and spare > 1):
            continue
        loads = np.round(random.lognormal(2, 1, experts))
        speeds = random.choice([random.uniform(0.3, 1.5, ranks), np.ones(ranks)])
        chosen.append(problem(loads, speeds, slots, routing="weighted"))
    return chosen


def test_it_finds_the_optimum_of_most_tiny_problems() -> None:
    hits = 0
    for one in tiny_set():
        cost, best = polished(one, started(one), 400)[0], optimum(one)
        assert cost >= best * (1 - 1e-9)
        hits += cost <= best * (1 + 1e-9)
    assert hits >= 74


def test_ranks_without_slots_and_one_rank_alone_are_survived() -> None:
    for one in (
        problem([5, 4, 3], [1, 2, 1], [2, 0, 2], base_load=[0, 9, 1], routing="weighted"),
        problem([5, 4, 3], [1], 3, routing="weighted"),
        problem([5], [1, 2], [0, 1], routing="weighted"),
        problem([0, 0], [1, 2], 2, routing="weighted"),
    ):
        state = started(one)
        cost = polished(one, state, 200)
        assert cost == pytest.approx(at_best_shares(one, state), rel=1e-9)
        assert_consistent(state, one, values=False)


def test_one_and_two_threads_give_the_same_bits() -> None:
    random = np.random.default_rng(0)
    one = problem(
        np.exp(random.normal(0, 1, (2, 5, 24))),
        random.uniform(0.85, 1.15, 6),
        [5, 4, 4, 4, 4, 4],
        routing="weighted",
    )
    outcomes = set()
    for workers in (1, 2, 3):
        state = started(one)
        cost = polished(one, state, 200, workers=workers)
        arrays = (state.slot, state.copies, state.on, state.random, state.work, cost)
        outcomes.add(b"".join(array.tobytes() for array in arrays))
    assert len(outcomes) == 1


def test_it_gains_where_spare_slots_are_few() -> None:
    random = np.random.default_rng(1)
    loads = np.exp(random.normal(0, 1, (3, 24)))
    one = problem(loads, random.uniform(0.85, 1.15, 6), [5, 4, 4, 4, 4, 4], routing="weighted")
    state = started(one)
    before = at_best_shares(one, state)
    cost = polished(one, state, 1000)
    assert (cost <= before).all()
    assert (cost < before * 0.99).sum() >= 2, "layer 1 has an expert that no placement helps"
