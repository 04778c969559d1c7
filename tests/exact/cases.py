"""Tiny problems with every feature, and what the exact tests hold them against."""

from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import strategies as st

from moeplace._check import FloatArray, IntArray
from moeplace.constraints import MaxMoves, NodeGroups, TokenCapacity
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares
from tests.brute_force import split_optimum
from tests.strategies import legal_plans, tiny_problems

#: What a problem may have besides base load, unequal slots and ranks without slots.
FEATURES = ("plain", "rules", "limits", "moves", "groups", "windows", "all")


@st.composite
def featured(draw: st.DrawFn, feature: str, max_experts: int = 4) -> Problem:
    """A tiny problem with one feature, or with all of them together."""
    every = feature == "all"
    one = draw(
        tiny_problems(
            max_experts=max_experts,
            max_layers=2,
            max_windows=3 if feature == "windows" else 1 + every,
            constraints=feature == "rules" or every,
            limits=feature == "limits" or every,
        )
    )
    rules = list(one.constraints)
    if feature == "moves" or (every and draw(st.booleans())):
        count = st.one_of(st.none(), st.integers(0, 3))
        current = draw(legal_plans(one))
        rules.append(MaxMoves(current, per_layer=draw(count), total=draw(count)))
    if feature == "groups" or (every and draw(st.booleans())):
        lie = st.lists(st.integers(0, one.experts - 1), min_size=one.experts, max_size=one.experts)
        node = st.lists(st.integers(0, 1), min_size=one.ranks, max_size=one.ranks)
        one = replace(one, cluster=replace(one.cluster, nodes=draw(node)))
        rules.append(NodeGroups(np.array(draw(lie))))
    return replace(one, constraints=rules)


@st.composite
def with_planes(draw: st.DrawFn, routing: str) -> Problem:
    """A tiny problem of one layer whose latency is a maximum of planes."""
    experts, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    windows, planes = draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def numbers(count: int, values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=count, max_size=count))

    small = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    counts = st.integers(0, 6).map(float)
    cluster = Cluster.from_planes(
        numbers(planes, small),
        numbers(planes, small),
        [1.0, *numbers(planes - 1, st.sampled_from([0.0, 0.2, 2.0]))],
        numbers(ranks, st.sampled_from([0.7, 1.0, 1.5])),
        [experts, *draw(st.lists(st.integers(0, 3), min_size=ranks - 1, max_size=ranks - 1))],
    )
    tokens = np.reshape(numbers(windows * experts, counts), (windows, 1, experts))
    passes = np.array(draw(st.lists(st.sampled_from([1, 3]), min_size=windows, max_size=windows)))
    return Problem(
        LoadHistogram(tokens=tokens, passes=passes),
        cluster,
        routing=routing,  # type: ignore[arg-type]
        objective=draw(st.sampled_from(["mean", "worst"])),
        base_load=numbers(ranks, counts) if draw(st.booleans()) else None,
    )


def planes_optimum(one: Problem) -> float:
    """Least objective of one layer under even routing, by `Cluster.seconds` of every placement."""
    masks = np.array(list(product((0, 1), repeat=one.ranks)))[1:]
    best = np.inf
    for chosen in product(range(len(masks)), repeat=one.experts):
        held = masks[list(chosen)]  # [experts, ranks]
        if (held.sum(axis=0) > one.cluster.slots).any():
            continue
        share = held / held.sum(axis=1, keepdims=True)
        each = one.tokens[:, 0, :, None] * share  # [windows, experts, ranks]
        active = -np.expm1(-each).sum(axis=1)
        seconds = one.cluster.seconds(one.base[:, 0] + each.sum(axis=1), active)
        best = min(best, one.total(seconds.max(axis=1, keepdims=True)))
    return best


def plan_of(one: Problem, slots: IntArray) -> Plan:
    """A placement as a plan."""
    return Plan(slots=slots, rank_slots=one.cluster.slots, experts=one.experts)


def price(one: Problem, slots: IntArray) -> float:
    """Objective of a placement at its best shares; it must break no rule."""
    placed = plan_of(one, slots)
    if one.routing == "even":
        priced = evaluate(one, placed)
        assert priced.legal, priced.violations
        return priced.objective
    rest = [rule for rule in one.constraints if not isinstance(rule, TokenCapacity)]
    priced = at_best_shares(replace(one, constraints=rest), placed)
    assert priced.legal, priced.violations
    if np.isinf(one.capacity).all():
        return priced.objective
    times: list[FloatArray] = []
    for row in slots:
        held = np.zeros((one.experts, one.ranks), dtype=np.int64)
        held[row[row >= 0], placed.rank_of_slot[row >= 0]] = 1
        masks = (held << np.arange(one.ranks)).sum(axis=1).tolist()
        times.append(np.array(split_optimum(one, len(times), masks)))
    return one.total(np.array(times).T)
