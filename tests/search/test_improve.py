from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.improve import LESS, _double, _pairs, _single, improve, random_below
from moeplace.search.state import PINNED, State
from tests.search.checks import assert_consistent, started
from tests.strategies import legal_plans, problem, tiny_problems

MORE = settings(max_examples=4 * settings().max_examples)


@st.composite
def states(draw: st.DrawFn, **options: Any) -> tuple[Problem, State]:
    """A problem and a state that holds some placement of it, bad ones included."""
    one = draw(tiny_problems(routing="even", **options))
    assume(explain_infeasible(one) is None)
    plan = draw(legal_plans(one))
    obeyed = evaluate(one, plan).legal
    return one, started(one, plan if obeyed else None, seed=draw(st.integers(0, 9)))


def target(one: Problem, value: float = 0.0) -> np.ndarray:
    return np.full(one.layers, value)


# Exchanges, against all of them


def best_exchange(state: State, g: int, size: int) -> float:
    """Least larger time of two ranks after an exchange of `size` slots of rank g, by trial."""
    slot, value, on = state.slot[0], state.value[0], state.on[0]
    tokens, speed = state.tokens[0], state.speed[0]
    best = np.inf
    for h in range(speed.size):
        if h == g:
            continue
        for mine in combinations(range(state.cap[g]), size):
            for theirs in combinations(range(state.cap[h]), size):
                out, back = slot[g, list(mine)], slot[h, list(theirs)]
                if on[h, out].any() or on[g, back].any():
                    continue
                if (on[g, out] & PINNED).any() or (on[h, back] & PINNED).any():
                    continue
                moved = value[g, list(mine)].sum() - value[h, list(theirs)].sum()
                best = min(
                    best, max((tokens[g] - moved) / speed[g], (tokens[h] + moved) / speed[h])
                )
    return best


def assert_best(state: State, g: int, size: int, found: tuple[float, int, Any, Any, int]) -> None:
    time, h, mine, theirs, _ = found
    before = state.tokens[0, g] / state.speed[0, g]
    best = best_exchange(state, g, size)
    if h < 0:
        assert best >= before * (LESS - 1e-13), "an exchange helps but none was found"
        return
    assert time < before
    assert time == pytest.approx(best, rel=1e-11)
    out, back = state.slot[0, g, mine], state.slot[0, h, theirs]
    assert not state.on[0, h, out].any(), "it would double an expert, or is forbidden"
    assert not state.on[0, g, back].any()
    assert not ((state.on[0, g, out] | state.on[0, h, back]) & PINNED).any()
    moved = state.value[0, g, mine].sum() - state.value[0, h, theirs].sum()
    ends = (
        (state.tokens[0, g] - moved) / state.speed[0, g],
        (state.tokens[0, h] + moved) / state.speed[0, h],
    )
    assert time == pytest.approx(max(ends), rel=1e-11)


@given(states(constraints=True))
@MORE
def test_the_best_exchange_of_a_slot_is_found(case: tuple[Problem, State]) -> None:
    _, state = case
    rest = (state.slot[0], state.value[0], state.tokens[0], state.speed[0], state.cap, state.on[0])
    for g in range(state.cap.size):
        time, h, i, j, steps = _single(g, 0.0, *rest)
        assert_best(state, g, 1, (time, h, [i], [j], steps))


