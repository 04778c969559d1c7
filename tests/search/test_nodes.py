"""Expert groups on nodes, against all assignments of groups to nodes."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.bounds import mean_bound
from moeplace.constraints import NodeGroups
from moeplace.problem import Problem
from moeplace.search.nodes import assign
from tests.strategies import problem, tiny_problems

MORE = settings(max_examples=4 * settings().max_examples)


def on_nodes(one: Problem, nodes: Any, groups: Any) -> Problem:
    """The problem with ranks on nodes and experts in groups."""
    rule = NodeGroups(np.asarray(groups))
    return replace(one, cluster=replace(one.cluster, nodes=nodes), constraints=[rule])


def assigned(one: Problem, seed: int = 0) -> np.ndarray | None:
    assert one.node_groups is not None
    return assign(one, one.node_groups.of(one.experts), mean_bound(one), seed)


def slowest_node(one: Problem, layer: int, node_of: Any) -> float:
    """Seconds of the slowest node on the mean load, all its ranks taken together.

    Infinite if its slots do not hold its experts. Ranks without slots take no tokens.
    """
    tokens, base = one.mean_load
    cluster = one.cluster
    assert one.node_groups is not None
    assert cluster.nodes is not None
    home = np.asarray(node_of)[one.node_groups.of(one.experts)]
    seconds = 0.0
    for node in range(int(cluster.nodes.max()) + 1):
        ranks = (cluster.nodes == node) & (cluster.slots > 0)
        experts = home == node
        if experts.sum() > np.minimum(cluster.slots, one.experts)[ranks].sum():
            return float("inf")
        if ranks.any():
            carried = tokens[layer, experts].sum() + base[layer, ranks].sum()
            seconds = max(seconds, carried / cluster.speeds[ranks].sum())
    return seconds


def best_assignment(one: Problem, layer: int) -> float:
    """Least seconds of the slowest node, over all assignments; infinite if nothing fits."""
    assert one.node_groups is not None
    assert one.cluster.nodes is not None
    groups = int(one.node_groups.of(one.experts).max()) + 1
    every = product(range(int(one.cluster.nodes.max()) + 1), repeat=groups)
    return min(slowest_node(one, layer, node_of) for node_of in every)


@st.composite
def grouped(draw: st.DrawFn) -> Problem:
    """Tiny problems with ranks on up to three nodes and experts in groups of any sizes."""
    one = draw(tiny_problems(max_layers=2, max_windows=2))
    nodes = draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    group = st.integers(0, one.experts - 1)
    groups = draw(st.lists(group, min_size=one.experts, max_size=one.experts))
    return on_nodes(one, nodes, groups)


@given(grouped(), st.integers(0, 5))
@MORE
def test_groups_fit_on_their_nodes_and_none_is_said_where_nothing_fits(
    one: Problem, seed: int
) -> None:
    best = [best_assignment(one, layer) for layer in range(one.layers)]
    found = assigned(one, seed)
    if found is None:
        assert float("inf") in best, "groups as small as these are packed if they can be"
        return
    assert found.shape == (one.layers, len(set(one.constraints[0].of(one.experts).tolist())))
    for layer, node_of in enumerate(found):
        reached = slowest_node(one, layer, node_of)
        assert reached < float("inf"), "a node holds more experts than it has slots"
        assert reached >= best[layer] * (1 - 1e-12)


def tiny_set(equal: bool) -> list[Problem]:
    """Forty fixed problems of up to 6 groups on 2 or 3 nodes, equal or not."""
    random = np.random.default_rng(4)
    chosen = []
    while len(chosen) < 40:
        groups, nodes = int(random.integers(2, 7)), int(random.integers(2, 4))
        sizes = np.full(groups, 2) if equal else random.integers(1, 4, groups)
        owner = np.repeat(np.arange(groups), sizes)
        each = -(-owner.size // (2 * nodes)) + int(random.integers(0, 2))
        loads = np.round(random.lognormal(3, 1, (2, owner.size)))
        speeds = np.ones(2 * nodes) if equal else random.uniform(0.5, 1.5, 2 * nodes)
        base = 0 if equal else random.integers(0, 20, 2 * nodes)
        one = problem(loads, speeds, each, base_load=np.broadcast_to(base, 2 * nodes))
        chosen.append(on_nodes(one, np.arange(2 * nodes) // 2, owner))
    return chosen


@pytest.mark.parametrize("equal", [True, False])
def test_the_slowest_node_is_as_fast_as_can_be_in_nearly_all_layers(equal: bool) -> None:
    layers = hits = 0
    for one in tiny_set(equal):
        found = assigned(one)
        for layer in range(one.layers):
            best = best_assignment(one, layer)
            if best == float("inf"):
                assert found is None
                continue
            layers += 1
            if found is not None:
                hits += slowest_node(one, layer, found[layer]) <= best * (1 + 1e-12)
    assert layers >= 60
    assert hits >= 0.95 * layers


def test_groups_larger_than_every_node_have_no_place() -> None:
    one = problem([3, 2, 1], [1, 1, 1], 1)
    assert assigned(on_nodes(one, [0, 0, 1], [0, 0, 0])) is None
    assert assigned(on_nodes(one, [0, 0, 1], [0, 0, 1])) is not None


def test_a_hot_group_takes_the_fast_node() -> None:
    one = on_nodes(problem([9, 9, 1, 1], [1, 1, 3, 3], 2), [0, 0, 1, 1], [0, 0, 1, 1])
    found = assigned(one)
    assert found is not None
    assert found.tolist() == [[1, 0]]


def test_ranks_without_slots_lend_no_speed_to_their_node() -> None:
    # node 0 looks fast, but its fast rank holds nothing
    one = on_nodes(problem([6, 2], [9, 1, 2], [0, 2, 2]), [0, 0, 1], [0, 1])
    found = assigned(one)
    assert found is not None
    assert found.tolist() == [[1, 0]]


def test_each_layer_is_assigned_by_its_own_loads() -> None:
    one = on_nodes(problem([[5, 1, 4, 2], [5, 4, 1, 2]], [1, 1], 2), [0, 1], range(4))
    found = assigned(one)
    assert found is not None
    for layer, apart in enumerate(([[0, 1], [2, 3]], [[0, 2], [1, 3]])):
        halves = [np.flatnonzero(found[layer] == node).tolist() for node in (0, 1)]
        assert sorted(halves) == apart


def test_equal_seeds_assign_alike() -> None:
    random = np.random.default_rng(0)
    one = on_nodes(
        problem(random.lognormal(0, 1, (3, 64)), random.uniform(0.8, 1.2, 8), 9),
        np.arange(8) // 2,
        np.arange(64) // 4,
    )
    first, again = assigned(one, 3), assigned(one, 3)
    assert first is not None
    assert again is not None
    assert (first == again).all()
