"""Benchmark of our search and bounds against CP-SAT on the same formulation, one layer each."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeplace.bench_case import NEVER, REPORT_SEEDS, Row
from moeplace.instances import generate, read_instance
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve

#: Seconds for CP-SAT.
SECONDS = 10.0
#: Experts, slots, ranks; routing; seconds of ours.
CASES: tuple[tuple[tuple[int, int, int], str, float], ...] = (
    ((128, 128, 8), "even", 0.5),
    ((256, 256, 32), "even", 0.5),
    ((256, 288, 32), "even", 0.5),
    ((256, 320, 64), "even", 1.0),
    ((256, 288, 32), "weighted", 0.1),
)


def _problem(shape: tuple[int, int, int], routing: Any, seed: int) -> Problem:
    return replace(generate((1, *shape), seed).aggregate(), routing=routing)


def _gap(results: list[Result]) -> str:
    """Median over seeds; a run that found no plan is above all others."""
    gaps = [float("inf") if each.evaluation is None else each.gap for each in results]
    median = statistics.median(gaps)
    return "no plan" if median == float("inf") else f"{median:.1e}"


def solvers(instances: Path) -> Iterator[Row]:
    """One layer each: `auto`, and CP-SAT with 10 s, from nothing and from our plan.

    Gaps are medians of five seeds, over the best bound known to each run: ours, and what CP-SAT
    claims. `its bound`: the part of the fluid bound that CP-SAT proves by itself from nothing.
    The last row: small instances proven optimal by `auto`, and the slowest of them.
    """
    for shape, routing, seconds in CASES:
        problems = [_problem(shape, routing, seed) for seed in REPORT_SEEDS]
        ours = [solve(each, time_limit=seconds, gap=NEVER) for each in problems]
        cold, warm = (
            [
                solve(each, "cp-sat", time_limit=SECONDS, gap=NEVER, warm_start=start)
                for each in problems
            ]
            for start in ("none", "auto")
        )
        claims = [
            max((claim.value for claim in each.bound.claims), default=0.0) / one.total(one.fluid)
            for each, one in zip(cold, problems, strict=True)
        ]
        experts, slots, ranks = shape
        yield {
            "case": f"{experts} / {slots} / {ranks} {routing}",
            "limit of auto": f"{seconds} s",
            "gap of auto": _gap(ours),
            "CP-SAT from nothing": _gap(cold),
            "its bound": f"{statistics.median(claims):.4f}",
            "CP-SAT from our plan": _gap(warm),
        }
    slowest, proven, number = 0.0, 0, 0
    for path in sorted((instances / "small").glob("*.json")):
        one = read_instance(path)
        began = time.perf_counter()
        found = solve(one, time_limit=5.0, gap=0.0)
        slowest = max(slowest, time.perf_counter() - began)
        proven += found.status in ("optimal", "infeasible")
        number += 1
    yield {
        "case": f"small: {proven} of {number} proven, the slowest in {slowest:.2f} s",
    }
