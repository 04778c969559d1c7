"""A step that frees some ranks gives a legal plan, no slower, and changes nothing elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace import bench_lns
from moeplace.bench_formulations import placed, plan_of
from moeplace.bench_lns import free, repeated, step, times, to_model
from moeplace.constraints import MaxMoves
from moeplace.evaluate import evaluate
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.exact.test_model import excess
from tests.strategies import legal_plans, problem, tiny_problems

INSTANCES = Path(__file__).resolve().parents[1] / "instances"
SOME = settings(max_examples=max(settings().max_examples // 2, 10))


def plain() -> st.SearchStrategy[Problem]:
    return tiny_problems(routing="even", base=False, max_experts=5, max_ranks=4)


@given(st.data(), plain(), st.booleans())
@SOME
def test_a_step_gives_a_legal_plan_never_slower(
    data: st.DataObject, one: Problem, moves: bool
) -> None:
    if moves:
        one = replace(one, constraints=[MaxMoves(data.draw(legal_plans(one)), per_layer=2)])
    start = evaluate(one, data.draw(legal_plans(one)))
    held = placed(one, start.plan)
    if not one.tokens.any():
        return
    number = data.draw(st.integers(1, one.ranks))
    ranks = np.sort(np.array(data.draw(st.permutations(range(one.ranks)))[:number]))
    part = free(one, held, ranks)
    before = times(one, held)
    assert before.max() == pytest.approx(start.objective)
    if before[ranks].max() > 0:
        model, hint = to_model(one, part, float(before[ranks].max()))
        assert excess(model, hint) <= 1e-9
        found = step(one, held, ranks, 0)
    else:
        found = held
    others = np.setdiff1d(np.arange(one.ranks), ranks)
    assert (found[:, others] == held[:, others]).all()
    after = evaluate(one, plan_of(one, found))
    assert after.legal
    assert after.objective <= start.objective * (1 + 1e-12)
    np.testing.assert_allclose(times(one, found)[others], before[others], rtol=1e-12)


@given(st.data(), plain())
@SOME
def test_freeing_every_rank_is_the_whole_problem(data: st.DataObject, one: Problem) -> None:
    start = evaluate(one, data.draw(legal_plans(one)))
    if start.objective == 0:
        return
    ranks = np.arange(one.ranks)
    model, hint = to_model(one, free(one, placed(one, start.plan), ranks), start.objective)
    answer = SOLVERS["cp-sat"].solve(model, Request(hint=hint, seconds=10))
    assert answer.ended == "optimal"
    assert answer.bound * model.unit == pytest.approx(optimum(one), rel=1e-5)


def test_steps_repeat_until_the_bound_is_reached() -> None:
    one = problem([4.0, 3.0, 2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2, 2, 2])
    bad = plan_of(one, np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1],
                                 [0, 0, 1]], dtype=bool))  # fmt: skip
    plan, steps = repeated(one, bad, 5.0, seed=0)
    assert evaluate(one, plan).objective == optimum(one)
    assert steps >= 1


def test_a_budget_of_moves_counts_what_other_ranks_received() -> None:
    one = problem([4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2, 2, 2, 2])
    current = plan_of(one, np.eye(4, dtype=bool))
    held = np.eye(4, dtype=bool)
    held[0, 3] = True
    limited = replace(one, constraints=[MaxMoves(current, per_layer=2)])
    assert free(limited, held, np.array([0, 1])).moves == 1
    assert free(limited, held, np.array([0, 3])).moves == 2
    assert free(one, held, np.array([0, 1])).moves is None


def test_the_real_case_is_a_layer_of_sixteen_ranks() -> None:
    one = bench_lns._real(INSTANCES, 0)
    assert (one.layers, one.ranks, one.cluster.total_slots) == (1, 16, 80)
