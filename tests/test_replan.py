"""Which re-plan pays."""

from dataclasses import replace

import pytest

from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.replan import Economy, propose
from moeplace.solve import solve
from moeplace.transfer import Links

LINKS = Links(intra=1e9, inter=1e9)


@pytest.fixture(scope="module")
def drifted() -> tuple[Problem, Plan]:
    shape = (4, 32, 40, 8)
    current = solve(generate(shape, 1).aggregate(), gap=1e-3).plan
    return generate(shape, 1, epoch=1).aggregate(), current


def test_the_longer_a_plan_serves_the_more_may_move(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    moves, nets = [], []
    for steps in (1e-3, 1.0, 1e2, 1e6):
        economy = Economy(expert_bytes=10**7, links=LINKS, steps=steps, step_seconds=0.1)
        found = propose(problem, current, economy, time_limit=0.1)
        assert found.migration.moves == found.point.moves
        assert found.net == found.payback.net(steps)
        assert found.net == max(0.0, found.net)
        moves.append(found.point.moves)
        nets.append(found.net)
    assert moves == sorted(moves)
    assert (moves[0], moves[-1] > 50) == (0, True)
    assert nets == sorted(nets)


def test_nothing_pays_where_the_plan_is_the_best(drifted: tuple[Problem, Plan]) -> None:
    problem, _ = drifted
    best = solve(problem, gap=1e-6, time_limit=0.5).plan
    economy = Economy(expert_bytes=10**7, links=LINKS, steps=10.0, step_seconds=0.1)
    found = propose(problem, best, economy, time_limit=0.05)
    assert not found.pays
    assert found.reason.startswith("nothing pays: at most 0.0")
    assert found.point.moves == 0


def test_slowed_service_counts_its_own_cost(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    economy = Economy(
        expert_bytes=10**7, links=LINKS, steps=1e3, step_seconds=0.1, mode="slowed", slowdown=0.2
    )
    found = propose(problem, current, economy, budgets=(8,), time_limit=0.1)
    assert found.pays
    stalled = found.migration.seconds(LINKS)
    assert found.payback.duration == pytest.approx(max(stalled / 0.5, found.migration.turns * 0.1))
    assert found.payback.slowed == pytest.approx(0.2 * found.payback.duration)


def test_seconds_must_be_known(drifted: tuple[Problem, Plan]) -> None:
    problem, current = drifted
    economy = Economy(expert_bytes=1, links=LINKS, steps=1.0)
    with pytest.raises(ProblemError, match="give step_seconds"):
        propose(problem, current, economy, budgets=(), time_limit=0.01)
    seconds = Problem(
        LoadHistogram(tokens=problem.loads.tokens, passes=[100.0]),
        Cluster(speeds=1e6 * problem.cluster.speeds, slots=problem.cluster.slots),
    )
    found = propose(seconds, current, replace(economy, steps=1e6), budgets=(8,), time_limit=0.1)
    assert found.payback.gain == pytest.approx(
        evaluate(seconds, current).objective - found.point.objective, rel=1e-9
    )
