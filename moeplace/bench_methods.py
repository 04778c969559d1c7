"""Suites of `bench` that compare methods: on every instance, by spread of speeds, by groups."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.bench_case import REPORT_SEEDS, Row, every_other, real_instances
from moeplace.bounds import lower_bound
from moeplace.constraints import NodeGroups
from moeplace.errors import PolicyNotApplicable
from moeplace.evaluate import Evaluation, evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.search.split import resplit
from moeplace.solve import solve


def methods(instances: Path) -> Iterator[Row]:
    """Every method on every real instance and on shapes A to D: issue of quality, not of limits."""
    problems = [(path.stem, read_instance(path)) for path in real_instances(instances)]
    problems += [(f"{s} {v}", generate(s, 100, speeds=v)) for s in "ABCD" for v in ("equal", "het")]
    for name, windows in problems:
        problem = windows.aggregate()
        bound = lower_bound(problem)
        solve(problem, work_limit=1)  # kernels loaded
        POLICIES["eplb"](problem)
        for method in ("contiguous", "eplb", "eplb_lpt", "vibe", "auto"):
            began = time.perf_counter()
            try:
                if method == "auto":
                    plan = solve(problem, time_limit=1.0, gap=1e-5).plan
                else:
                    plan = POLICIES[method](problem)
            except PolicyNotApplicable:
                yield {"instance": name, "method": method, "ratio": "n/a"}
                continue
            wall = time.perf_counter() - began
            on_sum, on_windows = evaluate(problem, plan), evaluate(windows, plan)
            yield {
                "instance": name,
                "method": method,
                "ratio": f"{on_sum.imbalance:.5f}",
                "mean layer": f"{on_sum.ratio.mean():.5f}",
                "worst layer": f"{on_sum.ratio.max():.5f}",
                "bound / fluid": f"{bound.total / problem.total(problem.fluid):.5f}",
                "gap": f"{on_sum.objective / bound.total - 1:.1e}",
                "ratio, mean of windows": f"{on_windows.imbalance:.4f}",
                "wall": f"{wall * 1e3:.1f} ms",
                "illegal": "" if on_sum.legal else f"{plan.duplicates.sum()} duplicates",
            }


def spread(instances: Path) -> Iterator[Row]:
    """What seeing speeds buys: step time of each method over ours, by spread of the speeds."""
    fleets = json.loads((instances / "sources" / "gpu_relative_time.json").read_text())
    speeds: list[tuple[str, Any]] = [(f"{s:.0%}", s) for s in (0.0, 0.02, 0.04, 0.07, 0.13)]
    for fleet, times in fleets["relative_time"].items():
        quantiles = np.quantile(times, (np.arange(32) + 0.5) / 32)
        speeds.append((fleet, np.random.default_rng(0).permutation(1 / quantiles)))
    speeds.append(("het (one rank fixed at 0.85)", "het"))
    for name, given in speeds:
        row: Row = {"speeds (A, even)": name}
        found: dict[str, list[float]] = {}
        for seed in REPORT_SEEDS:
            problem = generate("A", seed, speeds=given).aggregate()
            ours = solve(problem, time_limit=0.2, gap=1e-5)
            found.setdefault("auto ratio", []).append(evaluate(problem, ours.plan).imbalance)
            found.setdefault("max/min speed", []).append(
                problem.cluster.speeds.max() / problem.cluster.speeds.min()
            )
            for method in ("contiguous", "eplb", "vibe", "eplb_lpt"):
                price = evaluate(problem, POLICIES[method](problem)).objective
                found.setdefault(f"{method} / auto", []).append(price / ours.objective)
            blind = replace(problem.cluster, speeds=np.ones(problem.ranks))
            plan = solve(replace(problem, cluster=blind), time_limit=0.2, gap=1e-5).plan
            found.setdefault("auto blind to speeds / auto", []).append(
                evaluate(problem, plan).objective / ours.objective
            )
        yield row | {key: f"{statistics.median(values):.4f}" for key, values in found.items()}


def node_groups(instances: Path) -> Iterator[Row]:
    """Expert groups that stay on a node: hierarchical EPLB against ours (shape A), 1 s."""
    for speeds in ("equal", "het"):
        for groups, nodes in ((8, 4), (8, 8), (16, 4)):
            ratios: dict[str, list[float]] = {}
            for seed in REPORT_SEEDS:
                base = generate("A", seed, speeds=speeds).aggregate()
                cluster = Cluster.from_speeds(base.cluster.speeds, 9, nodes, "relative")
                problem = replace(base, cluster=cluster, constraints=[NodeGroups(groups)])
                ours = solve(problem, time_limit=1.0, gap=1e-5)
                eplb: Evaluation = evaluate(problem, POLICIES["eplb"](problem))
                for name, value in (
                    ("hierarchical eplb", eplb.imbalance),
                    ("auto", evaluate(problem, ours.plan).imbalance),
                    ("auto's gap", ours.gap),
                ):
                    ratios.setdefault(name, []).append(value)
            row: Row = {"speeds": speeds, "groups": groups, "nodes": nodes}
            yield row | {k: f"{statistics.median(v):.4f}" for k, v in ratios.items()}


def held_out(instances: Path) -> Iterator[Row]:
    """Several windows with one placement: in sample and held out, shares fixed and re-split."""
    parts: list[tuple[str, Callable[[int], Problem]]] = [
        ("A, independent jitter", lambda part: every_other(generate("A", 100), part)),
    ]
    for path in sorted((instances / "real").glob("dsv2lite-windows*_equal.json")):
        parts.append((path.stem, lambda part, path=path: every_other(read_instance(path), part)))  # type: ignore[misc]
    for name, make in parts:
        for routing in ("even", "weighted"):
            seen, unseen = (replace(make(part), routing=routing) for part in (0, 1))
            half = [0] * (seen.windows // 2) + [1] * (seen.windows - seen.windows // 2)
            two = replace(seen, loads=seen.loads.regimes(half), window_weight=None)
            for planned_on, problem in (
                ("sum", seen.aggregate()),
                ("windows", seen),
                ("two regimes", two),
            ):
                plan = solve(problem, time_limit=3.0, gap=1e-5).plan
                fixed = plan
                if plan.split is not None and plan.split.ndim == 3:
                    weight = problem.window_weight[:, None, None]
                    fixed = plan.with_split(_normal(plan, (plan.split * weight).sum(axis=0)))
                row: Row = {"loads": name, "routing": routing, "planned on": planned_on}
                best = resplit(seen, plan) if routing == "weighted" else plan
                row["in sample"] = f"{evaluate(seen, best).imbalance:.4f}"
                row["held out, shares fixed"] = f"{evaluate(unseen, fixed).imbalance:.4f}"
                if routing == "weighted":
                    again = evaluate(unseen, resplit(unseen, plan)).imbalance
                    row["held out, re-split"] = f"{again:.4f}"
                yield row


def _normal(plan: Plan, split: Any) -> Any:
    """Shares [layers, slots] scaled to sum exactly 1 for each expert."""
    total = plan._per_expert(split)
    layer = np.arange(plan.layers)[:, None]
    return np.where(plan.slots >= 0, split / total[layer, np.maximum(plan.slots, 0)], 0.0)
