"""The exhaustive bound on few moves, against every legal plan of tiny problems."""

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
    assert not FewMoves(few, 0, 0).refutes(moves, best * (1 + 1e-9))
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
