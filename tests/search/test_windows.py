"""Several windows with one placement: priced as `evaluate` does, and never worse than the start."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible
from moeplace.problem import Problem
from moeplace.search.state import State
from moeplace.search.windows import LEAST_CAPACITY, Windows, _price, three
from tests.brute_force import optimum
from tests.search.checks import assert_consistent, started
from tests.strategies import legal_plans, plan, problem, tiny_problems

MORE = settings(max_examples=3 * settings().max_examples)


@st.composite
def states(draw: st.DrawFn) -> tuple[Problem, State]:
    """A problem of one to three windows and a state that holds some placement of it."""
    one = draw(tiny_problems(routing="even", max_layers=2, max_windows=3, constraints=True))
    assume(explain_infeasible(one) is None)
    drawn = draw(legal_plans(one))
    held = drawn if evaluate(one, drawn).legal else None
    return one, started(one, held, seed=draw(st.integers(0, 9)))


def anneal(
    one: Problem,
    state: State,
    trials: int,
    *,
    heat: tuple[float, float] = (0.2, 0.0),
    weight: Any = None,
    layers: Any = None,
    workers: int = 1,
) -> np.ndarray:
    """Cost of the layers in seconds."""
    every = Windows(one, state)
    part = np.arange(one.layers) if layers is None else np.array(layers)
    weight = one.window_weight if weight is None else np.array(weight, dtype=float)
    with ThreadPoolExecutor(workers) as pool:
        every.improve(part, trials, np.tile(heat, (part.size, 1)), weight, pool, workers)
    return np.asarray(every.cost * state.unit)


def weighted_mean(one: Problem, state: State, weight: Any = None) -> np.ndarray:
    """Mean [layers] over windows of the makespan of the state's placement, by `evaluate`."""
    weight = one.window_weight if weight is None else np.array(weight, dtype=float)
    makespan = evaluate(one, state.plan(one)).makespan
    return np.asarray((makespan * weight[:, None]).sum(axis=0))


@given(states(), st.integers(1, 800), st.floats(0, 1), st.data())
@MORE
def test_it_costs_what_evaluate_says_and_is_never_worse_than_the_start(
    case: tuple[Problem, State], trials: int, heat: float, data: st.DataObject
) -> None:
    one, state = case
    some = st.lists(st.floats(0.1, 2.0), min_size=one.windows, max_size=one.windows)
    weight = data.draw(some)
    before = weighted_mean(one, state, weight)
    for _ in range(2):
        cost = anneal(one, state, trials, heat=(heat, heat / 3), weight=weight)
        assert cost == pytest.approx(weighted_mean(one, state, weight), rel=1e-12, abs=1e-300)
        assert (cost <= before * (1 + 1e-12)).all()
        before = cost


@given(states(), st.integers(1, 800), st.floats(0, 2))
@MORE
def test_whatever_it_accepts_the_state_is_sound_and_the_plan_legal(
    case: tuple[Problem, State], trials: int, heat: float
) -> None:
    one, state = case
    anneal(one, state, trials, heat=(heat, heat))
    assert_consistent(state, one, values=False)
    assert evaluate(one, state.plan(one)).legal
    assert (state.work == trials).all()


@given(states())
def test_only_the_layers_asked_for_change(case: tuple[Problem, State]) -> None:
    one, state = case
    slots, bits = state.slot.copy(), state.on.copy()
    anneal(one, state, 200, layers=[0])
    assert (state.slot[1:] == slots[1:]).all()
    assert (state.on[1:] == bits[1:]).all()
    assert not state.work[1:].any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_the_three_slowest_ranks_are_found(times: list[int]) -> None:
    top = np.zeros(3, dtype=np.int64)
    three(np.array(times, dtype=float), top)
    found = top[top >= 0].tolist()
    assert len(set(found)) == len(found) == min(3, len(times))
    assert [times[g] for g in found] == sorted(times, reverse=True)[:3]


@given(states())
def test_rank_times_are_those_of_the_plan(case: tuple[Problem, State]) -> None:
    one, state = case
    every = Windows(one, state)
    rows = every.floor.size  # one or, if token capacities are limited, two for each window
    time, top = np.zeros((rows, one.ranks)), np.zeros((rows, 3), dtype=np.int64)
    for layer in range(one.layers):
        _price(
            np.ones(rows), every.floor, every.load[:, layer], every.base[:, layer],
            every.speed[:, layer], state.cap, state.slot[layer], state.copies[layer], time, top,
        )  # fmt: skip
        priced = evaluate(one, state.plan(one))
        seconds = priced.rank_seconds[:, layer]
        found = time[: one.windows] * state.unit[layer]
        assert found == pytest.approx(seconds, rel=1e-12, abs=1e-300)
        if rows > one.windows:
            used = priced.rank_tokens[:, layer] / np.maximum(
                one.capacity, LEAST_CAPACITY * one.cluster.speeds * state.unit[layer]
            )
            assert time[one.windows :] == pytest.approx(used, rel=1e-8, abs=1e-300)


