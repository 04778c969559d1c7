"""Comparisons price every method alike, and the summary fits a terminal."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from moeplace.compare import COLUMNS, RIVALS, Row, amount, cells, compare, notes, percent, summary
from moeplace.constraints import Forbid, Pin
from moeplace.evaluate import evaluate
from moeplace.instances import generate
from moeplace.policies import POLICIES, planning_loads
from moeplace.policies.vibe import vibe_assignment
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.search.split import resplit
from moeplace.solve import solve
from tests.strategies import problem, tiny_problems

HOT = [[100, 1, 1, 1]]  # ViBE as printed leaves the hot expert alone and puts three elsewhere


def methods(rows: list[Row]) -> list[str]:
    return [row.method for row in rows]


def row(rows: list[Row], method: str) -> Row:
    return next(row for row in rows if row.method == method)


# --- rows --------------------------------------------------------------------------------------


def test_the_default_methods_are_priced_by_evaluate() -> None:
    small = problem([[5, 4, 3, 2, 1, 1]], [1, 0.8], 4)
    rows = compare(small)
    assert methods(rows) == list(RIVALS)
    for name in RIVALS:
        found = row(rows, name).evaluation
        assert found is not None
        assert found.objective == evaluate(small, POLICIES[name](small)).objective


def test_moves_are_copies_that_ranks_receive_against_contiguous() -> None:
    small = problem([[5, 4, 3, 2]], [1, 1], 2)
    rows = compare(small, methods=("contiguous", "round_robin"))
    assert row(rows, "contiguous").moves == 0
    assert row(rows, "round_robin").moves == 2  # [0 1][2 3] becomes [0 2][1 3]


def test_a_policy_that_does_not_apply_has_a_reason_and_no_price() -> None:
    uneven = problem([[5, 4, 3]], [1, 1], [2, 1])
    eplb = row(compare(uneven), "eplb")
    assert eplb.evaluation is None
    assert eplb.moves is None
    assert "equal slots" in eplb.reason


def test_moves_are_unknown_where_contiguous_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Problem) -> None:
        POLICIES["eplb"](problem([[5, 4, 3]], [1, 1], [2, 1]))

    monkeypatch.setitem(POLICIES, "contiguous", refuse)
    rows = compare(problem([[5, 4, 3, 2]], [1, 1], 2))
    assert [row.moves for row in rows] == [None] * 4
    assert cells(rows)[1][-1] == "n/a"


def test_the_row_of_the_result_comes_last_and_replaces_its_policy() -> None:
    small = problem([[5, 4, 3, 2]], [1, 1], 2)
    result = solve(small, "contiguous")
    rows = compare(small, result)
    assert methods(rows) == ["eplb", "eplb_lpt", "vibe", "contiguous"]
    assert rows[-1].evaluation is result.evaluation


def test_auto_is_never_worse_than_a_legal_policy() -> None:
    small = problem([[50, 4, 3, 2, 9, 9]], [1, 0.9, 1.1], 3)
    rows = compare(small, solve(small, work_limit=1000), methods=tuple(POLICIES))
    prices = [row.evaluation.objective for row in rows if row.evaluation and row.evaluation.legal]
    assert methods(rows)[-1] == "auto"
    assert prices[-1] == min(prices)


@given(given_problem=tiny_problems(routing="weighted", max_layers=2, max_windows=2))
def test_weighted_policies_get_the_best_shares(given_problem: Problem) -> None:
    for found in compare(given_problem, methods=tuple(POLICIES)):
        if found.evaluation is not None:
            plan = POLICIES[found.method](given_problem)
            shared = evaluate(given_problem, resplit(given_problem, plan)).objective
            even = evaluate(given_problem, plan).objective
            assert found.evaluation.objective == shared <= even * (1 + 1e-9)


def test_a_plan_that_breaks_a_rule_is_priced_and_marked() -> None:
    barred = problem([[5, 4, 3, 2]], [1, 1], 2, constraints=[Forbid(0, 0)])
    rows = compare(barred, methods=("contiguous",))
    assert row(rows, "contiguous").evaluation is not None
    assert cells(rows)[0][0] == "contiguous *"
    assert "forbidden on rank 0" in " ".join(notes(barred, rows))


# --- ViBE as printed -----------------------------------------------------------------------------


def test_vibe_as_printed_is_shown_where_it_needs_more_slots() -> None:
    rows = compare(problem(HOT, [1, 1], 2))
    printed = row(rows, "vibe (uncapped)")
    assert methods(rows).index("vibe (uncapped)") == methods(rows).index("vibe") + 1
    assert printed.evaluation is None
    assert printed.reason == "1 of 1 layers put more experts on a rank than it has slots"


@given(given_problem=tiny_problems(max_layers=2))
def test_elsewhere_the_printed_and_the_capped_vibe_agree(given_problem: Problem) -> None:
    rows = compare(given_problem, methods=("vibe",))
    rank = vibe_assignment(planning_loads(given_problem), given_problem.cluster.speeds)
    if len(rows) == 1:
        plan = POLICIES["vibe"](given_problem)
        for layer in range(plan.layers):
            where = [plan.rank_of_slot[plan.slots[layer] == e].item() for e in range(plan.experts)]
            assert where == rank[layer].tolist()
    else:
        counts = [np.bincount(each, minlength=given_problem.ranks) for each in rank]
        assert (np.array(counts) > given_problem.cluster.slots).any()


# --- text ----------------------------------------------------------------------------------------


def relative(loads: Any, speeds: Any, slots: Any, **options: Any) -> Problem:
    return problem(loads, speeds, slots, speed_unit="relative", **options)


#: Problem and method of summaries that differ in what they have to say.
CASES: dict[str, tuple[Callable[[], Problem], str]] = {
    "seconds": (lambda: problem([[[5e5, 4e5, 3e5]]], [1e9, 2e9], 2, passes=[7]), "eplb_lpt"),
    "vibe uncapped": (lambda: relative(HOT, [1, 1], [3, 2]), "eplb_lpt"),
    "weighted": (lambda: problem([[6, 5, 1]], [1, 1], 3, routing="weighted"), "eplb_lpt"),
    "worst window": (
        lambda: problem([[[6, 5, 1]], [[1, 2, 3]]], [1, 1], 3, objective="worst"),
        "contiguous",
    ),
    "infeasible": (
        lambda: problem([[1, 1]], [1, 1], 1, constraints=[Pin(0, 0), Forbid(0, 0)]),
        "auto",
    ),
    "no tokens": (lambda: problem([[0, 0, 0]], [1, 1], 2), "contiguous"),
    "huge": (
        lambda: relative(np.full((40, 8), 1e14), np.ones(4), 4, name="x" * 200 + "\x1b[31m\n"),
        "eplb_lpt",
    ),
    "generated": (lambda: generate((4, 64, 80, 8), 1), "eplb_lpt"),
    "illegal rival": (lambda: problem([[60, 1, 1, 1]], np.ones(4), 2), "eplb_lpt"),
}


@pytest.fixture(scope="module", params=CASES)
def result(request: pytest.FixtureRequest) -> Result:
    build, method = CASES[request.param]
    return solve(build(), method)


def test_a_summary_is_plain_text_that_fits_80_columns(result: Result) -> None:
    text = summary(result)
    assert str(result) == text
    assert all(len(line) <= 80 for line in text.split("\n"))
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_summary_says_what_was_solved_and_how_well(result: Result) -> None:
    text = summary(result)
    for label in ("shapes", "routing", "method", "status", "lower bound", "wall time"):
        assert f"\n{label}" in "\n" + text
    assert str(result.status) in text
    assert "contiguous" in text
    assert "eplb" in text
    if result.evaluation is None:
        assert "reason" in text
    else:
        assert f"(exactly {result.objective!r})" in text
        assert f"(exactly {result.lower_bound!r})" in text
        assert result.problem.cluster.time_unit in text


def test_cells_have_a_text_for_each_column() -> None:
    rows = compare(problem(HOT, [1, 1], [3, 2]))
    assert {len(texts) for texts in cells(rows)} == {len(COLUMNS)}
    assert cells(rows)[RIVALS.index("eplb")][1] == "n/a"


@pytest.mark.parametrize(
    ("value", "unit", "like", "text"),
    [
        (0.0, "s", None, "0 s"),
        (12.0, "s", None, "12.0000 s"),
        (0.0881234567, "s", None, "88.1235 ms"),
        (3.2e-5, "s", None, "32.0000 us"),
        (3.2e-8, "s", None, "32.0000 ns"),
        (1.5e-12, "s", None, "0.001500 ns"),
        (0.5, "s", 0.002, "500.000 ms"),
        (0.0, "s", 0.002, "0 ms"),
        (1234567.0, "token units", None, "1,234,567 token units"),
        (196.66666, "token units", None, "196.667 token units"),
        (196.66666, "token units", 1.0, "196.667"),
        (1e15, "token units", None, "1e+15 token units"),
    ],
)
def test_amounts_are_readable(value: float, unit: str, like: Any, text: str) -> None:
    assert amount(value, unit, like) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.0, "0 %"), (1e-4, "0.01 %"), (0.0797, "7.97 %"), (42.0, "4,200 %"), (np.inf, "infinite")],
)
def test_ratios_are_per_cent(ratio: float, text: str) -> None:
    assert percent(ratio) == text
