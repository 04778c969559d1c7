"""Migration: relabelling, stages run by a small executor, costs."""

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.constraints import Forbid, NodeGroups, Pin, TokenCapacity
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.migrate import align, migrate, relabel
from moeplace.plan import EMPTY, Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.solve import solve
from moeplace.transfer import Links, Migration, payback
from tests.strategies import legal_plans, plan, tiny_problems


class Executor:
    """Ranks with weights in slots, and buffers; nothing here knows how stages were found.

    A weight is (layer, expert). A stage is received into buffers from what ranks hold before it,
    then all slots change; between stages every expert must be served.
    """

    def __init__(self, start: Plan, buffer: int) -> None:
        self.weights: list[list[list[Any]]] = []
        for layer, row in enumerate(start.slots.tolist()):
            held = [None if expert == EMPTY else (layer, expert) for expert in row]
            ends = np.concatenate([[0], start.rank_slots.cumsum()]).tolist()
            self.weights.append([held[a:b] for a, b in pairwise(ends)])
        self.first = np.concatenate([[0], start.rank_slots.cumsum()])
        self.experts, self.buffer, self.received = start.experts, buffer, 0

    def run(self, migration: Migration) -> None:
        turn, layer = -1, -1
        for stage in migration.stages:
            assert (stage.turn, stage.layer) >= (turn, layer), "engines go from layer to layer"
            turn, layer = stage.turn, stage.layer
            ranks = self.weights[stage.layer]
            buffers: list[dict[int, Any]] = [{} for _ in ranks]
            for copy in stage.copies:
                weight = (stage.layer, copy.expert)
                assert weight in ranks[copy.source], "a source holds what it sends"
                buffers[copy.rank][copy.slot - int(self.first[copy.rank])] = weight
                self.received += copy.source != copy.rank
            for rank, buffer in enumerate(buffers):
                assert len(buffer) <= self.buffer
                for slot, weight in buffer.items():
                    ranks[rank][slot] = weight
            for slot in stage.dropped:
                rank = int(np.searchsorted(self.first, slot, side="right")) - 1
                ranks[rank][slot - int(self.first[rank])] = None
            served = {weight for rank in ranks for weight in rank}
            assert {(stage.layer, expert) for expert in range(self.experts)} <= served

    def slots(self) -> list[list[int]]:
        return [
            [EMPTY if weight is None else weight[1] for rank in ranks for weight in rank]
            for ranks in self.weights
        ]


def executed(current: Plan, target: Plan, **options: Any) -> Migration:
    migration = migrate(current, target, expert_bytes=7, **options)
    executor = Executor(current, migration.buffer)
    executor.run(migration)
    assert executor.slots() == migration.target.slots.tolist()
    assert executor.received == migration.moves == target.moves_from(current).sum()
    assert migration.bytes == 7 * migration.moves
    assert migration.after(len(migration.stages)).slots.tolist() == migration.target.slots.tolist()
    return migration


@given(st.data())
def test_any_plan_is_reached_through_any_buffer(data: st.DataObject) -> None:
    problem = data.draw(tiny_problems(max_experts=8, max_ranks=4, max_layers=2))
    current, target = (data.draw(legal_plans(problem)) for _ in range(2))
    nodes = data.draw(st.lists(st.integers(0, 1), min_size=problem.ranks, max_size=problem.ranks))
    for buffer in (1, 2, None):
        migration = executed(current, target, buffer=buffer, nodes=nodes)
        price = evaluate(problem, migration.target).objective
        assert price == pytest.approx(evaluate(problem, target).objective, rel=1e-12)


@given(st.data())
def test_a_cycle_through_one_rank_needs_one_buffer(data: st.DataObject) -> None:
    """No spare slots, contents drawn at random: long cycles that visit ranks many times."""
    ranks, each = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    rank_slots = [each] * ranks
    order = st.permutations(range(ranks * each))
    current, target = (plan(data.draw(order), rank_slots) for _ in range(2))
    migration = executed(current, target, buffer=1)
    received = target.moves_from(current).max(initial=0)
    assert len(migration.stages) >= received


def test_engines_order_and_buffers() -> None:
    problem = generate((7, 32, 40, 8), 1).aggregate()
    current = POLICIES["contiguous"](problem)
    target = solve(problem, work_limit=10_000).plan
    vllm = executed(current, target)
    assert vllm.buffer == 5
    assert [(stage.layer, stage.turn) for stage in vllm.stages] == [(i, i) for i in range(7)]
    assert vllm.turns == 7
    chunks = executed(current, target, engine="sglang", chunk=3)
    assert [stage.turn for stage in chunks.stages] == [0, 0, 0, 1, 1, 1, 2]
    assert executed(current, target, engine="sglang").turns == 1
    few = executed(current, target, buffer=2)
    assert len(few.stages) > 7
    assert few.turns == 7


