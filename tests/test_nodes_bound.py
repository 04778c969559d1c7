"""Groups shared out over nodes: never above a plan, and what it proves at real size."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.bounds import lower_bound, recompute
from moeplace.constraints import NodeGroups
from moeplace.nodes_bound import share_groups
from moeplace.problem import Problem
from tests.brute_force import optimum
from tests.strategies import problem, tiny_problems


@given(st.data(), tiny_problems(max_experts=5, max_layers=2, max_windows=2))
@settings(max_examples=3 * settings().max_examples)
def test_it_is_never_above_the_optimum(data: st.DataObject, one: Problem) -> None:
    nodes = data.draw(st.lists(st.integers(0, 1), min_size=one.ranks, max_size=one.ranks))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=one.experts, max_size=one.experts))
    groups = [min(group, one.experts - 1) for group in groups]
    grouped = replace(
        one,
        cluster=replace(one.cluster, nodes=nodes),
        constraints=[NodeGroups(np.array(groups))],
    )
    best = optimum(grouped)
    bound = lower_bound(grouped)
    assert bound.total <= best * (1 + 1e-9)
    recompute(grouped, bound)


def test_a_hot_expert_must_share_its_node() -> None:
    """Fluid 3.5; group (8, 0) on one node of two ranks of one slot each needs 8 on one of them."""
    one = problem([8.0, 0, 3, 3], [1, 1, 1, 1], 1)
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 0, 1, 1]))
    grouped = replace(one, constraints=[NodeGroups(2)])
    shared = share_groups(grouped)
    assert shared is not None
    assert shared.bound[0, 0] == pytest.approx(8.0)
    assert sorted(shared.node_of[0, 0].tolist()) == [0, 1]


def test_many_groups_are_left_to_the_coarse_bound() -> None:
    one = mp.instances.generate((1, 64, 72, 8), 0)
    nodes = np.arange(8) // 2
    grouped = replace(one, cluster=replace(one.cluster, nodes=nodes), constraints=[NodeGroups(32)])
    assert share_groups(grouped) is None
    assert lower_bound(grouped).total > 0


def test_real_layers_are_solved_to_the_bound() -> None:
    one = mp.instances.generate((3, 256, 288, 32), 100).aggregate()
    grouped = replace(
        one,
        cluster=replace(one.cluster, nodes=np.arange(32) // 8),
        constraints=[NodeGroups(8)],
    )
    bound = lower_bound(grouped)
    assert "groups on nodes" in bound.sources or "nodes: hot packing" in bound.sources
    assert mp.solve(grouped, work_limit=6_000_000, gap=1e-4).gap < 1e-3


def test_a_claim_above_it_is_refused() -> None:
    one = problem([8.0, 0, 3, 3], [1, 1, 1, 1], 1)
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 0, 1, 1]))
    grouped = replace(one, constraints=[NodeGroups(2)])
    forged = mp.Bound(
        per_layer=np.array([[8.1]]), source=np.array([["groups on nodes"]]), total=8.1
    )
    with pytest.raises(mp.CertificateError, match="does not follow from 'groups on nodes'"):
        recompute(grouped, forged)
