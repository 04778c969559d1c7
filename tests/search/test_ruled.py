from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import Forbid, MaxOffNode, MaxReplicas, Pin, ReplicaBudget
from moeplace.dispatch import FIXED, sources
from moeplace.evaluate import evaluate
from moeplace.feasible import least_off_node
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.construct import adopt
from moeplace.search.ruled import Ruled, deal, local, undrawn
from moeplace.search.state import State
from moeplace.solve import solve
from moeplace.topology import traffic
from tests.strategies import legal_plans, problem, tiny_problems


def on_nodes(one: Problem, nodes: Any) -> Problem:
    return replace(one, cluster=replace(one.cluster, nodes=nodes))


@st.composite
def ruled_problems(draw: st.DrawFn) -> Problem:
    one = draw(tiny_problems(routing=draw(st.sampled_from(FIXED)), max_ranks=6, max_windows=2))
    nodes = st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks)
    return on_nodes(one, draw(nodes))


@given(data=st.data())
def test_the_kernel_deals_the_most_that_any_draw_does(data: st.DataObject) -> None:
    one = data.draw(ruled_problems())
    placed = data.draw(legal_plans(one))
    ruled = Ruled(one, State.of(one))
    most = np.max([sources(one, placed, draw) for draw in range(60)], axis=0)
    for expert in range(one.experts):
        slots = np.flatnonzero(placed.slots[0] == expert)
        held = placed.rank_of_slot[slots][::-1].copy()  # in any order
        out = np.zeros(held.size, dtype=np.int64)
        deal(ruled.nearest, ruled.node, ruled.ranks_on, held, held.size, out)
        assert out.tolist() == most[0, slots][::-1].tolist()


def annealed(one: Problem, placed: Plan, trials: int = 300) -> tuple[Plan, float]:
    state = State.of(one, 1)
    adopt(state, placed, np.arange(one.layers))
    ruled = Ruled(one, state)
    heat = np.full((one.layers, 2), [0.1, 0.0])
    with ThreadPoolExecutor(1) as pool:
        weight = one.window_weight
        ruled.improve(np.arange(one.layers), trials, heat, weight, pool, 1)
    return state.plan(one), float((ruled.cost * state.unit * one.layer_weight).sum())


@given(data=st.data())
def test_the_search_knows_what_its_plan_costs_at_most(data: st.DataObject) -> None:
    one = replace(data.draw(ruled_problems()), objective="mean")
    found, cost = annealed(one, data.draw(legal_plans(one)))
    price = evaluate(one, found).objective
    assert price <= cost * (1 + 1e-9)
    if one.routing == "ascend":
        assert price == pytest.approx(cost)


@given(data=st.data())
def test_the_search_never_makes_a_layer_worse(data: st.DataObject) -> None:
    one = replace(data.draw(ruled_problems()), objective="mean", routing="ascend")
    placed = data.draw(legal_plans(one))
    assert annealed(one, placed)[1] <= evaluate(one, placed).objective * (1 + 1e-9)


