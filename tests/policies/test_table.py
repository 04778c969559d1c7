"""The table of policies makes plans that fit, from the mean load over windows."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import Forbid
from moeplace.errors import PolicyNotApplicable
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.plan import EMPTY
from moeplace.policies import POLICIES, planning_loads
from moeplace.policies.eplb import eplb
from tests.strategies import problem, tiny_problems

#: The loads of the example in DeepSeek's repository.
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_names_are_those_of_the_command_line() -> None:
    assert list(POLICIES) == ["contiguous", "round_robin", "eplb", "eplb_lpt", "vibe", "top_k"]


def test_planning_loads_are_the_weighted_mean_over_windows() -> None:
    two = problem([[[4, 0]], [[0, 8]]], [1, 1], 1, window_weight=[3, 1])
    np.testing.assert_allclose(planning_loads(two), [[3, 2]])


def test_planning_loads_are_per_pass_if_passes_are_known() -> None:
    two = problem([[[4, 0]], [[0, 8]]], [1, 1], 1, passes=[1, 4])
    np.testing.assert_allclose(planning_loads(two), [[0.8, 1.6]])  # passes weigh 1 and 4


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_every_plan_fits_its_problem_or_the_policy_says_why(name: str, data: st.DataObject) -> None:
    given_problem = data.draw(tiny_problems(max_layers=2, max_windows=2))
    try:
        plan = POLICIES[name](given_problem)
    except PolicyNotApplicable as cause:
        assert name in ("round_robin", "eplb")
        assert "equal slots" in str(cause)  # noqa: PT017 - only some draws raise
        assert np.ptp(given_problem.cluster.slots) > 0
    else:
        assert evaluate(given_problem, plan).objective >= 0
        assert plan.split is None
        assert name == "eplb" or not plan.duplicates.any()


def test_eplb_is_global_whatever_the_nodes() -> None:
    loads = np.array(PUBLISHED, dtype=float)
    one = problem(loads, np.ones(8), 2)
    two = replace(one, cluster=Cluster.from_speeds(np.ones(8), 2, nodes=2))
    slots = eplb(loads, ranks=8, slots_per_rank=2)
    np.testing.assert_array_equal(POLICIES["eplb"](one).slots, slots)
    np.testing.assert_array_equal(POLICIES["eplb"](two).slots, slots)


def test_policies_do_not_look_at_rules() -> None:
    loads, rule = [5, 3, 2, 1], [Forbid(0, 0), Forbid(0, 1)]
    free, barred = (problem(loads, [1, 1, 1], 2, constraints=c) for c in ([], rule))
    for name, policy in POLICIES.items():
        np.testing.assert_array_equal(policy(free).slots, policy(barred).slots, err_msg=name)


@pytest.mark.parametrize(
    ("experts", "slots", "hot"),
    [
        (4, [4, 4], 4),  # all of them
        (4, [3, 3], 2),
        (4, [2, 2], 0),  # none to spare
        (4, [3, 2], 1),
        (4, [4, 0], 0),  # a rank without slots holds no copy
        (3, [3], 3),
        (3, [8], 3),
        (6, [3, 3, 3], 1),
    ],
)
def test_top_k_takes_the_largest_k_that_fits(experts: int, slots: list[int], hot: int) -> None:
    loads = np.arange(experts, 0, -1)
    plan = POLICIES["top_k"](problem(loads, np.ones(len(slots)), slots))
    everywhere = (plan.replicas[0] == len(slots)).sum()
    assert everywhere == hot
    if len(slots) > 1:
        assert (np.delete(plan.replicas[0], np.s_[:hot]) == 1).all()


def test_vibe_places_each_expert_once() -> None:
    plan = POLICIES["vibe"](problem([9, 1, 1, 1], [1, 0.5], [3, 2]))
    assert (plan.replicas == 1).all()
    assert (plan.slots == EMPTY).sum() == 1


def test_importing_the_policies_loads_no_compiler() -> None:
    code = "import sys, moeplace.policies; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
