"""The formulation as data: plans are its solutions, at their price, and CP-SAT's rounding relaxes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace._check import FloatArray
from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.exact import layer as formulation
from moeplace.exact.cpsat import to_integers
from moeplace.exact.model import Model, build, cutoffs
from moeplace.exact.solvers import SOLVERS, Request
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares
from moeplace.solve import solve
from tests.brute_force import optimum
from tests.exact.cases import featured
from tests.strategies import legal_plans, tiny_problems
from tests.test_solve import shaped

MORE = settings(max_examples=3 * settings().max_examples)


def whole(one: Problem, cut: Any = np.inf, **options: Any) -> Model:
    bound = lower_bound(one).per_layer
    return build(one, range(one.layers), bound, np.broadcast_to(cut, bound.shape), **options)


@st.composite
def planned(draw: st.DrawFn, feature: str = "all") -> tuple[Problem, Plan]:
    """A problem and one of its legal plans, good or bad."""
    one = draw(featured(feature))
    if draw(st.booleans()):
        priced = at_best_shares(one, draw(legal_plans(one)))
        assume(priced.legal)
        return one, priced.plan
    found = solve(one, "auto", work_limit=300, gap=1.0)
    assume(found.evaluation is not None)
    return one, found.plan


def excess(model: Model, values: FloatArray) -> float:
    """By how much a solution breaks a row or a bound of a column."""
    sums = model.rows @ values
    over = [sums - model.row_high, model.row_low - sums, values - model.high, model.low - values]
    return float(max(part.max(initial=0.0) for part in over))


@pytest.mark.parametrize("feature", ["all", "windows", "moves"])
def test_a_plan_is_a_solution_at_its_price(feature: str) -> None:
    @given(planned(feature), st.booleans())
    @MORE
    def check(made: tuple[Problem, Plan], narrow: bool) -> None:
        one, plan = made
        priced = evaluate(one, plan)
        bound = lower_bound(one).per_layer
        model = whole(one, cutoffs(one, bound, priced, alone=False) if narrow else np.inf)
        values = model.values(one, plan)
        assert not np.isnan(values).any()
        assert excess(model, values) <= 1e-9
        found = (model.cost @ values + model.constant) * model.unit
        assert found == pytest.approx(priced.objective, rel=1e-9, abs=1e-12)
        again = Plan(
            slots=model.slots(one, values), rank_slots=plan.rank_slots, experts=one.experts
        )
        renamed = evaluate(one, again.with_split(None))
        if one.routing == "even":
            assert renamed.objective == pytest.approx(priced.objective, rel=1e-12)

    check()


@given(planned(), st.sampled_from([0.0, 1e-3, 0.5]))
@MORE
def test_rounding_to_whole_numbers_only_relaxes(made: tuple[Problem, Plan], slower: float) -> None:
    one, plan = made
    model = whole(one)
    values = model.values(one, plan)
    times = [column for block in model.blocks for column in block.time if column >= 0]
    values[times] = np.minimum(values[times] * (1 + slower), model.high[times])
    if model.combined:  # what windows combine to must follow
        values[list(model.combined)] = np.minimum(
            values[list(model.combined)] * (1 + slower), model.high[list(model.combined)]
        )
    assume(excess(model, values) <= 1e-12)
    rounded, _, factor, steps = to_integers(model)
    numbers = [int(k) for k in np.floor(values * steps)]
    proto = rounded.proto
    for number, variable in zip(numbers, proto.variables, strict=True):
        assert variable.domain[0] <= number <= variable.domain[1], variable.name
    for row in proto.constraints:
        pairs = zip(row.linear.vars, row.linear.coeffs, strict=True)
        total = sum(numbers[n] * coefficient for n, coefficient in pairs)
        assert row.linear.domain[0] <= total <= row.linear.domain[1]
    terms = zip(proto.objective.vars, proto.objective.coeffs, strict=True)
    price = sum(numbers[n] * coefficient for n, coefficient in terms) * factor
    assert price <= model.cost @ values * (1 + 1e-15)
    assert price >= model.cost @ values * (1 - 1e-6) - 1e-7


@given(st.data(), tiny_problems(max_layers=2, max_windows=2), st.booleans())
@MORE
def test_what_is_no_dearer_lies_within_the_cutoffs(
    data: st.DataObject, one: Problem, alone: bool
) -> None:
    best, other = (at_best_shares(one, data.draw(legal_plans(one))) for _ in range(2))
    cut = cutoffs(one, lower_bound(one).per_layer, best, alone=alone)
    if alone:
        mean = one.mean(other.makespan) <= one.mean(best.makespan) * (1 + 1e-12)
        mean &= one.layer_weight > 0
        assert (other.makespan[:, mean] <= cut[:, mean]).all()
    elif other.objective <= best.objective:
        assert (other.makespan <= cut).all()


@given(tiny_problems(routing="even", max_experts=3, max_ranks=6))
def test_joined_levels_bound_from_below_and_take_hints(one: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulation, "COLUMNS", 0)
        model = whole(one)
    answer = SOLVERS["cp-sat"].solve(model, Request(gap=1e-7, seconds=5))
    best = optimum(one)
    assert answer.bound * model.unit <= best * (1 + 1e-9)
    plan = solve(one, work_limit=2000).plan
    values = model.values(one, plan)
    assert excess(model, values) <= 1e-9
    assert answer.bound * model.unit <= evaluate(one, plan).objective * (1 + 1e-9)


@pytest.mark.parametrize("routing", ["even", "weighted"])
def test_a_deepseek_layer_is_a_model_of_moderate_size(routing: str) -> None:
    one = shaped(1, 256, 288, 32, routing=routing)
    best = evaluate(one, solve(one, work_limit=100_000).plan)
    bound = lower_bound(one).per_layer
    model = build(one, [0], bound, cutoffs(one, bound, best, alone=True))
    assert model.cost.size < 80_000
    assert excess(model, model.values(one, best.plan)) <= 1e-9


def test_names_are_unique_and_rows_hold_each_column_once() -> None:
    one = shaped(2, 8, 10, 2)
    model = whole(one)
    assert len(set(model.columns)) == len(model.columns) == model.cost.size
    assert len(set(model.row_names)) == len(model.row_names) == model.row_low.size
    assert model.rows.has_canonical_format
