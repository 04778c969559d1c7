"""What the benchmarks compare: another exact formulation of even split, and rows that order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace import bench_formulations, bench_symmetry
from moeplace.bench_formulations import WAYS, attempt, formulate, hint, relaxation, told
from moeplace.bench_symmetry import alike, ordered, relabelled
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxReplicas
from moeplace.errors import SolverError
from moeplace.evaluate import evaluate
from moeplace.exact.model import build, cutoffs
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares
from tests.brute_force import optimum
from tests.exact.test_model import excess
from tests.strategies import legal_plans, problem, tiny_problems

FREE = np.full((1, 1), np.inf)
WITH_BOUND = settings(max_examples=max(settings().max_examples // 2, 10))


def plain(**more: Any) -> st.SearchStrategy[Problem]:
    """Tiny problems of one layer and window without rules or base load."""
    return tiny_problems(routing="even", base=False, **{"max_experts": 5} | more)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["cp-sat", "highs"])
def test_every_formulation_has_the_true_optimum(way: str, name: str) -> None:
    @given(st.data(), plain(), st.booleans())
    @WITH_BOUND
    def check(data: st.DataObject, one: Problem, cut: bool) -> None:
        best = optimum(one)
        limit = FREE
        if cut:
            start = evaluate(one, data.draw(legal_plans(one)))
            limit = cutoffs(one, lower_bound(one).per_layer, start, alone=True)
        model = formulate(way, one, limit)
        answer = SOLVERS[name].solve(model, Request(seconds=10))
        assert answer.ended == "optimal"
        assert answer.bound * model.unit == pytest.approx(best, rel=1e-5, abs=1e-5)
        found = attempt(name, model, one, 10.0)
        assert found[1] <= 1e-5

    check()


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_is_a_solution_of_either_formulation(way: str) -> None:
    @given(st.data(), plain())
    @WITH_BOUND
    def check(data: st.DataObject, one: Problem) -> None:
        priced = at_best_shares(one, data.draw(legal_plans(one)))
        least = lower_bound(one).per_layer
        model = formulate(way, one, cutoffs(one, least, priced, alone=True))
        values = hint(model, one, priced.plan)
        assert not np.isnan(values).any()
        assert excess(model, values) <= 1e-9
        assert model.cost @ values * model.unit == pytest.approx(priced.objective, rel=1e-9)

    check()


def test_the_relaxation_of_big_m_is_weak() -> None:
    one = problem([4.0, 3.0, 3.0, 2.0, 2.0, 1.0], [1.0, 0.9, 1.1], [3, 3, 3])
    fluid = one.total(one.fluid)
    counts, big, tight = (relaxation(formulate(way, one, FREE)) / fluid for way in WAYS)
    assert counts == pytest.approx(1.0, abs=1e-6)
    assert tight == pytest.approx(1.0, abs=1e-6)
    assert big < 0.9


def test_products_are_for_plain_layers() -> None:
    one = problem([3.0, 2.0, 1.0], [1.0, 1.0], [2, 2], constraints=[MaxReplicas(1)])
    with pytest.raises(SolverError, match="one plain layer"):
        bench_formulations.products(one, one.fluid, FREE)


def test_seconds_are_told_where_most_were_proven() -> None:
    assert told([(1.0, 0.0), (2.0, 1e-7), (9.0, 0.1)]) == "2.00 s (2 of 3)"
    assert told([(1.0, 0.0), (9.0, 0.2), (9.0, 0.1)]) == "1.0e-01 (1 of 3)"
    assert told([(9.0, np.inf), (9.0, np.inf), (1.0, 0.0)]) == "no plan"


@pytest.mark.parametrize(("ranks", "experts"), [(True, False), (False, True), (True, True)])
def test_ordered_ranks_and_experts_keep_the_optimum_and_take_hints(
    ranks: bool, experts: bool
) -> None:
    speeds = st.sampled_from([[1.0] * 3, [1.0, 0.5, 1.0], [0.5, 1.0, 1.5]])
    loads = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=3, max_size=4)

    @given(st.data(), loads, speeds)
    @WITH_BOUND
    def check(data: st.DataObject, load: list[float], speed: list[float]) -> None:
        one = problem(load, speed, [2, 2, data.draw(st.integers(1, 2))])
        model = build(one, [0], lower_bound(one).per_layer, FREE)
        made = ordered(model, one, ranks, experts)
        answer = SOLVERS["cp-sat"].solve(made, Request(seconds=10))
        assert answer.ended == "optimal"
        assert answer.bound * made.unit == pytest.approx(optimum(one), rel=1e-5, abs=1e-5)
        plan = data.draw(legal_plans(one))
        same = relabelled(one, plan)
        assert evaluate(one, same).objective == pytest.approx(evaluate(one, plan).objective)
        values = made.values(one, same)
        assert not np.isnan(values).any()
        assert excess(made, values) <= 1e-9

    check()


def test_rows_order_all_but_one_of_each_class() -> None:
    one = problem([2.0, 1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [2, 2, 2])
    assert alike(one) == ([[0, 1], [2]], [[0, 2], [1, 3, 4]])
    model = build(one, [0], lower_bound(one).per_layer, FREE)
    made = ordered(model, one, ranks=True, experts=True)
    assert made.row_names[-4:] == ["ranks_g0_g1", "experts_e0_e2", "experts_e1_e3", "experts_e3_e4"]
    assert bench_symmetry.ordered(model, one, ranks=False, experts=False) is model