def test_a_published_map_with_duplicates_can_be_left() -> None:
    problem = generate((2, 16, 24, 4), 3, speeds="equal").aggregate()
    current = plan([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4]], [3, 3], 5, allow_duplicates=True)
    target = plan([[0, 1, 2, 3, 4, 0], [2, 1, 0, 3, 4, 0]], [3, 3], 5)
    for buffer in (1, None):
        executed(current, target, buffer=buffer)
    eplb = POLICIES["eplb"](problem)
    executed(eplb, solve(problem, work_limit=1000).plan, buffer=1)


def test_sources_are_on_the_same_node_where_they_can_be() -> None:
    current = plan([0, 1, 2, 0, 3, 1], [1] * 6, 4)
    target = plan([0, 0, 2, 0, 3, 1], [1] * 6, 4)
    (stage,) = migrate(current, target, expert_bytes=1, nodes=[0, 0, 0, 1, 1, 1]).stages
    assert [(copy.source, copy.rank) for copy in stage.copies] == [(0, 1)]
    target = plan([0, 1, 2, 0, 3, 2], [1] * 6, 4)
    migration = migrate(current, target, expert_bytes=1, nodes=[0, 0, 0, 1, 1, 1])
    assert [copy.source for copy in migration.stages[0].copies] == [2]
    assert migration.cross_node == 1


def test_senders_share_the_work() -> None:
    current = plan([0, 0, 0, 0, 1, 2, 3, 4], [1] * 8, 5)
    target = plan([1, 2, 3, 4, 0, 0, 0, 0], [1] * 8, 5)
    (stage,) = migrate(current, target, expert_bytes=1).stages
    senders = [copy.source for copy in stage.copies if copy.expert == 0]
    assert sorted(senders) == [0, 1, 2, 3]


def test_seconds_are_those_of_the_busiest_rank() -> None:
    current = plan([[0, 1, 2, 3], [0, 1, 2, 3]], [1] * 4)
    target = plan([[1, 0, 2, 3], [2, 1, 0, 3]], [1] * 4)
    migration = migrate(current, target, expert_bytes=[10, 30], nodes=[0, 0, 1, 1])
    links = Links(intra=10.0, inter=2.0, overhead=0.5)
    assert [migration.stage_seconds(stage, links) for stage in migration.stages] == [1.5, 15.5]
    assert migration.seconds(links) == 17.0
    assert (migration.moves, migration.bytes, migration.cross_node) == (4, 80, 2)


def test_payback_with_both_costs() -> None:
    current, target = plan([0, 1], [1, 1]), plan([1, 0], [1, 1])
    migration = migrate(current, target, expert_bytes=100)
    links = Links(intra=50.0, inter=1.0)
    earned = payback(migration, links, before=1.0, after=0.75, slowdown=0.1, share=0.5)
    assert (earned.stall, earned.duration) == (2.0, 4.0)
    assert earned.slowed == pytest.approx(0.4)
    assert earned.steps("stall") == 8.0
    assert earned.steps("slowed") == pytest.approx(1.6)
    assert earned.net(100) == 23.0
    assert payback(migration, links, before=1.0, after=1.0).steps() == float("inf")
    nothing = payback(migrate(current, current, expert_bytes=1), links, before=1.0, after=1.0)
    assert nothing.steps() == 0.0
    with pytest.raises(ProblemError, match="share must be from"):
        payback(migration, links, before=1.0, after=0.5, share=0.0)
    with pytest.raises(ProblemError, match="inter must be a finite number of at least 1 "):
        Links(intra=1e9, inter=0.0)


# ------------------------------------------------------------------------------ relabel


@given(st.data())
def test_relabelling_never_moves_more_nor_costs_more(data: st.DataObject) -> None:
    problem = data.draw(
        tiny_problems(max_ranks=4, max_layers=2, max_windows=2, constraints=True, limits=True)
    )
    current, target = (data.draw(legal_plans(problem)) for _ in range(2))
    tolerance = data.draw(st.sampled_from([0.0, 0.1, 10.0]))
    found = relabel(problem, current, target, tolerance)
    before, after = evaluate(problem, target), evaluate(problem, found)
    assert (after.makespan <= before.makespan * (1 + tolerance) * (1 + 1e-9)).all()
    assert len(after.violations) <= len(before.violations)
    assert (found.moves_from(current).sum(axis=1) <= target.moves_from(current).sum(axis=1)).all()
    assert (found.replicas == target.replicas).all()


