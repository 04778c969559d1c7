import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.window import pour_layer, window
from tests.strategies import problem, tiny_problems


def poured(one: Problem, seconds: np.ndarray) -> tuple[Plan | None, np.ndarray]:
    """The plan, if every layer found its place, and which layers did."""
    slots, split, placed = window(one, seconds)
    if not placed.all():
        return None, placed
    return (
        Plan(slots=slots, rank_slots=one.cluster.slots, experts=one.experts, split=split),
        placed,
    )


@st.composite
def roomy(draw: st.DrawFn) -> Problem:
    """At least ranks - 1 spare slots, speeds within 30 % of 1, loads that differ."""
    ranks, each = draw(st.integers(2, 12)), draw(st.integers(2, 9))
    experts = ranks * each - (ranks - 1) - draw(st.integers(0, 2))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    loads = np.exp(random.normal(0, draw(st.floats(0.5, 1.5)), (2, experts)))
    return problem(loads, random.uniform(0.7, 1.3, ranks), each, routing="weighted")


@given(roomy())
@settings(max_examples=5 * settings().max_examples)
def test_with_a_spare_slot_for_each_rank_but_one_it_is_exact(one: Problem) -> None:
    bound = lower_bound(one)
    assume(bound.sources == {"fluid": 2})  # no rank lacks the slots for its share
    plan, _ = poured(one, bound.per_layer[0] * (1 + 2e-12))
    assert plan is not None
    assert evaluate(one, plan).makespan == pytest.approx(one.fluid, rel=1e-9)


def test_one_rank_takes_everything() -> None:
    loads = np.exp(np.random.default_rng(0).normal(0, 1, (50, 9)))
    one = problem(loads, [1.2], 9, routing="weighted")
    assert window(one, one.fluid[0] * (1 + 2e-12))[2].all()


def test_the_shapes_of_real_models_are_split_exactly() -> None:
    random = np.random.default_rng(1)
    for experts, slots, ranks in ((256, 9, 32), (256, 5, 64), (384, 13, 32)):
        loads = np.exp(random.normal(0, 1, (8, experts)))
        speeds = np.clip(random.normal(1, 0.05, ranks), 0.85, 1.15)
        one = problem(loads, speeds, slots, routing="weighted")
        plan, _ = poured(one, one.fluid[0] * (1 + 2e-12))
        assert plan is not None
        assert evaluate(one, plan).makespan == pytest.approx(one.fluid, rel=1e-9)


@given(tiny_problems(routing="weighted", max_layers=2), st.floats(1.0, 2.0))
@settings(max_examples=5 * settings().max_examples)
def test_what_it_places_is_a_plan_and_all_ranks_but_the_last_end_in_time(
    one: Problem, factor: float
) -> None:
    seconds = one.fluid[0] * factor * (1 + 2e-12)
    slots, split, placed = window(one, seconds)
    if not placed.all():
        return
    plan = Plan(slots=slots, rank_slots=one.cluster.slots, experts=one.experts, split=split)
    priced = evaluate(one, plan)
    assert priced.legal
    late = priced.rank_seconds[0] > seconds[:, None] * (1 + 1e-9) + 1e-300
    assert (late.sum(axis=1) <= 1).all()


def test_a_cut_expert_is_shared_by_two_ranks() -> None:
    # the fast rank takes 3 of 5 tokens: expert 0 whole, of expert 1 what is left
    one = problem([1, 4], [3, 2], 2, routing="weighted")
    plan, _ = poured(one, np.array([1.0]))
    assert plan is not None
    assert plan.slots.tolist() == [[0, 1, 1, -1]]
    assert plan.split is not None
    assert plan.split[0] == pytest.approx([1, 0.5, 0.5, 0])


def test_experts_without_tokens_find_a_place() -> None:
    one = problem([0, 0, 3, 3], [1, 1, 1], 2, routing="weighted")
    plan, _ = poured(one, one.fluid[0] * (1 + 2e-12))
    assert plan is not None
    assert evaluate(one, plan).objective == pytest.approx(2)


def test_base_load_leaves_less_room() -> None:
    one = problem([2, 2], [1, 1], 2, routing="weighted", base_load=[1, 3])
    plan, _ = poured(one, one.fluid[0] * (1 + 2e-12))
    assert plan is not None
    assert evaluate(one, plan).rank_seconds[0, 0] == pytest.approx([4, 4])


def test_a_layer_that_does_not_fit_is_named() -> None:
    # one slot each: the large expert would have to be cut
    one = problem([[1, 1], [3, 1]], [1, 1], 1, routing="weighted")
    slots, split, placed = window(one, np.array([1.0, 2.0]))
    assert placed.tolist() == [True, False]
    assert slots[0].tolist() in ([0, 1], [1, 0])
    assert split[0].tolist() == [1, 1]


def test_one_layer_alone_is_poured_as_positions_in_its_loads() -> None:
    found = pour_layer(np.array([1.0, 4.0]), np.zeros(2), np.array([3.0, 2.0]), np.array([2, 2]))
    assert found is not None
    slots, split = found
    assert slots.tolist() == [[0, 1], [1, 2]], "2 stands for an empty slot"
    assert split[slots < 2] == pytest.approx([1, 0.5, 0.5])
    assert pour_layer(np.array([3.0, 1.0]), np.zeros(2), np.ones(2), np.array([1, 1])) is None