def tiny_set(spare: bool) -> list[Problem]:
    """Forty fixed problems of two or three windows that differ much."""
    random = np.random.default_rng(2)
    chosen = []
    while len(chosen) < 40:
        experts, ranks, windows = (int(random.integers(2, n)) for n in (6, 4, 4))
        slots = random.integers(1, experts + 1, ranks)
        if slots.sum() < experts or spare != (slots.sum() > experts):
            continue
        loads = np.round(random.lognormal(2, 1, (windows, 1, experts)))
        chosen.append(problem(loads, random.uniform(0.5, 1.5, ranks), slots))
    return chosen


@pytest.mark.parametrize("spare", [False, True])
def test_it_finds_the_best_mean_of_most_tiny_problems(spare: bool) -> None:
    hits = 0
    for one in tiny_set(spare):
        state = started(one)
        for turn in range(5):
            hot, cold = 0.3 * (1 - turn / 5), 0.3 * (0.8 - turn / 5)
            cost = anneal(one, state, 400, heat=(hot, cold))
        best = optimum(one)
        assert cost[0] >= best * (1 - 1e-9)
        hits += cost[0] <= best * (1 + 1e-9)
    assert hits >= 36


def test_windows_that_disagree_are_planned_apart_from_their_mean() -> None:
    # on the mean all experts are alike; in truth 0 and 1 are hot together, and 2 and 3
    loads = [[[9, 9, 1, 1]], [[1, 1, 9, 9]]]
    one = problem(loads, [1, 1], 2)
    state = started(one, plan([0, 1, 2, 3], [2, 2]))
    assert weighted_mean(one, state) == pytest.approx(18)
    assert anneal(one, state, 200) == pytest.approx(10)


def test_a_window_without_weight_does_not_count() -> None:
    loads = [[[9, 9, 1, 1]], [[9, 1, 9, 1]]]
    one = problem(loads, [1, 1], 2)
    for weight, best in (([1, 0], 10), ([0, 1], 10)):
        state = started(one, plan([0, 1, 2, 3], [2, 2]))
        assert anneal(one, state, 300, weight=weight) == pytest.approx(best)


def test_more_and_fewer_ranks_than_the_three_that_are_kept() -> None:
    for one in (
        problem([[[5, 3]], [[1, 4]]], [1], 2),
        problem([[[5, 3]], [[1, 4]]], [1, 2], 1, base_load=[0, 3]),
        problem([[[5, 3]], [[1, 4]]], [1, 2, 1], [1, 0, 2], base_load=[0, 9, 1]),
        problem(np.arange(24).reshape(2, 1, 12), [1, 2, 1, 1, 2, 1], 3),
    ):
        state = started(one)
        before = weighted_mean(one, state)
        cost = anneal(one, state, 500)
        assert cost == pytest.approx(weighted_mean(one, state), rel=1e-12)
        assert cost <= before * (1 + 1e-12)
        assert_consistent(state, one, values=False)


def test_one_and_two_threads_give_the_same_bits() -> None:
    random = np.random.default_rng(0)
    loads = np.exp(random.normal(0, 1, (3, 5, 32)))
    one = problem(loads, random.uniform(0.85, 1.15, 8), 5)
    outcomes = set()
    for workers in (1, 2, 3):
        state = started(one)
        cost = anneal(one, state, 5000, heat=(0.02, 0.0), workers=workers)
        arrays = (state.slot, state.copies, state.on, state.random, state.work, cost)
        outcomes.add(b"".join(array.tobytes() for array in arrays))
    assert len(outcomes) == 1


def test_a_search_of_many_windows_gains_on_a_plan_for_their_mean() -> None:
    random = np.random.default_rng(1)
    loads = np.exp(random.normal(0, 1, (4, 2, 32)))
    one = problem(loads, np.ones(8), 5)
    state = started(one)
    before = weighted_mean(one, state)
    for hot in (0.01, 0.005, 0.0):
        anneal(one, state, 10_000, heat=(hot, hot))
    assert (weighted_mean(one, state) < 0.95 * before).all()