def test_equal_ranks_change_names_and_nothing_moves() -> None:
    rng = np.random.default_rng(0)
    problem = generate((4, 32, 40, 8), 5, speeds="equal").aggregate()
    current = solve(problem, work_limit=10_000).plan
    shuffled = Plan(
        slots=current.by_rank(current.slots)[:, rng.permutation(8)].reshape(4, -1),
        rank_slots=current.rank_slots,
        experts=32,
    )
    assert shuffled.moves_from(current).sum() > 100
    assert (relabel(problem, current, shuffled).slots == current.slots).all()


@given(st.data())
def test_relabelling_equal_ranks_is_the_best_of_all_orders(data: st.DataObject) -> None:
    experts, ranks, each = 5, 4, 2
    problem = Problem(
        LoadHistogram(tokens=[[[1.0] * experts]]), Cluster.from_speeds([1.0] * ranks, each)
    )
    current, target = (data.draw(legal_plans(problem)) for _ in range(2))
    contents = target.by_rank(target.slots)[0]
    fewest = min(
        int(plan(contents[list(order)].ravel(), [each] * ranks, experts).moves_from(current).sum())
        for order in permutations(range(ranks))
    )
    found = relabel(problem, current, target)
    assert found.moves_from(current).sum() == fewest


def test_shares_go_with_their_slots() -> None:
    loads = LoadHistogram(tokens=[[[6.0, 2.0, 1.0]]])
    cluster = Cluster.from_speeds([1.0, 1.0], 2)
    problem = Problem(loads, cluster, routing="weighted")
    current = plan([0, 1, 0, 2], [2, 2])
    target = plan([2, 0, 1, 0], [2, 2], split=[[1.0, 7 / 12, 1.0, 5 / 12]])
    found = relabel(problem, current, target)
    assert found.slots.tolist() == [[0, 1, 0, 2]]
    assert found.split is not None
    assert found.split.tolist() == [[5 / 12, 1.0, 7 / 12, 1.0]]
    assert evaluate(problem, found).objective == evaluate(problem, target).objective


def test_slow_ranks_and_rules_keep_their_contents() -> None:
    loads = LoadHistogram(tokens=[[[4.0, 2.0]]])
    current, target = plan([0, 1], [1, 1]), plan([1, 0], [1, 1])

    def moved(speeds: Any = (1.0, 1.0), nodes: int = 1, **options: Any) -> bool:
        problem = Problem(loads, Cluster.from_speeds(speeds, 1, nodes), **options)
        found = relabel(problem, current, target)
        return bool((found.slots != current.slots).any())

    assert not moved()
    assert moved(speeds=(1.0, 2.0))  # expert 0 would be too slow on rank 0
    assert moved(constraints=[Pin(0, 1)])
    assert moved(constraints=[Forbid(0, 0)])
    assert moved(nodes=2, constraints=[NodeGroups(2)])
    assert moved(base_load=[1.0, 0.0])
    assert moved(routing="sglang-static")
    assert moved(routing="ascend")
    assert moved(constraints=[TokenCapacity([3.0, 5.0])])


@given(st.data())
def test_arranging_slots_changes_no_price_under_engines_rules(data: st.DataObject) -> None:
    tiny = data.draw(tiny_problems(routing="even", max_ranks=4, base=False))
    rule = data.draw(st.sampled_from(["sglang-static", "ascend", "even"]))
    tiny = replace(tiny, routing=rule)
    current, target = (data.draw(legal_plans(tiny)) for _ in range(2))
    price = evaluate(tiny, target).objective
    for found in (align(current, target), relabel(tiny, current, target)):
        assert evaluate(tiny, found).objective <= price * (1 + 1e-9)
    executed(current, target, buffer=1)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match="two plans of one shape: the current one has 2 experts"):
        migrate(plan([0, 1], [1, 1]), plan([0, 1, 2, 0], [2, 2]), expert_bytes=1)
    with pytest.raises(PlanError, match=r"slots per rank"):
        align(plan([0, 1, 0], [1, 2]), plan([0, 1, 0], [2, 1]))
    same = plan([0, 1], [1, 1])
    for options, words in (
        ({"engine": "trt"}, "Engine must be one of vllm, sglang"),
        ({"chunk": 2}, "Chunks are SGLang's"),
        ({"buffer": 0}, "buffer must be a whole number from 1, got 0"),
        ({"nodes": [0]}, "needs 2 nodes, got 1"),
        ({"expert_bytes": [1, 2]}, "needs 1 expert bytes, got 2"),
        ({"expert_bytes": 0}, "Expert bytes"),
    ):
        with pytest.raises(ProblemError, match=words):
            migrate(same, same, **({"expert_bytes": 1} | options))
    problem = Problem(LoadHistogram(tokens=[[[1.0, 1.0]]]), Cluster.from_speeds([1, 1], 1))
    with pytest.raises(ProblemError, match="tolerance must be a finite number"):
        relabel(problem, same, same, float("nan"))