def test_the_search_obeys_pins_forbids_and_limits_of_replicas() -> None:
    loads = [30, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    rules = [Pin(9, 0), Forbid(0, 1), MaxReplicas(3), ReplicaBudget(13)]
    slots = [9, 0, 1, 2, 3, 4, 5, -1, 6, 7, 8, -1, 0, 1, 2, -1]
    placed = Plan(slots=np.array([slots]), rank_slots=np.full(4, 4), experts=10)
    for routing in FIXED:
        one = problem(loads, [1, 1.1, 0.9, 1], [4] * 4, routing=routing, constraints=rules)
        found, cost = annealed(on_nodes(one, [0, 0, 1, 1]), placed, 3000)
        assert evaluate(one, found).legal
        assert cost < 0.9 * evaluate(one, placed).objective
        pinned = replace(one, constraints=rules[:2])
        assert solve(pinned, work_limit=100_000).status != "none_in_time"


def test_fewer_copies_leave_nothing_to_draw() -> None:
    one = problem([50, 20, 10, 5, 1, 1], [1] * 4, [3] * 4, routing="sglang-static")
    slots = np.array([[0, 1, 4, 0, 1, 5, 0, 1, 2, -1, 2, 3]])
    placed = Plan(slots=slots, rank_slots=np.full(4, 3), experts=6)
    fewer = undrawn(one, placed)
    assert fewer.replicas.tolist() == [[2, 2, 2, 1, 1, 1]]
    pinned = replace(one, constraints=[Pin(0, 0), Pin(0, 1), Pin(0, 2), Pin(1, 2)])
    assert undrawn(pinned, placed).replicas.tolist() == [[3, 2, 2, 1, 1, 1]]
    apart = undrawn(on_nodes(one, [0, 0, 1, 1]), placed)
    kept = apart.rank_of_slot[apart.slots[0] == 0]
    assert kept.tolist() == [0, 2]  # one on each node
    for some in (fewer, apart):
        assert (sources(one, some, 0) == sources(one, some, 7)).all()


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("routing", FIXED)
def test_planning_for_the_rule_recovers_most_of_what_it_costs(routing: Any, nodes: int) -> None:
    even = generate((2, 256, 288, 32), 0).aggregate()
    cluster = Cluster.from_speeds(even.cluster.speeds, 9, nodes, "relative")
    one = replace(even, cluster=cluster, routing=routing)
    lost = evaluate(one, solve(even, work_limit=400_000, gap=1e-4).plan).imbalance - 1
    ours = solve(one, work_limit=4_000_000, gap=1e-4)
    assert lost > 0.01
    weighted = replace(one, routing="weighted")
    for draw in range(3):  # whatever the engine draws
        share = sources(one, ours.plan, draw) / one.ranks
        assert evaluate(weighted, ours.plan.with_split(share)).imbalance - 1 < 0.2 * lost
    assert ours.lower_bound <= ours.objective


def test_equal_inputs_give_equal_plans() -> None:
    one = replace(generate((2, 32, 40, 8), 0).aggregate(), routing="sglang-static")
    first, again = (solve(one, work_limit=300_000, workers=n) for n in (1, 2))
    assert np.array_equal(first.plan.slots, again.plan.slots)


@given(data=st.data())
def test_the_search_knows_what_leaves_its_node(data: st.DataObject) -> None:
    one = replace(data.draw(ruled_problems()), objective="mean")
    placed = data.draw(legal_plans(one))
    state = State.of(one, 1)
    adopt(state, placed, np.arange(one.layers))
    ruled = Ruled(one, state)
    ruled.toll[:] = 0.3
    heat = np.full((one.layers, 2), [0.1, 0.0])
    before = traffic(one, placed).off_node
    cost = evaluate(one, placed).objective if one.routing == "ascend" else None
    with ThreadPoolExecutor(1) as pool:
        ruled.improve(np.arange(one.layers), 300, heat, one.window_weight, pool, 1)
    found = state.plan(one)
    assert ruled.off == pytest.approx(traffic(one, found).off_node, abs=1e-9)
    if cost is not None:  # time and toll together never rise
        toll = 0.3 * float(one.mean(before - ruled.off) @ (state.unit * one.layer_weight))
        assert evaluate(one, found).objective <= (cost + toll) * (1 + 1e-9) + 1e-12


def test_plans_keep_copies_on_their_node_where_they_must() -> None:
    one = generate((2, 256, 288, 32), 0, routing="sglang-static").aggregate()
    one = replace(one, cluster=Cluster.from_speeds(one.cluster.speeds, 9, 4, "relative"))
    free = solve(one, work_limit=1_000_000, gap=1e-4).plan
    most = traffic(one, free).off_node.max() - 0.03
    ruled = replace(one, constraints=[MaxOffNode(most)])
    assert not evaluate(ruled, free).legal
    found = solve(ruled, work_limit=6_000_000, gap=1e-4)
    assert traffic(one, found.plan).off_node.max() <= most + 1e-9
    assert found.gap < 0.05


@given(data=st.data())
def test_the_local_start_is_legal_and_keeps_the_most_that_can_be(data: st.DataObject) -> None:
    one = data.draw(tiny_problems(routing="sglang-static", max_ranks=6))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    one = on_nodes(one, nodes)
    start = local(one)
    if start is None:
        return
    assert not start.duplicates.any()
    equal = one.ranks % 2 == 0 and one.cluster.slots.min() >= one.experts
    if equal and sorted(nodes) == [0] * (one.ranks // 2) + [1] * (one.ranks // 2):
        off = traffic(one, start).off_node
        assert off == pytest.approx(least_off_node(one), abs=1e-9)


def test_the_local_start_reaches_the_bound_at_real_size() -> None:
    one = generate((2, 256, 288, 32), 0, routing="sglang-static").aggregate()
    one = replace(one, cluster=Cluster.from_speeds(one.cluster.speeds, 9, 4, "relative"))
    start = local(one)
    assert start is not None
    assert evaluate(one, start).legal
    assert traffic(one, start).off_node == pytest.approx(least_off_node(one))
    rules = [Pin(3, 0), Pin(3, 31), Forbid(4, 2), MaxReplicas(2)]
    ruled = local(replace(one, constraints=rules))
    assert ruled is not None
    assert evaluate(replace(one, constraints=rules), ruled).legal
