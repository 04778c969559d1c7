"""The search for a packing of the hottest experts: what it says is true, and so is its twin."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.arguments import by_subsets, hot_packing, row_of
from moeplace.bench_search import spared
from moeplace.bounds import lower_bound, recompute
from moeplace.certificate import _rational
from moeplace.packing import TRIALS, search
from moeplace.problem import Problem
from moeplace.solve import solve
from tests.brute_force import optimum
from tests.strategies import problem

MORE = settings(max_examples=5 * settings().max_examples)


@st.composite
def few_spares(draw: st.DrawFn) -> Problem:
    """A tiny layer of a few hot experts, with fewer spare slots than ranks."""
    ranks = draw(st.integers(2, 4))
    slots = draw(st.lists(st.integers(1, 3), min_size=ranks, max_size=ranks))
    spare = draw(st.integers(0, min(ranks - 1, sum(slots) - 1, 2)))
    experts = min(sum(slots) - spare, 6)
    sizes = st.sampled_from([1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 9.0, 12.0])
    loads = draw(st.lists(sizes, min_size=experts, max_size=experts))
    speeds = st.sampled_from([1.0, 1.0, 0.8, 1.3])
    base = st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=ranks, max_size=ranks)
    return problem(
        loads,
        draw(st.lists(speeds, min_size=ranks, max_size=ranks)),
        slots,
        routing="weighted",
        base_load=draw(base),
    )


def asked(one: Problem, seconds: float, run: Any, exact: bool = False) -> tuple[int, list[int]]:
    """The search's answer, and what it wrote."""
    row = row_of(one, 0, 0)
    room, loads = row.room(seconds), row.loads
    if exact:
        room, loads = (np.array([Fraction(x) for x in part]) for part in (room, loads))
    fewest = np.insert(np.sort(row.caps[row.caps > 0]).cumsum(), 0, 0)
    ranks, part = np.zeros((2, loads.size), dtype=np.int64)
    answer = run(room, fewest, loads, row.spare, TRIALS, ranks, part)
    return int(answer), [*ranks.tolist(), *part.tolist()]


@given(few_spares())
@MORE
def test_the_optimum_is_never_refuted(one: Problem) -> None:
    best = optimum(one)
    assert not hot_packing(row_of(one, 0, 0), best * (1 + 1e-9))
    bound = lower_bound(one)
    assert bound.total <= best * (1 + 1e-9)
    recompute(one, bound)


@given(few_spares(), st.floats(0.5, 2.0))
@MORE
def test_rational_numbers_give_the_same_search(one: Problem, factor: float) -> None:
    seconds = factor * float(one.fluid[0, 0])
    compiled, said = asked(one, seconds, search)
    plain, exact = asked(one, seconds, search.py_func, exact=True)
    assert compiled == plain
    if compiled == 0:
        assert said == exact
    row, rational = row_of(one, 0, 0), _rational(row_of(one, 0, 0))
    assert hot_packing(row, seconds) == hot_packing(rational, seconds)


@given(few_spares())
@MORE
def test_a_packing_has_each_expert_and_spends_no_more_than_there_is(one: Problem) -> None:
    answer, written = asked(one, 1.3 * lower_bound(one).total, search)
    if answer != 0:
        return
    half = len(written) // 2
    ranks, part = written[:half], written[half:]
    parts = max(part) + 1
    assert set(part) == set(range(parts))
    assert sum(width - 1 for width in ranks[:parts]) <= row_of(one, 0, 0).spare
    assert all(1 <= width <= one.ranks for width in ranks[:parts])


def test_hot_ranks_cannot_have_the_same_light_neighbours() -> None:
    # each of two hot experts has room for two neighbours of 1, but there are only two such
    one = problem([9.0, 9, 4, 4, 3, 3, 1, 1, 3], [1.1, 1.1, 1], 3, routing="weighted")
    alone = (9 + 1 + 1) / 1.1
    together = (9 + 9 + 1 + 1 + 3 + 3) / 2.2
    row = row_of(one, 0, 0)
    assert hot_packing(row, together * (1 - 1e-9))
    assert not by_subsets(row, alone * (1 + 1e-9))
    assert lower_bound(one).total == pytest.approx(together, rel=1e-9)
    assert optimum(one) == pytest.approx(together, rel=1e-9)


@pytest.mark.parametrize("spare", [2, 4])
def test_at_real_size_bound_and_plan_nearly_meet(spare: int) -> None:
    """Before, layers were up to 4 % apart."""
    one = spared("A", 102, spare)
    found = solve(one, work_limit=20_000_000, gap=1e-5)
    assert found.gap < 1e-3
    assert np.median(found.layers.gap) < 2e-4
    assert "hot packing" in found.bound.sources
    assert found.layers.gap.max() < 0.025
    recompute(one, found.bound)
