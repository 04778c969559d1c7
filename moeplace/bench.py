"""Benchmarks: cases x methods x seeds x limits -> a table, with times as ratios in the same run.

Parameters were tuned on seeds 0 to 4; tables use seeds 100 to 104. Loads are summed over
windows unless a case says otherwise. Times are from arrays to a `Result` (plan, bound and
evaluation), kernels warm; beside them their ratio to the compiled greedy EPLB (what
TensorRT-LLM runs) on the same loads in the same run, since machines differ and are noisy.
"""

import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace import bench_live
from moeplace._check import IntArray
from moeplace.affinity import coactivation, gather
from moeplace.bench_hard import hard
from moeplace.bench_latency import decode_prefill, latency
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves, MaxOffNode, NodeGroups
from moeplace.dispatch import FIXED, sources
from moeplace.errors import FormatError, PolicyNotApplicable, ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.feasible import least_off_node
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, Routing
from moeplace.result import Result
from moeplace.search.split import resplit
from moeplace.solve import solve
from moeplace.topology import trace_traffic
from moeplace.topology import traffic as plan_traffic

REPORT_SEEDS = (100, 101, 102, 103, 104)
#: Small enough that no case stops before its time is up.
NEVER = 1e-7

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one line of a table measures."""

    name: str
    make: Callable[[int], Problem]
    limit: float
    target: str = ""
    gap: float = NEVER
    score: Callable[[int, Result], float] | None = None  # instead of the imbalance ratio


def _summed(shape: Any, speeds: Any = "het", **more: Any) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        return replace(generate(shape, seed, speeds=speeds).aggregate(), **more)

    return make


def _drifted(moves: int) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        now = solve(generate("A", seed).aggregate(), gap=1e-4, seed=seed).plan
        later = generate("A", seed, epoch=1).aggregate()
        return replace(later, constraints=[MaxMoves(now, per_layer=moves)])

    return make


def _windows(path: Path, part: int) -> Problem:
    problem = read_instance(path)
    windows = list(range(part, problem.windows, 2))
    return replace(problem, loads=problem.loads.select(windows), window_weight=None)


def _held_out(path: Path) -> Callable[[int, Result], float]:
    def score(seed: int, result: Result) -> float:
        return evaluate(_windows(path, 1), result.plan).imbalance

    return score


def targets(instances: Path) -> Iterator[Row]:
    """The cases that a planner of serving systems must master, at their time limits."""
    large, larger = (64, 512, 640, 128), (64, 1024, 2048, 512)
    dsv2 = instances / "real" / "dsv2lite-windows_8x9_equal.json"
    cases = [
        *(Case(f"{s} even, {v}", _summed(s, v), t, goal)
          for s, v in (("A", "equal"), ("A", "het"), ("D", "het"))
          for t, goal in ((0.05, "1.0001"), (0.2, "1.00002"))),
        Case("C even, het", _summed("C"), 0.1, "1.0003"),
        Case("C even, het", _summed("C"), 1.0, "1.0001"),
        *(Case(f"B even, {v}", _summed("B", v), 0.1, "gap 2e-5") for v in ("equal", "het")),
        *(Case(f"{s} weighted, het", _summed(s, routing="weighted"), 0.02, "1 + 1e-9")
          for s in "ACD"),
        Case("64 x 512 / 640 / 128 even, het", _summed(large), 0.3, "1.0003"),
        Case("64 x 1024 / 2048 / 512 even, het", _summed(larger), 2.0, "1.0003"),
        *(Case(f"A drifted, het, {m} moves a layer", _drifted(m), 0.5, goal)
          for m, goal in ((8, "1.055"), (16, "1.029"), (32, "1.007"))),
        Case("DeepSeek-V2-Lite windows, held out", lambda _: _windows(dsv2, 0), 1.0, "1.07",
             score=_held_out(dsv2)),
    ]  # fmt: skip
    for case in cases:
        yield run(case)


def run(case: Case, seeds: Sequence[int] = REPORT_SEEDS, method: str = "auto") -> Row:
    """Median (and worst) of a case over seeds."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        problem = case.make(seed)
        solve(problem, method, work_limit=1)  # kernels loaded
        began, cpu = time.perf_counter(), time.process_time()
        result = solve(problem, method, time_limit=case.limit, gap=case.gap, seed=seed)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        evaluation = evaluate(problem, result.plan)
        score = evaluation.imbalance if case.score is None else case.score(seed, result)
        moves = np.nan
        if problem.max_moves is not None:
            moves = result.plan.moves_from(problem.max_moves.current).sum() / problem.layers
        reference = _greedy_seconds(problem)
        for name, value in (
            ("ratio", score), ("worst layer", evaluation.ratio.max()), ("gap", result.gap),
            ("worst gap", result.layers.gap.max()), ("wall", wall), ("cpu", cpu),
            ("times greedy", wall / reference), ("moves", moves),
        ):  # fmt: skip
            found.setdefault(name, []).append(float(value))
    row: Row = {"case": case.name, "limit": f"{case.limit:g} s", "target": case.target}
    row["ratio"] = f"{statistics.median(found['ratio']):.6f}"
    row["of 5, worst"] = f"{max(found['ratio']):.6f}"
    for name, form in (
        ("worst layer", "{:.5f}"), ("gap", "{:.1e}"), ("worst gap", "{:.1e}"), ("wall", "{:.3f} s"),
        ("cpu", "{:.3f} s"), ("times greedy", "{:.0f}"), ("moves", "{:.1f}"),
    ):  # fmt: skip
        row[name] = form.format(statistics.median(found[name])).replace("nan", "")
    return row


