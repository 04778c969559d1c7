"""Ranks joined into groups, with a sliding window in each: legal, and near the makespan aimed at."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.groups import _join, grouped
from moeplace.search.state import to_slots
from tests.strategies import problem, tiny_problems

MORE = settings(max_examples=4 * settings().max_examples)


def joined(one: Problem, seconds: float, seed: int = 0, steps: int = 4000) -> Plan | None:
    """The plan with its shares; `Plan` itself checks that they sum to 1."""
    found = grouped(one, 0, seconds, seed, steps)
    if found is None:
        return None
    slots, share = found
    # a rank has columns only for what it can use
    used = np.arange(slots.shape[1]) < np.minimum(one.cluster.slots, one.experts)[:, None]
    assert (slots[~used] == EMPTY).all()
    assert not share[~used].any()
    return Plan(
        slots=to_slots(slots[None], one.cluster.slots),
        rank_slots=one.cluster.slots,
        experts=one.experts,
        split=to_slots(share[None], one.cluster.slots, fill=0.0),
    )


def all_spent(one: Problem, seconds: float) -> bool:
    """Whether joining takes all spare slots, or every expert lies in one group anyway."""
    cluster, (tokens, base) = one.cluster, one.mean_load
    cap = np.minimum(cluster.slots, one.experts)
    room = np.maximum(seconds * cluster.speeds - base[0], 0.0)
    found = _join(tokens[0], room, cap)
    if found is None or len(found[0]) == 1:
        return True
    held = sum(min(int(cap[group].sum()) - len(group) + 1, one.experts) for group in found[0])
    return held <= one.experts


@given(tiny_problems(routing="weighted"), st.floats(1.0, 3.0), st.integers(0, 3))
@MORE
def test_what_is_found_is_legal_with_whole_shares(one: Problem, above: float, seed: int) -> None:
    bound = float(lower_bound(one).per_layer[0, 0])
    assume(all_spent(one, bound * above))
    found = joined(one, bound * above, seed, steps=300)
    if found is None:
        return
    priced = evaluate(one, found)
    assert priced.legal
    assert priced.objective >= bound * (1 - 1e-9)


@st.composite
def few_spares(draw: st.DrawFn) -> tuple[Problem, int]:
    """Many experts on four to eight ranks, with fewer spare slots than ranks less one."""
    ranks, each = draw(st.integers(4, 8)), draw(st.integers(4, 8))
    spare = draw(st.integers(0, ranks - 2))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    loads = random.lognormal(0, draw(st.floats(0.2, 0.6)), ranks * each - spare)
    return problem(loads, random.uniform(0.8, 1.2, ranks), each, routing="weighted"), spare


@given(few_spares())
def test_where_no_expert_is_hot_it_comes_near_the_makespan_aimed_at(
    case: tuple[Problem, int],
) -> None:
    one, _ = case
    bound = lower_bound(one)
    assume(bound.sources == {"fluid": 1} and all_spent(one, bound.total))
    found = joined(one, bound.total)
    assert found is not None
    assert evaluate(one, found).objective <= bound.total * 1.02


def test_it_comes_within_a_hundred_thousandth_in_most_cases() -> None:
    near = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        loads = random.lognormal(0, 0.7, 58)  # 6 spare slots, one less than joins 8 ranks
        one = problem(loads, random.uniform(0.9, 1.1, 8), 8, routing="weighted")
        found, bound = joined(one, lower_bound(one).total), lower_bound(one).total
        near += found is not None and evaluate(one, found).objective <= bound * 1.00001
    assert near >= 38


def test_shares_are_whole_though_a_spare_slot_is_left() -> None:
    # two ranks are joined for the hot expert; the third one leaves a spare slot that nobody needs
    one = problem([7, 6, 6, 6], [1, 1, 1], 2, routing="weighted")
    assert joined(one, 12.5) is not None


def test_one_spare_slot_joins_two_ranks() -> None:
    # 7 + 5 + 3 on two joined ranks, 9 + 1 on the third: no plan without replicas balances
    one = problem([9, 7, 5, 3, 1], [1, 1, 1], 2, routing="weighted")
    found = joined(one, 25 / 3)
    assert found is not None
    assert found.replicas.sum() <= 6
    assert evaluate(one, found).objective <= 10


def test_a_hot_expert_gets_the_fewest_fastest_ranks() -> None:
    one = problem([20, 3, 2, 2, 1], [1, 2, 2, 1], 2, routing="weighted")
    found = joined(one, 28 / 6 * 1.1)
    assert found is not None
    on = np.flatnonzero((found.by_rank(found.slots)[0] == 0).any(axis=1))
    assert set(on) >= {1, 2}
    assert evaluate(one, found).legal


def test_a_makespan_that_the_hot_expert_cannot_reach_is_refused() -> None:
    one = problem([20, 1, 1, 1], [1, 1, 1], [2, 2, 1], routing="weighted")
    assert joined(one, 9.9) is None  # two ranks at most: 10 and more
    found = joined(one, 11.5)
    assert found is not None
    assert evaluate(one, found).objective == pytest.approx(11, abs=1)


@given(few_spares(), st.floats(0.8, 2.0))
@MORE
def test_each_rank_is_in_one_group_and_joining_costs_what_is_spare(
    case: tuple[Problem, int], factor: float
) -> None:
    one, spare = case
    load, speed, cap = one.tokens[0, 0], one.cluster.speeds, one.cluster.slots
    seconds = float(one.fluid[0, 0]) * factor
    found = _join(load, seconds * speed, cap)
    if found is None:
        return
    groups, hot = found
    assert sorted(g for group in groups for g in group) == list(range(one.ranks))
    assert len(hot) <= len(groups)
    packed = [int(e) for mine in hot for e in mine]
    assert len(packed) == len(set(packed))
    assert one.ranks - len(groups) <= spare, "more ranks are joined than slots are spare"
    for group, mine in zip(groups, hot, strict=False):
        assert load[mine].sum() <= seconds * speed[group].sum() * (1 + 1e-12), "its ranks hold it"
    for e in set(range(one.experts)) - set(packed):
        assert load[e] <= seconds * speed.max(), "what is left fits a rank"


def test_equal_seeds_find_the_same() -> None:
    random = np.random.default_rng(5)
    one = problem(random.lognormal(0, 1, 58), random.uniform(0.9, 1.1, 8), 8, routing="weighted")
    seconds = lower_bound(one).total * 1.02

    def found(seed: int) -> Any:
        plan = joined(one, seconds, seed)
        assert plan is not None
        assert plan.split is not None
        return plan.slots.tobytes(), plan.split.tobytes()

    assert found(1) == found(1)
