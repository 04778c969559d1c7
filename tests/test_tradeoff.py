"""Step time against bytes moved."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.constraints import MaxMoves
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.instances import generate
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.solve import solve
from moeplace.tradeoff import tradeoff
from tests.brute_force import optimum
from tests.strategies import legal_plans, tiny_problems


@pytest.fixture(scope="module")
def drifted() -> tuple[Problem, Plan]:
    """Twenty layers of shape A's size after lognormal(0.25) drift, unequal speeds."""
    shape = (20, 256, 288, 32)
    current = solve(generate(shape, 100).aggregate()).plan
    return generate(shape, 100, epoch=1).aggregate(), current


def test_few_moves_keep_most_of_the_gain(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    points = tradeoff(problem, current, expert_bytes=1000, budgets=(0, 8, 32))
    kept = {point.budget: point.kept for point in points}
    assert kept[0] >= 0
    assert kept[8] >= 0.75
    assert kept[32] >= 0.95
    assert points[-1].budget is None
    assert points[-1].moves > 0.8 * 20 * 288  # what a fresh plan moves
    for one, two in pairwise(points):
        assert one.bytes < two.bytes
        assert one.objective > two.objective
        assert one.lower_bound >= two.lower_bound * (1 - 1e-12)
    for point in points:
        assert point.objective == evaluate(problem, point.plan).objective
        assert point.bytes == 1000 * point.moves == 1000 * point.plan.moves_from(current).sum()
        assert point.lower_bound <= point.objective
        if point.budget is not None:
            limited = replace(problem, constraints=[MaxMoves(current, per_layer=point.budget)])
            assert evaluate(limited, point.plan).legal


def test_totals_may_be_spent_where_they_help(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    options: dict[str, Any] = {"expert_bytes": np.arange(20) + 1}
    (total,) = (
        point
        for point in tradeoff(problem, current, budgets=(160,), per="total", **options)
        if point.budget == 160
    )
    assert total.moves <= 160
    by_layer = total.plan.moves_from(current).sum(axis=1)
    assert total.bytes == (by_layer * (np.arange(20) + 1)).sum()
    assert total.kept > 0.7


@settings(max_examples=20)
@given(st.data())
def test_every_point_has_a_bound_that_holds(data: st.DataObject) -> None:
    problem = data.draw(tiny_problems(routing="even", max_experts=4))
    current = data.draw(legal_plans(problem))
    points = tradeoff(problem, current, expert_bytes=1, budgets=(1, 2), time_limit=0.01, every=True)
    for point in points:
        rules = [] if point.budget is None else [MaxMoves(current, per_layer=point.budget)]
        cheapest = optimum(replace(problem, constraints=rules))
        assert point.lower_bound <= cheapest * (1 + 1e-9)
        assert point.objective >= cheapest * (1 - 1e-9)


def test_nonsense_is_refused(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    with pytest.raises(ProblemError, match="whole number of copies from 0, got -1"):
        tradeoff(problem, current, expert_bytes=1, budgets=(-1,))
    with pytest.raises(ProblemError, match="per layer or total, got 'rank'"):
        tradeoff(problem, current, expert_bytes=1, per="rank")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="Expert bytes must be finite, at least 1"):
        tradeoff(problem, current, expert_bytes=-100)
    with pytest.raises(ProblemError, match="needs 20 expert bytes, got 2"):
        tradeoff(problem, current, expert_bytes=[1, 2])