def _greedy_seconds(problem: Problem) -> float:
    """Median time of the compiled greedy EPLB on the same loads; nan where it cannot run."""
    from moeplace.policies.greedy import greedy

    slots, loads = problem.cluster.slots, problem.mean_load[0]
    if slots.min() != slots.max():
        return float("nan")
    greedy(loads, problem.ranks, int(slots[0]))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        greedy(loads, problem.ranks, int(slots[0]))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def methods(instances: Path) -> Iterator[Row]:
    """Every method on every real instance and on shapes A to D: issue of quality, not of limits."""
    problems = [(path.stem, read_instance(path)) for path in _real(instances)]
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


def _real(instances: Path) -> list[Path]:
    """The shipped real instances."""
    paths = sorted((instances / "real").glob("*.json"))
    if not paths:
        raise FormatError(
            f"No real instances in {instances}: run from a checkout, or name its folder with "
            "--instances."
        )
    return paths


def real(instances: Path) -> Iterator[Row]:
    """Real loads on real GPU spreads at 0.1 s, loads summed."""
    for path in _real(instances):
        yield run(Case(path.stem, lambda _, path=path: read_instance(path).aggregate(), 0.1))  # type: ignore[misc]


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


def spread(instances: Path) -> Iterator[Row]:
    """What seeing speeds buys: step time of each method over ours, by spread of the speeds."""
    import json

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


def held_out(instances: Path) -> Iterator[Row]:
    """Several windows with one placement: in sample and held out, shares fixed and re-split."""
    parts: list[tuple[str, Callable[[int], Problem]]] = [
        ("A, independent jitter", lambda part: _halves(generate("A", 100), part)),
    ]
    for path in sorted((instances / "real").glob("dsv2lite-windows*_equal.json")):
        parts.append((path.stem, lambda part, path=path: _windows(path, part)))  # type: ignore[misc]
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


def _halves(problem: Problem, part: int) -> Problem:
    windows = list(range(part, problem.windows, 2))
    return replace(problem, loads=problem.loads.select(windows), window_weight=None)


def _normal(plan: Plan, split: Any) -> Any:
    """Shares [layers, slots] scaled to sum exactly 1 for each expert."""
    total = plan._per_expert(split)
    layer = np.arange(plan.layers)[:, None]
    return np.where(plan.slots >= 0, split / total[layer, np.maximum(plan.slots, 0)], 0.0)


