"""The oracle itself: hand-computed optima, every plan tried naively, and the linear program."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from moeplace.constraints import Forbid, MaxMoves, NodeGroups, Pin
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from tests.brute_force import optimum, split_optimum


def make(loads: Any, speeds: list[float], slots: Any, nodes: Any = 1, **options: Any) -> Problem:
    cluster = Cluster.from_speeds(speeds, slots, nodes, speed_unit="relative")
    return Problem(LoadHistogram(tokens=loads), cluster, **options)


def moving(loads: Any, **limits: Any) -> Problem:
    """Two ranks with three slots: experts 0 and 1 on the first, 2 and 3 on the second."""
    current = Plan(slots=[[0, 1, -1, 2, 3, -1]] * len(loads), rank_slots=[3, 3], experts=4)
    return make(loads, [1, 1], 3, constraints=[MaxMoves(current, **limits)])


HAND: dict[str, tuple[Problem, float]] = {
    "one rank": (make([[5, 3, 2]], [0.5], 3), 20),
    "two pairs": (make([[7, 5, 4, 2]], [1, 1], 2), 9),
    "a copy halves": (make([[9, 0, 0, 3, 0]], [1, 1], 3), 7.5),
    "shares even out": (make([[9, 0, 0, 3, 0]], [1, 1], 3, routing="weighted"), 6),
    "slots stay empty": (make([[8, 1]], [1, 0.1], 2), 8.5),
    "rank without slots": (make([[6, 4, 2, 2]], [1, 1, 9], [3, 2, 0]), 7),
    "no tokens": (make([[0, 0]], [1, 2], 1), 0),
    "base load alone": (make([[0, 0]], [1, 2], 1, base_load=[3, 8]), 4),
    "base load on a rank without slots": (make([[1]], [1, 1], [1, 0], base_load=[0, 5]), 5),
    "base load moves the hot expert": (make([[6, 1]], [1, 1], 1, base_load=[4, 0]), 6),
    "pinned to the slow rank": (make([[6, 1]], [1, 0.5], 1, constraints=[Pin(0, 1)]), 12),
    "forbidden on the fast rank": (make([[6, 1]], [1, 0.5], 2, constraints=[Forbid(0, 0)]), 12),
    "pin beside a copy": (make([[6, 0]], [1, 1], 2, constraints=[Pin(0, 1)]), 3),
    "nowhere to go": (
        make([[6, 1]], [1, 1], 1, constraints=[Forbid(0, 0), Forbid(0, 1)]),
        math.inf,
    ),
    "mean": (make([[[4, 0]], [[0, 2]]], [1, 1], 1), 3),
    "weighted mean": (make([[[4, 0]], [[0, 2]]], [1, 1], 1, window_weight=[1, 3]), 2.5),
    "worst": (make([[[4, 0]], [[0, 2]]], [1, 1], 1, objective="worst"), 4),
    "worst of the sum, not sum of worsts": (
        make([[[2, 0], [1, 0]], [[1, 0], [2, 0]]], [1], 2, objective="worst"),
        3,
    ),
    "layers weighed against each other": (
        make(
            [[[0, 1, 5, 8], [0, 6, 7, 7]], [[8, 1, 5, 8], [3, 1, 4, 0]]],
            [1, 1],
            2,
            objective="worst",
        ),
        21,
    ),
    "node group": (
        make([[6, 2, 1, 1]], [1, 1], 3, nodes=2, constraints=[NodeGroups([0, 0, 1, 2])]),
        8,
    ),
    "no moves": (moving([[6, 4, 2, 1]], total=0), 10),
    "one copy": (moving([[6, 4, 2, 1]], total=1), 7),
    "two copies": (moving([[6, 4, 2, 1]], total=2), 6.5),
    "one copy a layer": (moving([[6, 4, 2, 1], [6, 4, 2, 1]], per_layer=1), 14),
    "one copy in all": (moving([[6, 4, 2, 1], [6, 4, 2, 1]], total=1, per_layer=1), 17),
    "layers with weights": (make([[3, 1], [5, 1]], [1, 1], 1, layer_weight=[2, 0.5]), 8.5),
}


@pytest.mark.parametrize(("problem", "value"), HAND.values(), ids=HAND)
def test_hand_computed_optima(problem: Problem, value: float) -> None:
    assert optimum(problem) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("routing", "value"), [("even", 590 / 3), ("weighted", 1450 / 8)])
def test_flashlb_toy(routing: Any, value: float) -> None:
    problem = make([[600, 560, 120, 120, 20, 10, 10, 10]], [1] * 8, 2, routing=routing)
    assert optimum(problem) == pytest.approx(value, rel=1e-12)


def test_passes_make_it_time_per_pass() -> None:
    loads = LoadHistogram(tokens=[[[600, 400]]], passes=2)
    problem = Problem(loads, Cluster.from_speeds([100.0, 100.0], 1))
    assert optimum(problem) == pytest.approx(3.0, rel=1e-12)


def placements(problem: Problem) -> Iterator[list[int]]:
    """Rank sets of every expert in one layer, by plain enumeration."""
    ranks, slots = problem.ranks, problem.cluster.slots
    for masks in product(range(1, 1 << ranks), repeat=problem.experts):
        if all(sum(m >> g & 1 for m in masks) <= slots[g] for g in range(ranks)):
            yield list(masks)


def plan_of(problem: Problem, layers: list[list[int]]) -> Plan:
    rows = []
    for masks in layers:
        row: list[int] = []
        for g, size in enumerate(problem.cluster.slots.tolist()):
            held = [e for e, m in enumerate(masks) if m >> g & 1]
            row += held + [EMPTY] * (size - len(held))
        rows.append(row)
    return Plan(slots=rows, rank_slots=problem.cluster.slots, experts=problem.experts)


def tiny(seed: int, layers: int, experts: int, ranks: int, **options: Any) -> Problem:
    random = np.random.default_rng(seed)
    windows = int(random.integers(1, 4))
    slots = random.integers(1, experts + 1, ranks)
    slots[0] = max(slots[0], experts - int(slots[1:].sum()), 1)
    return make(
        random.integers(0, 20, (windows, layers, experts)),
        random.choice([0.3, 0.9, 1.0], ranks).tolist(),
        slots,
        base_load=random.integers(0, 8, (windows, layers, ranks)) * int(random.integers(2)),
        layer_weight=random.integers(1, 3, layers),
        window_weight=random.integers(1, 4, windows),
        **options,
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_even_agrees_with_every_plan_priced_by_evaluate(seed: int, objective: Any) -> None:
    shape = [(1, 4, 2), (1, 3, 3), (2, 3, 2), (2, 2, 2)][seed % 4]
    layers, experts, ranks = shape
    rules = [[Forbid(0, 0)], [Pin(1, 1, 0)], [NodeGroups(groups=[0, 1] + [0] * (experts - 2))]]
    nodes = [0] + [1] * (ranks - 1)
    given = {"objective": objective, "constraints": rules[seed % 3], "nodes": nodes}
    problem = tiny(seed, layers, experts, ranks, **given)
    if seed % 2:
        current = plan_of(problem, [next(placements(problem))] * layers)
        budget = MaxMoves(current, total=seed // 2, per_layer=2 if seed % 4 == 1 else None)
        problem = replace(problem, constraints=[*problem.constraints, budget])
    prices = [math.inf]
    for choice in product(list(placements(problem)), repeat=layers):
        found = evaluate(problem, plan_of(problem, list(choice)))
        if found.legal:
            prices.append(found.objective)
    assert optimum(problem) == pytest.approx(min(prices), rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_weighted_agrees_with_a_linear_program_for_every_placement(seed: int) -> None:
    experts, ranks = [(3, 2), (4, 2), (2, 3), (3, 3)][seed % 4]
    problem = tiny(seed, 1, experts, ranks, routing="weighted")
    least = math.inf
    for masks in placements(problem):
        times = np.array([split_optimum(problem, 0, masks)])
        least = min(least, problem.total(times.T))
    assert optimum(problem) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_relations_between_problems(seed: int) -> None:
    problem = tiny(seed, 2, 4, 3)
    even = optimum(problem)
    weighted = optimum(replace(problem, routing="weighted"))
    assert weighted <= even * (1 + 1e-12)
    assert problem.total(problem.fluid) <= weighted * (1 + 1e-12)
    assert even <= optimum(replace(problem, objective="worst")) * (1 + 1e-12)
    more = Cluster(
        speeds=problem.cluster.speeds, slots=problem.cluster.slots + 1, speed_unit="relative"
    )
    assert optimum(replace(problem, cluster=more)) <= even * (1 + 1e-12)
