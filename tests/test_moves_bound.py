"""The bound on few moves, against every legal plan of tiny problems."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.bounds import few_moves, lower_bound, recompute
from moeplace.constraints import MaxMoves
from moeplace.moves_bound import FewMoves
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.strategies import legal_plans, plan, problem, tiny_problems


def _budget(one: Problem, current: mp.Plan, moves: int) -> Problem:
    return Problem(
        one.loads,
        one.cluster,
        base_load=one.base_load,
        constraints=[MaxMoves(current, per_layer=moves)],
    )


@given(st.data(), tiny_problems(routing="even"), st.integers(0, 3))
@settings(max_examples=4 * settings().max_examples)
def test_no_reachable_makespan_is_refuted(data: st.DataObject, one: Problem, moves: int) -> None:
    few = _budget(one, data.draw(legal_plans(one)), moves)
    best = optimum(few)
    case = FewMoves(few, 0, 0)
    assert not case.refutes(moves, best * (1 + 1e-9))
    assert not case.refutes(moves, best * (1 + 1e-9), states=1), "joined states forbid no plan"
    bound = lower_bound(few)
    assert bound.total <= best * (1 + 1e-9)
    recompute(few, bound)


@given(st.data(), tiny_problems(routing="even", max_experts=5))
def test_dropping_copies_alone_is_solved_exactly(data: st.DataObject, one: Problem) -> None:
    """Without moves only options are left: the relaxation is none."""
    few = _budget(one, data.draw(legal_plans(one)), 0)
    if not one.tokens.any():
        return
    assert lower_bound(few).total == pytest.approx(optimum(few), rel=2e-7)


def test_two_hot_ranks_need_two_moves() -> None:
    loads = [8.0, 8, 1, 1, 1, 1]
    few = problem(loads, [1, 1, 1], 3)
    current = plan([0, 2, -1, 1, 3, -1, 4, 5, -1], [3, 3, 3])
    by_moves = [lower_bound(_budget(few, current, moves)).total for moves in range(3)]
    assert by_moves[0] == pytest.approx(9, rel=1e-6)
    assert by_moves[1] == pytest.approx(9, rel=1e-6), "the other hot rank stays"
    assert by_moves[2] < 8


def test_it_is_far_above_fluid_at_real_size() -> None:
    """58 layers would take as many times longer; three show it."""
    shape = (3, 256, 288, 32)
    current = mp.solve(mp.instances.generate(shape, 0).aggregate(), work_limit=3_000_000).plan
    drifted = mp.instances.generate(shape, 0, epoch=1).aggregate()
    for moves, least in ((0, 1.05), (2, 1.02)):
        few = _budget(drifted, current, moves)
        bound = lower_bound(few)
        assert bound.total >= drifted.fluid.sum() * least
        assert bound.sources["few moves"] >= 2
        recompute(few, bound)
        result = mp.solve(few, work_limit=3_000_000)
        assert (result.evaluation.makespan >= bound.per_layer).all()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def drifted() -> Problem:
    """One layer of 256 x 288 / 32, drifted, two moves."""
    shape = (1, 256, 288, 32)
    current = mp.solve(mp.instances.generate(shape, 100).aggregate(), work_limit=2_000_000).plan
    return _budget(mp.instances.generate(shape, 100, epoch=1).aggregate(), current, 2)


def test_more_states_and_more_time_exclude_more(drifted: Problem) -> None:
    case = FewMoves(drifted, 0, 0)
    fluid = float(drifted.fluid[0, 0])
    high = mp.solve(drifted, work_limit=3_000_000).objective
    quick = case.bound(2, fluid, high)
    long = case.bound(2, fluid, high, seconds=5.0)
    assert fluid * 1.02 < quick < long <= high * (1 + 1e-9)
    assert case.follows(2, long)
    joined = [case.refutes(2, quick, states) for states in (1, 1_000)]
    assert joined == [False, True], "with too few states loads are too vague"


def test_more_moves_exclude_less(drifted: Problem) -> None:
    fluid = float(drifted.fluid[0, 0])
    bounds = [FewMoves(drifted, 0, 0).bound(moves, fluid, 1.3 * fluid) for moves in range(9)]
    assert bounds[0] > bounds[2] > bounds[4] > bounds[8] >= fluid


@pytest.mark.parametrize("loads", [[90.0, 3, 2, 1, 1, 1, 1, 1], [1.0, 90, 80, 2, 1, 1, 1, 1]])
def test_an_expert_too_hot_for_its_replicas_may_receive_many(loads: list[float]) -> None:
    """It needs more copies than the search spells out; a plan with them must stay possible."""
    one = problem(loads, [1] * 8, 2)
    current = plan([0, 1, 0, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1, -1, -1], [2] * 8)
    for moves in (4, 5, 6, 7):
        few = _budget(one, current, moves)
        found = mp.solve(few, method="cp-sat", gap=0, time_limit=20)
        case = FewMoves(few, 0, 0)
        assert not case.refutes(moves, found.objective * (1 + 1e-9))
        assert not case.refutes(moves, found.objective * (1 + 1e-9), states=1)


def test_a_claim_that_does_not_follow_is_refused() -> None:
    loads = [8.0, 8, 1, 1, 1, 1]
    few = _budget(problem(loads, [1, 1, 1], 3), plan([0, 2, -1, 1, 3, -1, 4, 5, -1], [3, 3, 3]), 1)
    bound = lower_bound(few)
    forged = mp.Bound(per_layer=bound.per_layer * 1.1, source=bound.source, total=bound.total * 1.1)
    with pytest.raises(mp.CertificateError, match=r"window 0, layer 0 does not follow from 'few"):
        recompute(few, forged)


def test_weighted_routing_is_left_alone() -> None:
    few = problem([8.0, 1], [1, 1], 1, routing="weighted")
    few = Problem(
        few.loads,
        few.cluster,
        routing="weighted",
        constraints=[MaxMoves(plan([0, 1], [1, 1]), per_layer=1)],
    )
    start = np.zeros((1, 1))
    assert (few_moves(few, start) == start).all()
