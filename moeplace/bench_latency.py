"""Suites of `bench` under latency that is not linear: planes and tables fitted to measurements."""

import csv
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.batches import over_batches
from moeplace.evaluate import evaluate
from moeplace.fit import Fit, fit
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.samples import Samples
from moeplace.search.latency import linear
from moeplace.solve import solve

SEEDS = (100, 101, 102)


def curve(
    instances: Path, model: str = "DeepSeek-V3", system: str = "h100", ep: int = 32
) -> Samples:
    """A measured curve of instances/sources/moe_kernel_latency.csv, one GPU."""
    points = []
    with (instances / "sources" / "moe_kernel_latency.csv").open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if (row["model"], row["system"], int(row["ep_size"])) == (model, system, ep):
                tokens = int(row["num_tokens"]) * int(row["top_k"]) / ep
                activated = min(int(row["experts"]) / ep, tokens)
                points.append((activated, tokens, float(row["latency_ms"]) * 1e-3))
    activated, tokens, seconds = np.array(points).T
    gpu = np.zeros(tokens.size, dtype=np.int64)
    return Samples(gpu=gpu, activated=activated, tokens=tokens, seconds=seconds)


def per_pass(
    found: Fit, shape: str, seed: int, assignments: float, routing: Any = "even"
) -> Problem:
    """Synthetic loads, so many assignments a pass and layer, on ranks of the fitted kind.

    Ranks differ in compute as `generate`'s do. A table's ranks are slower all over by it.
    """
    made = generate(shape, seed, routing=routing)
    tokens = made.loads.aggregate().tokens
    slowness = 1 / made.cluster.speeds
    slots = made.cluster.slots
    if found.table is not None:
        times = slowness[:, None] * found.table.seconds
        cluster = Cluster.from_table(found.table.tokens[0], times, slots)
    else:
        assert found.planes is not None
        t, w, c = found.planes.T
        cluster = Cluster.from_planes(t, w, c, slowness, slots)
    passes = tokens.sum() / tokens.shape[1] / assignments
    return Problem(LoadHistogram(tokens=tokens, passes=passes), cluster, routing=routing)


def latency(instances: Path) -> Iterator[dict[str, Any]]:
    """Gap at 1 s under the measured latency of DeepSeek-V3 on H100, against planning by speeds."""
    samples = curve(instances)
    fits = {"planes": fit(samples, "planes"), "table": fit(samples, "table")}
    cases = [
        *(("A", "planes", "even", n) for n in (512, 2048, 8192, 65_536, 524_288)),
        *(("A", "planes", "weighted", n) for n in (2048, 524_288)),
        *(("A", "table", "even", n) for n in (2048, 65_536, 524_288)),
        *(("C", "planes", "even", n) for n in (2048, 524_288)),
        *(("B", "planes", "even", n) for n in (2048, 524_288)),
    ]
    for shape, model, routing, assignments in cases:
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            problem = per_pass(fits[model], shape, seed, assignments, routing)
            ours = solve(problem, time_limit=1.0)
            blind = solve(linear(problem), time_limit=1.0).plan
            for name, value in (
                ("gap", ours.gap),
                ("gap by speeds", evaluate(problem, blind).objective / ours.lower_bound - 1),
                ("replicas a layer", float(ours.plan.replicas.sum(axis=1).mean())),
            ):
                found.setdefault(name, []).append(value)
        middle = {name: statistics.median(values) for name, values in found.items()}
        yield {
            "shape": shape, "model": model, "routing": routing,
            "assignments a pass": f"{assignments:,}",
            "gap": f"{100 * middle['gap']:.2f} %",
            "worst": f"{100 * max(found['gap']):.2f} %",
            "gap by speeds": f"{100 * middle['gap by speeds']:.2f} %",
            "replicas a layer": f"{middle['replicas a layer']:.1f}",
        }  # fmt: skip


def decode_prefill(instances: Path) -> Iterator[dict[str, Any]]:
    """One instance (shape A, seed 100), plans for decode and for prefill, each in both."""
    found = fit(curve(instances), "planes")
    regimes = {"decode": 2048, "prefill": 524_288}
    problems = {name: per_pass(found, "A", 100, n) for name, n in regimes.items()}
    plans = {name: solve(one, time_limit=5.0).plan for name, one in problems.items()}
    plans["both, half each"] = solve(_both(problems), time_limit=10.0).plan
    plans["tokens by speeds"] = solve(linear(problems["prefill"]), time_limit=1.0).plan
    plans["tokens, equal speeds"] = solve(_equal(linear(problems["prefill"])), time_limit=1.0).plan
    own = {name: evaluate(one, plans[name]).objective for name, one in problems.items()}
    for planned, plan in plans.items():
        row: dict[str, Any] = {"planned for": planned}
        row["replicas a layer"] = f"{plan.replicas.sum(axis=1).mean():.1f}"
        for name, one in problems.items():
            cost = evaluate(one, plan).objective
            row[f"{name}, ms a step"] = f"{1e3 * cost:.3f}"
            row[f"{name}, loss"] = f"{100 * (cost / own[name] - 1):.2f} %"
            random = over_batches(one, plan, 32).objective
            row[f"{name}, E[max]"] = f"{100 * (random / cost - 1):+.2f} %"
        yield row


def _both(problems: dict[str, Problem]) -> Problem:
    """Decode and prefill as two windows of equal step time, by their fluid bounds."""
    one, two = problems.values()
    tokens = np.concatenate([one.tokens, two.tokens])
    weight = [1 / one.total(one.fluid), 1 / two.total(two.fluid)]
    loads = LoadHistogram(tokens=tokens, passes=np.ones(2))
    return Problem(loads, one.cluster, window_weight=weight)


def _equal(problem: Problem) -> Problem:
    return replace(problem, cluster=replace(problem.cluster, speeds=np.ones(problem.ranks)))
