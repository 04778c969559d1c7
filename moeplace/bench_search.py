"""Suites of `bench` about the search itself: growth, its steps one by one, few spare slots."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.bench_case import NEVER, REPORT_SEEDS, Row
from moeplace.bounds import lower_bound
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.problem import Problem
from moeplace.solve import solve


def growth(instances: Path) -> Iterator[Row]:
    """Layers, experts, slots and ranks, doubled one after the other; each in a fresh process."""
    shapes = [
        (58, 256, 288, 32), (116, 256, 288, 32), (232, 256, 288, 32), (58, 512, 576, 32),
        (58, 1024, 1152, 32), (58, 256, 512, 32), (58, 256, 1024, 32), (58, 256, 320, 64),
        (58, 256, 384, 128), (58, 1024, 2048, 512), (58, 1024, 2048, 1024),
    ]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for shape in shapes:
            yield pool.submit(_grown, shape).result()


def _grown(shape: tuple[int, int, int, int]) -> Row:
    problem = generate(shape, 100).aggregate()
    solve(problem, work_limit=1)
    row: Row = {"layers x experts / slots / ranks": "{} x {} / {} / {}".format(*shape)}
    for limit in (0.0, 0.1, 1.0):
        began = time.perf_counter()
        result = solve(problem, time_limit=limit, gap=NEVER)
        row[f"gap at {limit:g} s"] = f"{result.gap:.1e}"
        row[f"wall at {limit:g} s"] = f"{time.perf_counter() - began:.3f} s"
    began = time.perf_counter()
    result = solve(problem, gap=1e-3)
    row["wall to gap 1e-3, or all steps"] = f"{time.perf_counter() - began:.3f} s ({result.status})"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row["peak memory"] = f"{peak:.0f} MB"
    return row


def ablation(instances: Path) -> Iterator[Row]:
    """The exchange search with one step left out, at equal time."""
    from moeplace.search.improve import KICKS

    variants: list[tuple[str, dict[str, Any]]] = [
        ("all steps", {}),
        ("no pairs", {"pairs": False}),
        ("no kicks", {"kicks": (0, 0, 0)}),
        ("no replica kick", {"kicks": (0, *KICKS[1:])}),
        ("no close-value kick", {"kicks": (KICKS[0], 0, KICKS[2])}),
        ("no random kick", {"kicks": (*KICKS[:2], 0)}),
    ]
    for shape in "ABCD":
        for name, options in variants:
            row: Row = {"shape": shape, "search": name}
            for limit in (0.05, 0.2, 1.0):
                gaps = [_search_gap(shape, seed, limit, options) for seed in REPORT_SEEDS]
                row[f"gap at {limit:g} s"] = f"{statistics.median(gaps):.1e}"
            yield row


def _search_gap(shape: str, seed: int, limit: float, options: dict[str, Any]) -> float:
    """Gap of the bare search: construction, then rounds over all layers until time is up."""
    from moeplace.search.construct import construct
    from moeplace.search.improve import improve
    from moeplace.search.state import State

    problem = generate(shape, seed).aggregate()
    bound = lower_bound(problem).per_layer[0]
    layers = np.arange(problem.layers)
    for _ in range(2):  # the first is to load the kernels
        began = time.perf_counter()
        state = State.of(problem, seed)
        construct(state)
        with ThreadPoolExecutor(1) as pool:
            while time.perf_counter() - began < limit:
                steps = np.full(layers.size, 64 * problem.cluster.total_slots)
                improve(state, layers, steps, bound / state.unit, pool, 1, **options)
    return float((state.makespan * state.unit).sum() / bound.sum() - 1)


def few_spares(instances: Path) -> Iterator[Row]:
    """Weighted routing with fewer spare slots than ranks less one."""
    for shape in "ADC":
        for spares in (16, 8, 4, 2, 0):
            gaps, worst = [], []
            for seed in REPORT_SEEDS[:3]:
                problem = spared(shape, seed, spares)
                result = solve(problem, time_limit=1.0, gap=1e-5)
                gaps.append(result.gap)
                worst.append(float(result.layers.gap.max()))
            yield {
                "shape": shape, "spare slots": spares, "gap": f"{statistics.median(gaps):.1e}",
                "worst layer's gap": f"{max(worst):.1e}",
                "bound / fluid": f"{result.lower_bound / problem.total(problem.fluid):.4f}",
            }  # fmt: skip


def spared(shape: str, seed: int, spares: int) -> Problem:
    """A shape under weighted routing, with so many spare slots."""
    problem = generate(shape, seed).aggregate()
    each, more = divmod(problem.experts + spares, problem.ranks)
    slots = each + (np.arange(problem.ranks) < more)
    cluster = Cluster(speeds=problem.cluster.speeds, slots=slots, speed_unit="relative")
    return replace(problem, cluster=cluster, routing="weighted")
