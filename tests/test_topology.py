import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace import topology
from moeplace.constraints import MaxOffNode
from moeplace.dispatch import FIXED, shares, sources
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.feasible import least_off_node
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance, write_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.solve import solve
from moeplace.topology import rank_plans, trace_traffic, traffic
from tests.strategies import legal_plans, plan, problem, tiny_problems


def on_nodes(one: Problem, nodes: Any) -> Problem:
    return replace(one, cluster=replace(one.cluster, nodes=nodes))


@st.composite
def spread_problems(draw: st.DrawFn, windows: int = 2) -> Problem:
    routing = draw(st.sampled_from(["even", "weighted", "sglang-lp", *FIXED]))
    one = draw(tiny_problems(routing=routing, max_ranks=6, max_windows=windows))
    nodes = st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks)
    return on_nodes(one, draw(nodes))


def slots_of(one: Problem, placed: Plan, expert: int, source: int) -> dict[int, float]:
    """Probability of each slot of layer 0 for a token of a source rank; the rules told again."""
    nodes = np.asarray(one.cluster.nodes)
    found = np.flatnonzero(placed.slots[0] == expert).tolist()
    rank = placed.rank_of_slot
    if one.routing == "ascend":
        return {found[source % len(found)]: 1.0}
    if one.routing == "sglang-static":
        own = [s for s in found if rank[s] == source]
        near = [s for s in found if nodes[rank[s]] == nodes[source]]
        if own or len(found) > len(near) > 0:
            return {(own or near)[0]: 1.0}
        return dict.fromkeys(found, 1 / len(found))
    share = shares(one, placed)
    share = share if share.ndim == 2 else share[0]
    return {s: share[0, s] for s in found}


@given(data=st.data())
def test_traffic_is_what_every_source_rank_sends_away(data: st.DataObject) -> None:
    one = data.draw(spread_problems(windows=1))
    placed = data.draw(legal_plans(one))
    nodes, rank = np.asarray(one.cluster.nodes), placed.rank_of_slot
    off_rank = off_node = 0.0
    for expert in range(one.experts):
        for source in range(one.ranks):
            for slot, chance in slots_of(one, placed, expert, source).items():
                copies = chance * one.tokens[0, 0, expert] / one.ranks
                off_rank += copies * (rank[slot] != source)
                off_node += copies * (nodes[rank[slot]] != nodes[source])
    total = max(one.tokens[0, 0].sum(), 1e-300)
    k = min(3, one.experts)
    found = traffic(one, placed, top_k=k)
    assert found.off_rank[0, 0] == pytest.approx(k * off_rank / total, abs=1e-9)
    assert found.off_node[0, 0] == pytest.approx(k * off_node / total, abs=1e-9)


@given(data=st.data())
def test_a_trace_crosses_once_to_each_node(data: st.DataObject) -> None:
    one = data.draw(spread_problems(windows=1))
    placed = data.draw(legal_plans(one))
    k = data.draw(st.integers(1, min(one.experts, 3)))
    tokens = data.draw(st.integers(1, 8))
    draws = [data.draw(st.permutations(range(one.experts))) for _ in range(tokens)]
    trace = np.array([[row[:k]] for row in draws])
    nodes, rank = np.asarray(one.cluster.nodes), placed.rank_of_slot
    off_rank = off_node = 0.0
    for token, (chosen,) in enumerate(trace.tolist()):
        source = token % one.ranks
        missed = dict.fromkeys(set(nodes.tolist()) - {int(nodes[source])}, 1.0)
        for expert in chosen:
            used = slots_of(one, placed, expert, source)
            off_rank += sum(p for slot, p in used.items() if rank[slot] != source)
            for node in missed:
                missed[node] *= 1 - sum(p for slot, p in used.items() if nodes[rank[slot]] == node)
        off_node += sum(1 - chance for chance in missed.values())
    found = trace_traffic(one, placed, trace)
    assert found.off_rank[0, 0] == pytest.approx(off_rank / tokens, abs=1e-9)
    assert found.off_node[0, 0] == pytest.approx(off_node / tokens, abs=1e-9)
    assert found.copies == k


@given(data=st.data())
def test_a_node_is_crossed_to_no_more_than_a_rank(data: st.DataObject) -> None:
    one = data.draw(spread_problems())
    found = traffic(one, data.draw(legal_plans(one)))
    assert (found.off_node <= found.off_rank + 1e-12).all()
    assert (found.off_rank <= 1).all()
    assert (found.off_node >= 0).all()


def test_bytes_count_both_ways_and_all_layers() -> None:
    one = problem([[1, 1], [1, 1]], [1, 1], [1, 1], layer_weight=[1, 3])
    placed = plan([[0, 1], [1, 0]], [1, 1])
    found = traffic(on_nodes(one, [0, 1]), placed, top_k=2)
    assert found.off_rank.tolist() == [[1, 1]]
    assert found.bytes_per_token(100) == (4 * 400, 4 * 400)
    assert found.bytes_per_token(100, dispatch_bytes=1)[1] == 4 * 300
    assert traffic(one, placed).bytes_per_token(100)[1] == 0  # one node
    for top_k in (0.0, one.experts + 0.5, float("nan"), float("inf")):
        with pytest.raises(ProblemError, match=rf"at most the {one.experts} experts of a layer"):
            traffic(one, placed, top_k)
    with pytest.raises(ProblemError, match="hidden size must be above 0"):
        found.bytes_per_token(0)