def few_spares(instances: Path) -> Iterator[Row]:
    """Weighted routing with fewer spare slots than ranks less one."""
    for shape in "ADC":
        for spares in (16, 8, 4, 2, 0):
            gaps, worst = [], []
            for seed in REPORT_SEEDS[:3]:
                problem = _spared(shape, seed, spares)
                result = solve(problem, time_limit=1.0, gap=1e-5)
                gaps.append(result.gap)
                worst.append(float(result.layers.gap.max()))
            yield {
                "shape": shape, "spare slots": spares, "gap": f"{statistics.median(gaps):.1e}",
                "worst layer's gap": f"{max(worst):.1e}",
                "bound / fluid": f"{result.lower_bound / problem.total(problem.fluid):.4f}",
            }  # fmt: skip


def _spared(shape: str, seed: int, spares: int) -> Problem:
    problem = generate(shape, seed).aggregate()
    each, more = divmod(problem.experts + spares, problem.ranks)
    slots = each + (np.arange(problem.ranks) < more)
    cluster = Cluster(speeds=problem.cluster.speeds, slots=slots, speed_unit="relative")
    return replace(problem, cluster=cluster, routing="weighted")


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


def dispatch(instances: Path) -> Iterator[Row]:
    """What a plan for even routing costs under an engine's rule, and one made for it; 2 s each."""
    for shape, speeds in itertools.product("AC", ("equal", "het")):
        problems = [generate(shape, seed, speeds=speeds).aggregate() for seed in REPORT_SEEDS]
        plans = [solve(problem, time_limit=2.0, gap=1e-5).plan for problem in problems]
        ranks = problems[0].ranks
        rules: list[tuple[Routing, int]] = [
            ("ascend", 1), ("sglang-static", 1), ("sglang-static", ranks // 8), ("sglang-lp", 1)
        ]  # fmt: skip
        for rule, nodes in rules:
            found: dict[str, list[float]] = {}
            for problem, plan in zip(problems, plans, strict=True):
                cluster = problem.cluster
                cluster = Cluster.from_speeds(cluster.speeds, cluster.slots, nodes, "relative")
                ruled = replace(problem, cluster=cluster, routing=rule)
                ours = solve(ruled, time_limit=2.0, gap=1e-5)
                lost, left = _worst_draw(ruled, plan), _worst_draw(ruled, ours.plan)
                bound = ours.lower_bound / problem.total(problem.fluid)
                for what, value in (
                    ("planned for even, even", evaluate(problem, plan).imbalance),
                    ("the same under the rule", lost),
                    ("planned for the rule", left),
                    ("bound", bound),
                    ("recovered", (lost - left) / max(lost - bound, 1e-12)),
                ):
                    found.setdefault(what, []).append(value)
            row: Row = {
                "shape": shape,
                "speeds": speeds,
                "rule": rule,
                "ranks a node": ranks // nodes,
            }
            for what, values in found.items():
                middle = statistics.median(values)
                row[what] = f"{middle:.1%}" if what == "recovered" else f"{middle:.4f}"
            if rule not in FIXED:  # not planned for: the best of plans for even routing
                del row["recovered"]
            yield row


def _worst_draw(problem: Problem, plan: Plan) -> float:
    """Imbalance under a rule, the worst of three draws that no plan was made for."""
    if problem.routing != "sglang-static":
        return evaluate(problem, plan).imbalance
    weighted = replace(problem, routing="weighted")
    shares = (sources(problem, plan, draw) / problem.ranks for draw in (1, 2, 3))
    return max(evaluate(weighted, plan.with_split(share)).imbalance for share in shares)


def traffic(instances: Path) -> Iterator[Row]:
    """Bytes off node against time: `MaxOffNode` under sglang-static, experts gathered; 5 s each.

    A, 4 nodes of 8 ranks, fp8 there and bf16 back, hidden size 7,168, 8 experts for each token;
    seed 100. Traces are synthetic: to the scores of 8 of 256 experts (lognormal popularity),
    a bonus is added for the experts of one of 32 themes; off-node copies are measured on the half
    of the trace that was not planned on.
    """
    problem = generate("A", REPORT_SEEDS[0], speeds="het").aggregate()
    cluster = Cluster.from_speeds(problem.cluster.speeds, problem.cluster.slots, 4, "relative")
    ruled = replace(problem, cluster=cluster, routing="sglang-static")
    least = float(least_off_node(ruled).max())
    plans = {
        "top_k": POLICIES["top_k"](ruled),
        "planned for even": solve(replace(problem, cluster=cluster), time_limit=5.0).plan,
        "planned for the rule": solve(ruled, time_limit=5.0, gap=NEVER).plan,
    }
    for extra in (0.04, 0.01):
        limited = replace(ruled, constraints=[MaxOffNode(least + extra)])
        plans[f"MaxOffNode({least + extra:.4f})"] = solve(limited, time_limit=5.0, gap=NEVER).plan
    for name, plan in plans.items():
        sent = plan_traffic(ruled, plan, top_k=8)
        off = sent.off_node / 8
        rank, node = sent.bytes_per_token(7168, dispatch_bytes=1)
        yield {
            "routing": "sglang-static",
            "plan": name,
            "imbalance": f"{evaluate(ruled, plan).imbalance:.4f}",
            "off-node share, mean": f"{off.mean():.4f}",
            "worst layer": f"{off.max():.4f}",
            "MB a token off rank": f"{rank / 1e6:.3f}",
            "off node": f"{node / 1e6:.3f}",
        }
    for bonus in (0.0, 0.2, 0.4):
        trace = _themes(bonus)
        counts = [np.bincount(layer.ravel(), minlength=256) for layer in trace.swapaxes(0, 1)]
        loads = LoadHistogram(tokens=np.array(counts, dtype=np.float64))
        traced = Problem(loads, cluster)
        planned, unseen = trace[::2], trace[1::2]
        before = solve(traced, time_limit=1.0).plan
        after = gather(traced, before, coactivation(traced, planned), gap=0.01)
        for name, plan in (("planned", before), ("gathered within 1 %", after)):
            crossed = trace_traffic(traced, plan, unseen)
            yield {
                "routing": "even",
                "plan": f"{name}, bonus {bonus:g}",
                "imbalance": f"{evaluate(traced, plan).imbalance:.4f}",
                "copies off node a token": f"{crossed.off_node.mean():.3f}",
            }


def _themes(bonus: float) -> IntArray:
    """A trace [tokens, layers, 8] whose tokens prefer experts of one theme each."""
    draw = np.random.default_rng(5)
    chosen = np.empty((40_000, 2, 8), dtype=np.int64)
    for layer in range(2):
        score = draw.random((40_000, 256)) ** (1 / draw.lognormal(0, 0.5, 256))
        theme = draw.permutation(np.arange(256) % 32)
        score += bonus * (theme == draw.integers(32, size=40_000)[:, None])
        chosen[:, layer] = np.argpartition(-score, 8, axis=1)[:, :8]
    return chosen


SUITES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "targets": targets,
    "methods": methods,
    "real": real,
    "growth": growth,
    "ablation": ablation,
    "spread": spread,
    "held-out": held_out,
    "few-spares": few_spares,
    "node-groups": node_groups,
    "latency": latency,
    "decode-prefill": decode_prefill,
    "drift": bench_live.drift,
    "drift-real": bench_live.drift_real,
    "moves": bench_live.moves,
    "robust": bench_live.robust,
    "hard": hard,
    "dispatch": dispatch,
    "traffic": traffic,
}


def markdown(name: str, rows: Sequence[Row]) -> str:
    """A table of rows, headed by the command that makes it."""
    if name not in SUITES:
        raise ProblemError(f"Suite must be one of {', '.join(SUITES)}, got {name!r}.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    about = (SUITES[name].__doc__ or "").strip().splitlines()[0]
    lines = [f"# {name}", "", about, "", f"Made by `moeplace bench {name}`.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    return "\n".join(lines) + "\n"
