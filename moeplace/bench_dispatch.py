"""Suites of `bench` on engines' rules of replica choice, and on bytes that leave a node."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeplace._check import IntArray
from moeplace.affinity import coactivation, gather
from moeplace.bench_case import NEVER, REPORT_SEEDS, Row
from moeplace.constraints import MaxOffNode
from moeplace.dispatch import FIXED, sources
from moeplace.evaluate import evaluate
from moeplace.feasible import least_off_node
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, Routing
from moeplace.solve import solve
from moeplace.topology import trace_traffic
from moeplace.topology import traffic as plan_traffic


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