def test_hot_experts_everywhere_win_where_tokens_may_stay() -> None:
    even = generate((2, 64, 96, 8), 0, speeds="equal").aggregate()
    even = on_nodes(even, [0, 0, 1, 1, 2, 2, 3, 3])
    for routing, wins in (("even", False), ("sglang-static", True)):
        one = replace(even, routing=routing)  # type: ignore[arg-type]
        local, fast = POLICIES["top_k"](one), solve(one, work_limit=400_000).plan
        assert evaluate(one, local).objective > evaluate(one, fast).objective
        off = [traffic(one, each).off_node.mean() for each in (local, fast)]
        assert bool(off[0] < 0.9 * off[1]) == wins
        for price, best in ((0.0, fast), (1e-3, local if wins else fast)):
            ranked = rank_plans(
                one, [local, fast], alpha=0, beta=price, hidden=100, tokens=125_000, top_k=8
            )
            assert ranked[0][1] is best


class TestMaxOffNode:
    def test_plans_that_send_too_much_away_break_it(self) -> None:
        one = problem([1, 1], [1, 1], [1, 1], constraints=[MaxOffNode(0.4)])
        placed = plan([0, 1], [1, 1])
        assert evaluate(one, placed).legal  # one node
        priced = evaluate(on_nodes(one, [0, 1]), placed)
        assert priced.off_node_excess == pytest.approx(np.array([[0.1]]))
        assert evaluate(replace(one, constraints=[]), placed).off_node_excess is None
        assert priced.violations == (
            "layer 0: 0.5 of the copies in window 0 leave their node, at most 0.4 may",
        )

    def test_no_illegal_plan_is_offered(self) -> None:
        one = generate((2, 16, 32, 4), 0).aggregate()
        cluster = Cluster.from_speeds(one.cluster.speeds, 8, 4, "relative")
        static = replace(one, cluster=cluster, routing="sglang-static")
        limit = traffic(static, POLICIES["top_k"](static)).off_node.max()
        held = solve(replace(static, constraints=[MaxOffNode(float(limit))]), work_limit=50_000)
        assert held.evaluation is not None
        assert held.evaluation.legal
        none = solve(replace(static, constraints=[MaxOffNode(0.01)]), work_limit=50_000)
        assert none.status == "infeasible"
        assert "leave their node whatever the plan" in (none.reason or "")

    def test_traffic_is_computed_once_for_each_price(self, monkeypatch: Any) -> None:
        """Not again where the search asks how far a plan is from what may be."""
        one = generate((2, 16, 32, 4), 0).aggregate()
        cluster = Cluster.from_speeds(one.cluster.speeds, 8, 4, "relative")
        static = replace(one, cluster=cluster, routing="sglang-static")
        evaluating = sys.modules["moeplace.evaluate"]  # the package has a function of that name
        counts = {"traffic": 0, "prices": 0}
        whole, price = topology.traffic, evaluating._violations

        def counted(*arguments: Any) -> Any:
            counts["traffic"] += 1
            return whole(*arguments)

        def priced(*arguments: Any) -> Any:
            counts["prices"] += 1
            return price(*arguments)

        monkeypatch.setattr(topology, "traffic", counted)
        monkeypatch.setattr(evaluating, "_violations", priced)
        limited = replace(static, constraints=[MaxOffNode(0.72)])
        assert solve(limited, work_limit=50_000).evaluation is not None
        assert 3 < counts["traffic"] == counts["prices"]

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, True, "half", float("nan")])
    def test_it_must_be_a_fraction(self, fraction: Any) -> None:
        with pytest.raises(ProblemError, match="MaxOffNode must be a number from 0 to 1"):
            problem([1], [1], [1], constraints=[MaxOffNode(fraction)])

    def test_it_is_kept_in_instance_files(self, tmp_path: Any) -> None:
        one = problem([1], [1], [1], routing="ascend", constraints=[MaxOffNode(0.25)])
        write_instance(one, tmp_path / "one.json")
        assert read_instance(tmp_path / "one.json").digest() == one.digest()


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (np.zeros((2, 1)), "whole numbers"),
        (np.zeros((2, 3, 1), dtype=int), "3 layers"),
        (np.full((2, 1, 1), 5), "names the expert 5"),
        (np.full((2, 1, 1), -1), "names the expert -1"),
    ],
)
def test_traces_must_fit(trace: Any, said: str) -> None:
    one = problem([1, 1], [1, 1], [1, 1])
    with pytest.raises(ProblemError, match=said):
        trace_traffic(one, plan([0, 1], [1, 1]), trace)


def test_shares_of_sources_and_traffic_agree() -> None:
    one = problem([8, 1, 1], [1] * 4, [1] * 4, routing="sglang-static")
    one = on_nodes(one, [0, 0, 1, 1])
    placed = plan([0, 1, 0, 2], [1] * 4)
    assert sources(one, placed).tolist() == [[2, 4, 2, 4]]
    assert traffic(one, placed).off_rank[0, 0] == pytest.approx((8 * 0.5 + 0.75 + 0.75) / 10)
    assert traffic(one, placed).off_node[0, 0] == pytest.approx((0 + 0.5 + 0.5) / 10)


@given(data=st.data())
def test_no_plan_keeps_more_on_its_node_than_can_be(data: st.DataObject) -> None:
    routing = data.draw(st.sampled_from(("even", "weighted", "sglang-lp", *FIXED)))
    one = data.draw(tiny_problems(routing=routing, max_ranks=6))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks))
    one = replace(one, cluster=replace(one.cluster, nodes=nodes))
    placed = data.draw(legal_plans(one))
    assert (traffic(one, placed).off_node >= least_off_node(one) - 1e-9).all()
