import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moeplace.constraints import CAPACITY_SLACK
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.split import layer_makespan, resplit
from tests.brute_force import split_optimum
from tests.strategies import legal_plans, plan, problem, tiny_problems

MORE = settings(max_examples=4 * settings().max_examples)


def least_time(one: Problem, placed: Plan, window: int, layer: int) -> float:
    """The same by a linear program over slots, in units of the fluid bound."""
    unit = float(one.fluid[window, layer]) or 1.0
    tokens, base = one.tokens[window, layer] / unit, one.base[window, layer] / unit
    slots, rank = placed.slots[layer], placed.rank_of_slot
    served = np.array([[0.0, *(slots == e)] for e in range(one.experts)])
    load = np.array([[-one.cluster.speeds[g], *(rank == g)] for g in range(one.ranks)])
    load[:, 1:] *= slots != -1
    found = linprog(
        [1.0] + [0.0] * slots.size,
        A_ub=load,
        b_ub=-base,
        A_eq=served,
        b_eq=tokens,
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert found.status == 0, found.message
    return float(found.fun) * unit


def assert_optimal(one: Problem, placed: Plan) -> None:
    best = resplit(one, placed)
    assert (best.slots == placed.slots).all()
    makespan = evaluate(one, best).makespan
    for window, layer in np.ndindex(one.windows, one.layers):
        wanted = least_time(one, placed, window, layer)
        assert makespan[window, layer] == pytest.approx(wanted, rel=1e-8, abs=1e-12)


@given(st.data(), tiny_problems(routing="weighted", max_layers=2, max_windows=2))
@MORE
def test_no_shares_are_better(data: st.DataObject, one: Problem) -> None:
    assert_optimal(one, data.draw(legal_plans(one)))


@given(st.data(), tiny_problems(routing="weighted", max_layers=2, max_windows=2, limits=True))
@MORE
def test_with_token_capacities_shares_are_the_best_legal_ones(
    data: st.DataObject, one: Problem
) -> None:
    placed = data.draw(legal_plans(one))
    priced = evaluate(one, resplit(one, placed))
    over = priced.rank_tokens > one.capacity * (1 + CAPACITY_SLACK)
    for layer in range(one.layers):
        masks = [
            sum(1 << int(g) for g in placed.rank_of_slot[placed.slots[layer] == expert])
            for expert in range(one.experts)
        ]
        wanted = np.array(split_optimum(one, layer, masks))
        assert (np.isinf(wanted) == over[:, layer].any(axis=1)).all()
        alone = layer_makespan(one, layer, placed.slots[layer])
        assert alone == pytest.approx(wanted, rel=1e-7, abs=1e-6)
        legal = np.isfinite(wanted)
        found = priced.makespan[legal, layer]
        assert found == pytest.approx(wanted[legal], rel=1e-7, abs=1e-6)


@st.composite
def wide(draw: st.DrawFn) -> tuple[Problem, Plan]:
    """Up to 30 experts on up to 10 ranks, many copies, duplicates on a rank too."""
    ranks, experts = draw(st.integers(2, 10)), draw(st.integers(2, 30))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    each = -(-experts // ranks) + draw(st.integers(0, 4))
    slots = random.integers(-1, experts, ranks * each)
    slots[random.permutation(slots.size)[:experts]] = np.arange(experts)
    loads = np.exp(random.normal(0, 2, experts)) * (random.random(experts) > 0.2)
    one = problem(
        loads,
        random.uniform(0.3, 1.5, ranks),
        each,
        routing="weighted",
        base_load=random.exponential(1, ranks) * draw(st.sampled_from([0, 1, 10])),
    )
    return one, plan(slots, [each] * ranks, experts, allow_duplicates=True)


@given(wide())
@MORE
def test_no_shares_are_better_on_wide_layers_with_duplicates(case: tuple[Problem, Plan]) -> None:
    assert_optimal(*case)


@given(st.data(), tiny_problems(routing="weighted", max_layers=2, max_windows=2))
def test_chosen_shares_are_never_worse_than_even_ones(data: st.DataObject, one: Problem) -> None:
    placed = data.draw(legal_plans(one))
    even, chosen = evaluate(one, placed).makespan, evaluate(one, resplit(one, placed)).makespan
    assert (chosen <= even * (1 + 1e-12) + 1e-300).all()


def test_shares_are_per_window_only_if_there_are_several() -> None:
    placed = plan([0, 1, 0], [2, 1])
    one = problem([4, 1], [1, 1], [2, 1], routing="weighted")
    two = problem([[[4, 1]], [[4, 4]]], [1, 1], [2, 1], routing="weighted")
    assert resplit(one, placed).split == pytest.approx(np.array([[0.375, 1, 0.625]]))
    found = resplit(two, placed).split
    assert found is not None
    assert found[:, 0] == pytest.approx(np.array([[0.375, 1, 0.625], [0, 1, 1]]))


def test_shares_that_were_stored_are_chosen_anew() -> None:
    one = problem([4, 1], [1, 1], [2, 1], routing="weighted")
    placed = plan([0, 1, 0], [2, 1], split=[[1, 1, 0]])
    assert evaluate(one, resplit(one, placed)).objective == pytest.approx(2.5)


def test_experts_without_tokens_are_shared_evenly() -> None:
    one = problem([0, 4], [1, 1], 2, routing="weighted")
    assert resplit(one, plan([0, 1, 0, 1], [2, 2])).split == pytest.approx(np.full((1, 4), 0.5))


def test_a_base_load_beyond_the_rest_takes_no_tokens() -> None:
    one = problem([4], [1, 1], 1, routing="weighted", base_load=[9, 0])
    best = resplit(one, plan([0, 0], [1, 1]))
    assert evaluate(one, best).objective == 9


def test_under_even_routing_shares_cannot_be_chosen() -> None:
    with pytest.raises(ProblemError, match="even routing.* Set routing="):
        resplit(problem([1], [1], 1), plan([0], [1]))


def test_a_plan_for_another_shape_is_refused() -> None:
    with pytest.raises(PlanError, match="1 experts but the problem has 2"):
        resplit(problem([1, 2], [1], 2, routing="weighted"), plan([0, -1], [2], 1))
