"""Benchmark of problems whose bounds were weak: one layer, and rules that bind."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves, NodeGroups, TokenCapacity
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.solve import solve

SHAPE, SEEDS, SECONDS = (1, 256, 288, 32), (100, 101, 102, 103, 104), 20.0


def _drifted(moves: int) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        now = solve(generate(SHAPE, seed).aggregate(), work_limit=4_000_000, gap=1e-5).plan
        later = generate(SHAPE, seed, epoch=1).aggregate()
        return replace(later, constraints=[MaxMoves(now, per_layer=moves)])

    return make


def _capacity(seed: int) -> Problem:
    problem = generate(SHAPE, seed).aggregate()
    mean = float(problem.tokens.sum()) / problem.ranks
    return replace(problem, constraints=[TokenCapacity(1.002 * mean)])


def _nodes(seed: int) -> Problem:
    problem = generate(SHAPE, seed).aggregate()
    cluster = replace(problem.cluster, nodes=np.arange(32) // 8)
    return replace(problem, cluster=cluster, constraints=[NodeGroups(8)])


def _worst(seed: int) -> Problem:
    now, later = (generate(SHAPE, seed, epoch=epoch).aggregate() for epoch in (0, 2))
    loads = LoadHistogram(tokens=np.concatenate([now.loads.tokens, later.loads.tokens]))
    return Problem(loads, now.cluster, objective="worst")


def _few_spares(seed: int) -> Problem:
    return generate((1, 256, 258, 32), seed).aggregate()


FAMILIES: dict[str, Callable[[int], Problem]] = {
    "2 moves": _drifted(2),
    "4 moves": _drifted(4),
    "8 moves": _drifted(8),
    "groups on 4 nodes": _nodes,
    "worst of two windows": _worst,
    "token capacity 1.002 x mean": _capacity,
    "2 spare slots": _few_spares,
}


def hard(instances: Path) -> Iterator[dict[str, Any]]:
    """One layer of 256 x 288 / 32 with rules that bind, 20 s each, seeds 100 to 104.

    `old bound`: the arguments that know neither budgets of moves of two and more nor all ways to
    share groups out. `closed`: how much of the distance from it to the plan the new bound takes.
    """
    for name, make in FAMILIES.items():
        for seed in SEEDS:
            problem = make(seed)
            fluid = problem.total(problem.fluid)
            rest = [rule for rule in problem.constraints if not isinstance(rule, MaxMoves)]
            old = lower_bound(replace(problem, constraints=rest), 0.0).total
            found = solve(problem, time_limit=SECONDS, gap=1e-7)
            open_before = found.objective - old
            yield {
                "family": name,
                "seed": seed,
                "plan / fluid": f"{found.objective / fluid:.5f}",
                "old bound": f"{old / fluid:.5f}",
                "bound": f"{found.bound.recomputed / fluid:.5f}",
                "gap": f"{found.gap:.2e}",
                "closed": f"{(found.lower_bound - old) / open_before:.0%}",
            }
