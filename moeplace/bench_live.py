"""Benchmarks of live systems: triggers on drifting loads, moves against step time, robust plans.

Part of `moeplace.bench`. Streams are drawn from known shares, so that what a plan costs on the
true load, and when the load truly changed, is known and not itself an estimate.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves
from moeplace.drift import Monitor
from moeplace.evaluate import evaluate
from moeplace.instances import generate, read_instance
from moeplace.loads import LoadHistogram
from moeplace.migrate import relabel
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.robust import scores
from moeplace.solve import solve
from moeplace.tradeoff import Point, tradeoff

Row = dict[str, Any]

#: Bytes of an expert: DeepSeek-V3 in fp8 (shape A), DeepSeek-V2-Lite in bf16.
V3, V2_LITE = 44_050_944, 3 * 2048 * 1408 * 2
ASSIGNMENTS = (5_120, 51_200, 512_000)
BEFORE, AFTER = 20, 80
#: Windows without a change, over all seeds.
STILL = 1000
SEEDS = (100, 101, 102, 103, 104)
#: Received copies a layer that every trigger's re-plan may take, so that triggers alone differ.
MOVES = 16
#: Search steps of a re-plan: no clock, so that a table can be made again.
WORK = 3_000_000
TRIGGERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("never", {}),
    ("regret", {"trigger": "regret"}),
    ("regret, one window", {"trigger": "regret", "pool": 1}),
    ("cosine 0.05", {"trigger": "cosine"}),
    ("max / mean 1.2", {"trigger": "max-mean"}),
    ("max / mean 1.2, full re-plan", {"trigger": "max-mean"}),
)


@dataclass(frozen=True)
class _Stream:
    """A load whose true shares, and a cluster whose true speeds, are known in each window."""

    name: str
    problem: Problem  # loads: what the first plan is made on
    shares: Callable[[int], FloatArray]  # from the window
    speeds: Callable[[int], FloatArray]
    bytes: int


def _shares(tokens: FloatArray) -> FloatArray:
    total = tokens.sum(axis=-1, keepdims=True)
    return np.asarray(tokens / np.where(total > 0, total, 1.0))


def _with(problem: Problem, shares: FloatArray) -> Problem:
    """The problem with a million assignments a layer by these shares."""
    return replace(problem, loads=LoadHistogram(tokens=1e6 * shares), window_weight=None)


def _streams(instances: Path, seed: int) -> Iterator[_Stream]:
    tasks = read_instance(instances / "real" / "dsv2lite-tasks_8x9_equal.json")
    shares = _shares(tasks.loads.tokens)
    one, other = seed % 4, (seed + 1 + seed // 4) % 4
    one_load, mixed = shares[one], 0.8 * shares[one] + 0.2 * shares[other]
    start = _with(tasks, one_load)
    equal = start.cluster.speeds
    slow = np.where(np.arange(equal.size) == seed % equal.size, 0.9, 1.0) * equal
    for name, later, fast in (
        ("V2-Lite: no change", one_load, equal),
        ("V2-Lite: 20 % of another task", mixed, equal),
        ("V2-Lite: another task", shares[other], equal),
        ("V2-Lite: one GPU 10 % slower", one_load, slow),
    ):
        yield _Stream(
            name,
            start,
            lambda t, later=later: one_load if t < BEFORE else later,  # type: ignore[misc]
            lambda t, fast=fast: equal if t < BEFORE else fast,  # type: ignore[misc]
            V2_LITE,
        )
    now, then = (_shares(generate("A", seed, epoch=epoch).loads.tokens.sum(0)) for epoch in (0, 1))
    shape_a = _with(generate("A", seed).aggregate(), now)
    het = shape_a.cluster.speeds

    def walked(t: int) -> FloatArray:
        return _shares(now ** (1 - t / AFTER) * then ** (t / AFTER)) if t > 0 else now

    yield _Stream("A: no change", shape_a, lambda t: now, lambda t: het, V3)
    yield _Stream(
        "A: drift 0.25 at once", shape_a, lambda t: now if t < BEFORE else then, lambda t: het, V3
    )
    yield _Stream(
        f"A: drift 0.25 over {AFTER} windows",
        shape_a,
        lambda t: walked(t - BEFORE),
        lambda t: het,
        V3,
    )


def drift(instances: Path) -> Iterator[Row]:
    """Three triggers on known drift: delay, false alarms, step time lost, bytes moved."""
    names = [stream.name for stream in _streams(instances, SEEDS[0])]
    for name in names:
        for assignments in ASSIGNMENTS:
            for trigger, options in TRIGGERS:
                if "no change" in name and trigger == "never":
                    continue
                yield _compared(instances, name, assignments, trigger, options)


def _compared(
    instances: Path, name: str, assignments: int, trigger: str, options: dict[str, Any]
) -> Row:
    row: Row = {"load": name, "assignments": f"{assignments:,}", "trigger": trigger}
    still = "no change" in name
    found = []
    for seed in SEEDS:
        stream = next(each for each in _streams(instances, seed) if each.name == name)
        windows = STILL // len(SEEDS) if still else BEFORE + AFTER
        found.append(_run(stream, assignments, trigger, options, windows, seed))
    if still:
        row["false alarms in 1,000"] = str(sum(len(at) for at, _, _ in found))
    else:
        delays = [next((t for t in at if t >= BEFORE), None) for at, _, _ in found]
        late = [float("inf") if each is None else each - BEFORE + 1 for each in delays]
        middle = statistics.median(late)
        row["delay, windows"] = "never" if middle == float("inf") else f"{middle:.0f}"
        row["alarms before"] = str(sum(t < BEFORE for at, _, _ in found for t in at))
        row["re-plans"] = f"{statistics.mean(len(at) for at, _, _ in found):.1f}"
    row["above the bound"] = f"{statistics.median(lost for _, lost, _ in found):.2%}"
    row["GB moved"] = f"{statistics.median(moved for _, _, moved in found) / 1e9:.0f}"
    return row


def _run(
    stream: _Stream,
    assignments: int,
    trigger: str,
    options: dict[str, Any],
    windows: int,
    seed: int,
) -> tuple[list[int], float, float]:
    """Windows with a re-plan, mean excess over the bound from the change on, bytes moved."""
    plan = solve(stream.problem, gap=1e-4, seed=seed).plan
    monitor = Monitor(stream.problem, plan, seed=seed, **options)
    generator = np.random.default_rng([seed, assignments])
    moved = 0
    replanned: list[int] = []
    lost: list[float] = []
    speeds = stream.speeds(0)
    for t in range(windows):
        shares = stream.shares(t)
        if (stream.speeds(t) != speeds).any():
            speeds = stream.speeds(t)
            monitor.speeds(speeds)
        decision = monitor.observe(generator.multinomial(assignments, shares).astype(float))
        if t >= BEFORE and t % 5 == 0:
            true = _with(monitor.problem, shares)
            bound = lower_bound(true).total
            lost.append(evaluate(true, monitor.plan).objective / bound - 1)
        if trigger != "never" and decision.action == "replan":
            replanned.append(t)
            new = _planned(monitor.now, monitor.plan, full="full" in trigger, seed=seed)
            moved += int(new.moves_from(monitor.plan).sum())
            monitor.adopt(new, monitor.loads)
    return replanned, statistics.mean(lost), moved * stream.bytes


def _planned(problem: Problem, current: Plan, *, full: bool, seed: int) -> Plan:
    if full:
        return relabel(problem, current, solve(problem, work_limit=WORK, seed=seed).plan)
    limited = replace(problem, constraints=[MaxMoves(current, per_layer=MOVES)])
    return solve(limited, work_limit=WORK, seed=seed).plan


def drift_real(instances: Path) -> Iterator[Row]:
    """The recorded shift of DeepSeek-V2-Lite (between windows 7 and 8): who sees it, and when."""
    for fleet in ("equal", "frontera-resnet"):
        whole = read_instance(instances / "real" / f"dsv2lite-windows_8x9_{fleet}.json")
        tokens = whole.loads.tokens
        for first in (2, 4):
            seen = LoadHistogram(tokens=tokens[:first]).aggregate()
            problem = replace(whole, loads=seen, window_weight=None)
            plan = solve(problem, gap=1e-4).plan
            for trigger, options in TRIGGERS:
                if trigger == "never":
                    continue
                often = {"every": 1, "cooldown": 3} | options  # 16 windows: no time for less
                monitor = Monitor(problem, plan, **often)
                row: Row = {"speeds": fleet, "planned on": f"windows 0 to {first - 1}"}
                row["trigger"] = trigger
                moved = 0
                at: list[int] = []
                before: list[float] = []
                after: list[float] = []
                for t in range(first, tokens.shape[0]):
                    decision = monitor.observe(tokens[t])
                    true = replace(whole, loads=whole.loads.select([t]), window_weight=None)
                    price = evaluate(true, monitor.plan).objective / lower_bound(true).total - 1
                    (before if t < 8 else after).append(price)
                    if decision.action == "replan":
                        at.append(t)
                        new = _planned(monitor.now, monitor.plan, full="full" in trigger, seed=0)
                        moved += int(new.moves_from(monitor.plan).sum())
                        monitor.adopt(new, monitor.loads)
                row["re-plans after windows"] = ", ".join(map(str, at)) or "never"
                row["above the bound, before 8"] = f"{statistics.mean(before):.1%}"
                row["from 8 on"] = f"{statistics.mean(after):.1%}"
                row["GB moved"] = f"{moved * V2_LITE / 1e9:.1f}"
                yield row


def robust(instances: Path) -> Iterator[Row]:
    """Objectives over windows against the plan on their sum, all on windows not planned on."""
    for name, problem, (seen, unseen) in _splits(instances):
        for score in scores(problem, seen, unseen, time_limit=5.0):
            yield {
                "loads": name,
                "planned on": score.planned_on,
                "in sample": f"{score.in_sample:.4f}",
                "held out": f"{score.held_out:.4f}",
                "worst window": f"{score.worst:.4f}",
                "against the sum": f"{score.against_sum:+.1%}",
                "worst window against it": f"{score.worst_against_sum:+.1%}",
            }


def _splits(instances: Path) -> Iterator[tuple[str, Problem, tuple[list[int], list[int]]]]:
    """Loads, and the windows to plan on and to score on."""
    real = read_instance(instances / "real" / "dsv2lite-windows_8x9_equal.json")
    odd, even = list(range(1, 16, 2)), list(range(0, 16, 2))
    yield "A: independent jitter", generate("A", 100), (even, odd)
    yield "V2-Lite: both tasks, every other window", real, (even, odd)
    yield "V2-Lite: one task alone", real, ([0, 2, 4, 6], [1, 3, 5, 7])
    first, later = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    yield "V2-Lite: both tasks, earlier windows", real, (first, later)
    yield "V2-Lite: a task that was not seen", real, (list(range(8)), list(range(8, 16)))
    qwen = read_instance(instances / "real" / "qwen3-30b-sharegpt_16x9_equal.json")
    yield "Qwen3-30B: three prefill steps", qwen, ([0, 1], [2])


def moves(instances: Path) -> Iterator[Row]:
    """Step time against copies received after drift 0.25, each budget with its bound."""
    for shape, speeds in (("A", "het"), ("A", "equal"), ("C", "het"), ("D", "het")):
        found: dict[str, list[Point]] = {}
        for seed in SEEDS[:3]:
            current = solve(generate(shape, seed, speeds=speeds).aggregate(), seed=seed).plan
            later = generate(shape, seed, epoch=1, speeds=speeds).aggregate()
            budgets = (0, 4, 8, 16, 32, 64)
            points = tradeoff(
                later, current, expert_bytes=V3, budgets=budgets, time_limit=None, every=True
            )
            found.setdefault("stay", []).append(points[0])
            for point in points[1:]:
                name = "any number" if point.budget is None else str(point.budget)
                found.setdefault(name, []).append(point)
        slots = generate(shape, 100).cluster.total_slots * later.layers
        for name, points in found.items():
            yield {
                "shape": f"{shape} {speeds}",
                "copies a layer": name,
                "of all slots": f"{statistics.median(p.moves for p in points) / slots:.1%}",
                "GB": f"{statistics.median(p.bytes for p in points) / 1e9:.0f}",
                "share of the gain": f"{statistics.median(p.kept for p in points):.1%}",
                "gap to its bound": f"{statistics.median(p.gap for p in points):.2%}",
            }