@given(states(constraints=True))
@MORE
def test_the_best_exchange_of_two_slots_is_found(case: tuple[Problem, State]) -> None:
    _, state = case
    ranks, most = state.slot.shape[1:]
    pairs = max(most * (most - 1) // 2, 1)
    first, second = (np.zeros((ranks, pairs), dtype=np.int32) for _ in range(2))
    sums = np.zeros((ranks, pairs))
    number = np.array(
        [
            _pairs(state.cap[g], state.value[0, g], first[g], second[g], sums[g])
            for g in range(ranks)
        ]
    )
    rest = (state.slot[0], state.tokens[0], state.speed[0], state.cap, state.on[0])
    for g in range(ranks):
        time, h, i, j, steps = _double(g, 0.0, *rest, first, second, sums, number)
        mine, theirs = [first[g, i], second[g, i]], [first[h, j], second[h, j]]
        assert_best(state, g, 2, (time, h, mine, theirs, steps))


def test_an_exchange_that_only_swaps_the_times_is_none() -> None:
    one = problem([3, 1], [1, 1], 1)
    state = started(one)
    rest = (state.slot[0], state.value[0], state.tokens[0], state.speed[0], state.cap, state.on[0])
    assert _single(int(state.tokens[0].argmax()), 0.0, *rest)[1] == -1


@given(st.lists(st.integers(0, 9), max_size=9))
def test_pairs_are_all_pairs_in_order_of_their_sum(values: list[int]) -> None:
    value = np.sort(np.array(values, dtype=float))
    wanted = [(value[i] + value[j], i, j) for i, j in combinations(range(value.size), 2)]
    size = max(len(wanted), 1)
    first, second = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    sums = np.zeros(size)
    number = _pairs(value.size, value, first, second, sums)
    found = list(zip(sums, first, second, strict=True))[:number]
    assert sorted(found) == sorted(wanted)
    assert (np.diff(sums[:number]) >= 0).all()


# The search


@given(states(constraints=True, max_layers=3, max_windows=2), st.integers(0, 4000))
@MORE
def test_whatever_it_does_the_state_is_sound_and_no_layer_gets_worse(
    case: tuple[Problem, State], steps: int
) -> None:
    one, state = case
    before = state.makespan
    every = np.arange(one.layers)
    for _ in range(2):
        improve(state, every, np.full(one.layers, steps), target(one))
        assert_consistent(state, one)
        assert (state.makespan <= before).all()
        before = state.makespan
    assert evaluate(one, state.plan(one)).legal


def test_long_searches_that_leave_dead_ends_still_return_to_their_best() -> None:
    random = np.random.default_rng(8)
    for seed in range(6):
        loads = random.integers(1, 30, (2, 7))
        one = problem(loads, random.uniform(0.5, 1.5, 3), [3, 3, 2])
        state = started(one, seed=seed)
        for _ in range(8):
            before = state.makespan
            improve(state, np.arange(2), np.full(2, 40_000), target(one))
            assert_consistent(state, one)
            assert (state.makespan <= before).all()


@given(states(max_layers=3))
def test_only_the_layers_asked_for_change(case: tuple[Problem, State]) -> None:
    _, state = case
    slots, bits = state.slot.copy(), state.on.copy()
    improve(state, np.array([0]), np.array([500]), np.array([0.0]))
    assert (state.slot[1:] == slots[1:]).all()
    assert (state.on[1:] == bits[1:]).all()
    assert not state.work[1:].any()


@given(states(max_layers=2))
def test_a_layer_at_its_target_is_left_alone(case: tuple[Problem, State]) -> None:
    one, state = case
    slots = state.slot.copy()
    improve(state, np.arange(one.layers), np.full(one.layers, 1000), state.makespan)
    assert (state.slot == slots).all()
    assert not state.work.any()


@given(states(constraints=True, max_layers=2))
def test_without_kicks_it_ends_where_no_exchange_out_of_the_slowest_rank_helps(
    case: tuple[Problem, State],
) -> None:
    one, state = case
    improve(state, np.arange(1), np.array([10**6]), np.zeros(1), kicks=(0, 0, 0))
    assert_consistent(state, one)
    slowest = int((state.tokens[0] / state.speed[0]).argmax())
    for size in (1, 2):
        assert best_exchange(state, slowest, size) >= state.makespan[0] * (LESS - 1e-13)


def test_kicks_find_what_exchanges_cannot() -> None:
    # two copies of the hot expert are a mistake that exchanges cannot undo
    one = problem([4, 4, 4, 4], [1, 1, 1, 1], 2)
    plan_of_three = [[0, -1, 0, -1, 0, 1, 2, 3]]
    stuck = started(one, Plan(slots=plan_of_three, rank_slots=[2] * 4, experts=4))
    improve(stuck, np.arange(1), np.array([20_000]), np.ones(1), kicks=(0, 0, 0))
    free = started(one, Plan(slots=plan_of_three, rank_slots=[2] * 4, experts=4))
    improve(free, np.arange(1), np.array([20_000]), np.ones(1))
    assert free.makespan[0] == pytest.approx(1)
    assert stuck.makespan[0] > 1.2


def shape_a(layers: int, seed: int = 0) -> Problem:
    random = np.random.default_rng(seed)
    loads = np.exp(random.normal(0, 1, (1, layers, 64))) * 1000
    return problem(loads, np.clip(random.normal(1, 0.05, 16), 0.85, 1.15), 5)


def bits(state: State) -> bytes:
    arrays = (
        state.slot,
        state.value,
        state.tokens,
        state.copies,
        state.on,
        state.random,
        state.work,
    )
    return b"".join(array.tobytes() for array in arrays)


def test_one_and_two_threads_give_the_same_bits() -> None:
    one = shape_a(7)
    every = np.arange(7)
    outcomes = set()
    for workers in (1, 2, 3):
        state = started(one)
        with ThreadPoolExecutor(workers) as pool:
            for _ in range(3):
                improve(state, every, np.full(7, 20_000), target(one), pool, workers)
        outcomes.add(bits(state))
    state = started(one)
    for _ in range(3):
        improve(state, every, np.full(7, 20_000), target(one))
    assert outcomes == {bits(state)}


def test_a_layer_ends_alike_with_and_without_the_others() -> None:
    one = shape_a(4)
    together, alone = started(one), started(one)
    improve(together, np.arange(4), np.full(4, 30_000), target(one))
    improve(alone, np.array([2]), np.array([30_000]), np.zeros(1))
    assert (together.slot[2] == alone.slot[2]).all()


def test_seeds_lead_elsewhere_and_more_work_helps() -> None:
    one = shape_a(3)
    ends = {}
    for seed in (0, 1):
        state = started(one, seed=seed)
        begun = state.makespan
        improve(state, np.arange(3), np.full(3, 200_000), target(one))
        assert (state.makespan < begun).all()
        assert (state.makespan < 1.01).all()
        ends[seed] = bits(state)
    assert ends[0] != ends[1]


def test_ranks_without_slots_and_one_rank_alone_are_survived() -> None:
    for one in (
        problem([5, 4, 3], [1, 2, 1], [2, 0, 2], base_load=[0, 9, 1]),
        problem([5, 4, 3], [1], 3),
        problem([5], [1, 2], [0, 1]),
    ):
        state = started(one)
        improve(state, np.arange(1), np.array([2000]), target(one))
        assert_consistent(state, one)


def test_random_numbers_are_those_of_the_published_generator() -> None:
    stream = np.array([12345, 678], dtype=np.uint64)
    x = 678
    for _ in range(100):
        x ^= x >> 12
        x = (x ^ (x << 25)) & (2**64 - 1)
        x ^= x >> 27
        wanted = (x * 0x2545F4914F6CDD1D & (2**64 - 1)) >> 33
        assert random_below(stream, 1, 1000) == wanted % 1000
    assert stream[0] == 12345
    assert stream[1] == x
