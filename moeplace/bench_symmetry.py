"""Benchmark of rules that break symmetry, which the package's formulation goes without.

With equal speeds, ranks may be exchanged; experts of equal load may be, too. Rows that order them
leave one of many equal solutions. They live here since they do not pay: CP-SAT and HiGHS find
symmetries by themselves, and the rows hide them and cost time. Slots of a rank need no rule, since
the formulation counts a rank's replicas and does not tell its slots apart.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import sparse

from moeplace.bench_case import REPORT_SEEDS, Row
from moeplace.bench_formulations import STEPS, attempt, placed, plan_of, told
from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.exact.model import Model, build, cutoffs
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.solve import solve

SEEDS = REPORT_SEEDS
#: Seconds of a solver.
SECONDS = 3.0
#: Experts, slots, ranks; tokens in all, so few that many experts are equal, or none: as generated.
CASES: tuple[tuple[tuple[int, int, int], int | None], ...] = (
    ((8, 10, 3), None),
    ((9, 12, 3), None),
    ((12, 16, 4), None),
    ((16, 20, 5), 40),
    ((24, 30, 6), 60),
    ((32, 32, 8), 100),
)
#: Whether ranks and whether experts are ordered.
RULES = {"none": (False, False), "ranks": (True, False), "experts": (False, True),
         "both": (True, True)}  # fmt: skip


def problem_of(shape: tuple[int, int, int], tokens: int | None, seed: int) -> Problem:
    """One layer on equal ranks, of so many tokens."""
    one = generate((1, *shape), seed, speeds="equal").aggregate()
    if tokens is None:
        return one
    load = one.tokens[0, 0]
    drawn = np.random.default_rng(seed).multinomial(tokens, load / load.sum())
    return replace(one, loads=LoadHistogram(tokens=drawn[None, None].astype(float)))


def alike(problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks that may be exchanged, and experts, of a plain layer: each in classes."""
    ranks: dict[tuple[float, int], list[int]] = {}
    experts: dict[float, list[int]] = {}
    caps = np.minimum(problem.cluster.slots, problem.experts).tolist()
    for rank, kind in enumerate(zip(problem.cluster.speeds.tolist(), caps, strict=True)):
        ranks.setdefault(kind, []).append(rank)
    for expert, load in enumerate(problem.tokens[0, 0].tolist()):
        experts.setdefault(load, []).append(expert)
    return list(ranks.values()), list(experts.values())


def ordered(model: Model, problem: Problem, ranks: bool, experts: bool) -> Model:
    """The model of a plain layer with rows that order equal ranks by time, and equal experts.

    An expert's number is the sum of its ranks' numbers, from 1; equal experts' do not fall. Both
    may hold at once: exchanging equal experts changes no rank's time.
    """
    like_ranks, like_experts = alike(problem)
    rows: list[sparse.csr_array] = []
    names: list[str] = []
    if ranks and problem.tokens.any():
        time = {name: n for n, name in enumerate(model.row_names) if name.startswith("time_")}
        for one, other in (pair for group in like_ranks for pair in pairwise(group)):
            first, second = (time[f"time_l0_w0_g{rank}"] for rank in (one, other))
            rows.append(model.rows[[second]] - model.rows[[first]])  # T cancels
            names.append(f"ranks_g{one}_g{other}")
    if experts:
        columns, of, rank = model.held[:, 0], model.held[:, 2], model.held[:, 3]
        for one, other in (pair for group in like_experts for pair in pairwise(group)):
            sign = (of == one) * 1.0 - (of == other)
            here = (np.zeros(columns.size, dtype=np.int64), columns)
            rows.append(sparse.csr_array((sign * (rank + 1), here), shape=(1, model.cost.size)))
            names.append(f"experts_e{one}_e{other}")
    if not rows:
        return model
    every = sparse.csr_array(sparse.vstack([model.rows, *rows]))
    every.eliminate_zeros()
    return replace(
        model,
        rows=every,
        row_low=np.concatenate([model.row_low, np.full(len(rows), -np.inf)]),
        row_high=np.concatenate([model.row_high, np.zeros(len(rows))]),
        row_names=[*model.row_names, *names],
    )


def relabelled(problem: Problem, plan: Plan) -> Plan:
    """The same plan of a plain layer, equal ranks and experts in the order of `ordered`."""
    held = placed(problem, plan)
    tokens = (problem.tokens[0, 0] / held.sum(axis=1)) @ held
    ranks, experts = alike(problem)
    for group in ranks:
        held[:, group] = held[:, [group[n] for n in np.argsort(-tokens[group], kind="stable")]]
    number = held @ np.arange(1, problem.ranks + 1)
    for group in experts:
        held[group] = held[[group[n] for n in np.argsort(number[group], kind="stable")]]
    return plan_of(problem, held)


def symmetry(instances: Path) -> Iterator[Row]:
    """Equal ranks, and experts of equal load, ordered or not: one layer, equal speeds, 3 s.

    Medians of five seeds: of each solver the seconds until its plan is proven to 2e-6 if it is in
    most seeds (in how many), or else its gap after 3 s. `our plan`: a hint, and a cutoff.
    """
    for shape, tokens in CASES:
        problems = [problem_of(shape, tokens, seed) for seed in SEEDS]
        starts = [evaluate(one, solve(one, work_limit=STEPS).plan) for one in problems]
        for rule, (ranks, experts) in RULES.items():
            if experts and tokens is None:  # hardly any two are equal
                continue
            row: Row = {"case": "{} / {} / {}".format(*shape)}
            row["tokens"] = "many" if tokens is None else tokens
            row["ordered"] = rule
            for name in ("cp-sat", "highs"):
                cold, warm = [], []
                for one, start in zip(problems, starts, strict=True):
                    least = lower_bound(one).per_layer
                    free, cut = np.full((1, 1), np.inf), cutoffs(one, least, start, alone=True)
                    model = ordered(build(one, [0], least, free), one, ranks, experts)
                    cold.append(attempt(name, model, one, SECONDS))
                    model = ordered(build(one, [0], least, cut), one, ranks, experts)
                    values = model.values(one, relabelled(one, start.plan))
                    warm.append(attempt(name, model, one, SECONDS, start, values))
                row[f"{name} from nothing"] = told(cold)
                row[f"{name} from our plan"] = told(warm)
            yield row
