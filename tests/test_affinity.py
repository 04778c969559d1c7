from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.affinity import coactivation, gather
from moeplace.constraints import MaxMoves, Pin
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.solve import solve
from moeplace.topology import trace_traffic
from tests.strategies import legal_plans, plan, problem, tiny_problems


def traced(clusters: int | None, tokens: int = 4000, experts: int = 64, k: int = 4) -> Any:
    """A trace [tokens, 2, k]: at random, or 3 of 4 choices within one of the shuffled clusters."""
    draw = np.random.default_rng(5)
    chosen = np.empty((tokens, 2, k), dtype=np.int64)
    for layer in range(2):
        score = draw.random((tokens, experts)) ** (1 / draw.uniform(0.5, 1.5, experts))
        if clusters is not None:
            member = draw.permutation(np.arange(experts) % clusters)
            score += 0.5 * (member == draw.integers(clusters, size=tokens)[:, None])
        chosen[:, layer] = np.argsort(-score, axis=1)[:, :k]
    return chosen


def placed(trace: Any, **options: Any) -> Problem:
    counts = [np.bincount(layer.ravel(), minlength=64) for layer in trace.swapaxes(0, 1)]
    cluster = Cluster.from_speeds(np.linspace(0.95, 1.05, 8), 9, 4, "relative")
    return Problem(LoadHistogram(tokens=np.array(counts, dtype=float)), cluster, **options)


@pytest.mark.parametrize(("clusters", "least", "most"), [(8, 0.25, 0.9), (None, -0.03, 0.03)])
@pytest.mark.parametrize("routing", ["even", "sglang-static"])
def test_gathering_pays_where_experts_fire_together_and_only_there(
    clusters: int | None, least: float, most: float, routing: Any
) -> None:
    trace = traced(clusters)
    one = placed(trace, routing=routing)
    before = solve(one, work_limit=200_000, gap=1e-3).plan
    after = gather(one, before, coactivation(one, trace[:2000]), gap=0.01)
    held_out = trace[2000:]
    off = [trace_traffic(one, each, held_out).off_node.sum() for each in (before, after)]
    assert least < 1 - off[1] / off[0] < most
    slowest = [evaluate(one, each).makespan for each in (before, after)]
    assert (slowest[1] <= slowest[0] * 1.01 * (1 + 1e-12)).all()


def test_pairs_are_counted_token_by_token() -> None:
    one = problem([[1, 1, 1, 1]] * 2, [1, 1], [2, 2])
    trace = np.array([[[0, 1, 2], [3, 2, 1]], [[1, 0, 3], [0, 1, 2]]])
    count = np.zeros((2, 4, 4))
    for layers in trace.tolist():
        for layer, chosen in enumerate(layers):
            for e in chosen:
                for f in chosen:
                    count[layer, e, f] += e != f
    assert np.array_equal(coactivation(one, trace), count)


@given(data=st.data())
def test_no_layer_takes_longer_than_the_gap_allows(data: st.DataObject) -> None:
    one = data.draw(tiny_problems(max_ranks=4, max_layers=2, max_windows=2, constraints=True))
    nodes = st.lists(st.integers(0, 2), min_size=one.ranks, max_size=one.ranks)
    one = replace(one, cluster=replace(one.cluster, nodes=data.draw(nodes)))
    before = data.draw(legal_plans(one))
    pairs = np.random.default_rng(0).integers(0, 5, (one.layers, one.experts, one.experts))
    together = (pairs + pairs.swapaxes(1, 2)).astype(float)
    gap = data.draw(st.sampled_from([0.0, 0.3]))
    after = gather(one, before, together, gap=gap)
    old, new = evaluate(one, before), evaluate(one, after)
    assert (new.makespan <= old.makespan * (1 + gap) * (1 + 1e-9)).all()
    assert new.legal or not old.legal
    assert np.array_equal(after.replicas, before.replicas)


def test_what_may_not_move_stays() -> None:
    together = np.zeros((1, 4, 4))
    together[0, [0, 2], [2, 0]] = together[0, [1, 3], [3, 1]] = 1
    one = problem([1, 1, 1, 1], [1, 1], [2, 2])
    one = replace(one, cluster=replace(one.cluster, nodes=[0, 1]))
    before = plan([0, 1, 2, 3], [2, 2])
    assert sorted(gather(one, before, together).slots[0, :2].tolist()) in ([0, 2], [1, 3])
    for rule in (
        [Pin(e, e // 2) for e in range(4)],
        [MaxMoves(before, per_layer=0)],
    ):
        kept = gather(replace(one, constraints=rule), before, together)
        assert np.array_equal(kept.slots, before.slots)
    with pytest.raises(ProblemError, match=r"must have the shape \(1, 4, 4\), got \(4, 4\)"):
        gather(one, before, together[0])
    with pytest.raises(ProblemError, match="gap must be at least 0"):
        gather(one, before, together, gap=-1)
