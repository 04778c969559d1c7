from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplace.bounds import lower_bound
from moeplace.claims import Bound
from moeplace.errors import MoeplaceError, ProblemError, SolverError
from moeplace.evaluate import evaluate
from moeplace.result import Limits, Result, Status, finish, gap
from tests.strategies import plan, problem

ONE = problem([[4, 3, 1], [2, 2, 2]], [1, 1], [2, 1])
LOW = lower_bound(ONE)
#: Layer 0 costs 4 + 3 = 7 and could cost 4, layer 1 costs 4, as it must.
PRICED = evaluate(ONE, plan([[0, 1, 2], [0, 1, 2]], [2, 1]))
BEST = evaluate(ONE, plan([[1, 2, 0], [0, 1, 2]], [2, 1]))


def bound_of(total: float) -> Bound:
    """The bound of ONE, with its layers scaled to `total`."""
    per_layer = LOW.per_layer * (total / LOW.total)
    return replace(LOW, per_layer=per_layer, total=total)


def result(bound: Bound, **options: Any) -> Result:
    limits = Limits(gap=options.pop("gap", 1e-4))
    return finish(ONE, "auto", bound, BEST, limits, 1.5, **options)


def test_prices_in_these_tests() -> None:
    assert (PRICED.objective, BEST.objective) == (11, 8)
    assert LOW.total == pytest.approx(8)


class TestStatus:
    def test_a_plan_at_its_bound_is_optimal_also_if_interrupted(self) -> None:
        assert result(LOW).status is Status.OPTIMAL
        assert result(bound_of(8 * (1 - 9e-10))).status is Status.OPTIMAL
        assert result(LOW, interrupted=True).status is Status.OPTIMAL

    def test_a_plan_within_the_gap_asked_for_says_so(self) -> None:
        assert result(bound_of(8 / (1 + 0.9e-4))).status is Status.WITHIN_GAP
        assert result(bound_of(8 / 1.2), gap=0.25).status is Status.WITHIN_GAP

    def test_a_plan_above_the_gap_is_feasible(self) -> None:
        assert result(bound_of(8 / (1 + 1.1e-4))).status is Status.FEASIBLE
        assert result(bound_of(8 * (1 - 2e-9)), gap=0.0).status is Status.FEASIBLE

    def test_an_interrupted_search_keeps_its_plan(self) -> None:
        stopped = result(bound_of(7.9), interrupted=True)
        assert stopped.status is Status.INTERRUPTED
        assert stopped.plan is BEST.plan

    def test_statuses_are_their_names(self) -> None:
        assert [str(status) for status in Status] == [
            "optimal",
            "within_gap",
            "feasible",
            "infeasible",
            "none_in_time",
            "interrupted",
        ]


class TestGap:
    def test_it_is_price_over_bound_less_one(self) -> None:
        assert float(gap(3.0, 2.0)) == 0.5
        assert gap(np.array([3.0, 2.0]), np.array([2.0, 2.0])).tolist() == [0.5, 0.0]

    def test_nothing_over_nothing_is_no_gap(self) -> None:
        assert float(gap(0.0, 0.0)) == 0

    def test_something_over_nothing_is_infinite(self) -> None:
        assert float(gap(1.0, 0.0)) == float("inf")

    def test_rounding_never_makes_it_negative(self) -> None:
        assert float(gap(1.0, 1.0 + 1e-12)) == 0

    def test_a_result_has_it_in_total_and_by_layer(self) -> None:
        found = finish(ONE, "auto", LOW, PRICED, Limits(), 1.0)
        assert found.gap == pytest.approx(11 / 8 - 1)
        assert found.layers.gap == pytest.approx(np.array([[7 / 4 - 1, 0]]), abs=1e-11)
        assert found.layers.objective is PRICED.makespan

    def test_a_layer_without_tokens_has_none(self) -> None:
        empty = problem([0, 0], [1], 2)
        found = finish(
            empty, "auto", lower_bound(empty), evaluate(empty, plan([0, 1], [2])), Limits(), 0.0
        )
        assert (found.objective, found.lower_bound, found.gap) == (0, 0, 0)
        assert found.layers.gap.tolist() == [[0.0]]
        assert found.status is Status.OPTIMAL


def test_a_bound_above_the_price_by_rounding_is_cut_off() -> None:
    found = result(bound_of(8 * (1 + 5e-10)))
    assert found.lower_bound == found.objective == 8
    assert (found.layers.lower_bound <= found.layers.objective).all()
    assert found.gap == 0


def test_a_plan_cheaper_than_its_bound_is_a_fault_of_ours() -> None:
    with pytest.raises(SolverError, match=r"plan costs 8\.0, below a lower bound of 8\.1"):
        result(bound_of(8.1))
    one_layer = replace(LOW, per_layer=np.array([[4.1, 3.9]]))
    with pytest.raises(SolverError, match="below a lower bound"):
        result(one_layer)


def test_an_illegal_plan_is_a_fault_of_ours() -> None:
    twice = plan([[0, 1, 1, 2]] * 2, [3, 1], allow_duplicates=True)
    one = problem([[4, 3, 1], [2, 2, 2]], [1, 1], [3, 1])
    with pytest.raises(SolverError, match="illegal plan: layer 0: rank 0 holds two replicas"):
        finish(one, "auto", lower_bound(one), evaluate(one, twice), Limits(), 1.0)


def test_a_result_keeps_what_it_cost_to_find() -> None:
    found = finish(ONE, "vibe", LOW, BEST, Limits(work=7), 1.5, work=6)
    assert (found.method, found.seconds, found.work, found.limits.work) == ("vibe", 1.5, 6, 7)


def test_without_a_plan_there_is_a_bound_and_a_reason_but_no_price() -> None:
    none = Result(
        problem=ONE,
        method="auto",
        status=Status.INFEASIBLE,
        bound=LOW,
        evaluation=None,
        limits=Limits(),
        seconds=0.1,
        reason="rank 0 is full",
    )
    assert none.lower_bound == LOW.total
    assert none.gap == float("inf")
    for name in ("plan", "objective", "layers"):
        with pytest.raises(MoeplaceError, match="no plan .status infeasible.: rank 0 is full"):
            getattr(none, name)


class TestLimits:
    def test_nothing_is_limited_but_the_gap_by_default(self) -> None:
        assert (Limits().time, Limits().work, Limits().gap) == (None, None, 1e-4)

    def test_half_a_step_is_no_limit(self) -> None:
        with pytest.raises(ProblemError, match="counts steps: a whole number, got 1.5"):
            Limits(work=1.5)  # type: ignore[arg-type]

    def test_zero_is_a_limit(self) -> None:
        limits = Limits(time=0, work=0, gap=0)
        assert (limits.time, limits.work, limits.gap) == (0, 0, 0)

    @pytest.mark.parametrize("name", ["time", "work", "gap"])
    @pytest.mark.parametrize("value", [-1, float("nan"), "1", True, [1], 1j])
    def test_what_is_no_limit_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(ProblemError, match=f"The {name} limit must be .* got "):
            Limits(**{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("limits", [{"gap": None}, {"gap": float("inf")}, {"work": 1e400}])
    def test_limits_that_never_end_a_search_are_refused(self, limits: dict[str, Any]) -> None:
        with pytest.raises(ProblemError, match="limit must be"):
            Limits(**limits)
