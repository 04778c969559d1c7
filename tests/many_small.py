"""A hundred thousand random small problems against exhaustive search; outside CI.

    python -m tests.many_small 100000 --processes 2 > docs/results/many_small.md

Each is solved by `auto`; a bound above the optimum or a plan below it ends the run.
"""

import argparse
from collections import Counter
from multiprocessing import Pool
from typing import Any

import numpy as np

import moeplace as mp
from tests.brute_force import optimum

KINDS = ("plain", "ties", "zeros", "base", "pins", "slow", "unequal slots", "two windows", "moves")


def make(seed: int) -> tuple[str, mp.Problem] | None:
    """A random problem of at most 5 experts on at most 3 ranks, and its kind."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    experts, ranks, layers = int(rng.integers(1, 6)), int(rng.integers(1, 4)), 1
    windows = 2 if kind == "two windows" else 1
    tokens = np.round(rng.lognormal(3, 1.2, (windows, layers, experts)), 3)
    if kind == "ties":
        tokens = rng.integers(1, 4, tokens.shape).astype(float)
    if kind == "zeros":
        tokens[rng.random(tokens.shape) < 0.5] = 0
    speeds = rng.uniform(0.8, 1.2, ranks)
    if kind == "slow":
        speeds = rng.uniform(0.3, 1.5, ranks)
    if rng.random() < 0.3:
        speeds[:] = 1.0
    slots = np.full(ranks, int(rng.integers(1, 4)))
    if kind == "unequal slots":
        slots = rng.integers(0, 4, ranks)
    if np.minimum(slots, experts).sum() < experts:
        return None
    more: dict[str, Any] = {"routing": "even" if rng.random() < 0.7 else "weighted"}
    if kind == "base":
        more["base_load"] = rng.uniform(0, 30, ranks).round(2)
    if kind == "two windows":
        more["objective"] = "worst" if rng.random() < 0.5 else "mean"
    if kind == "pins":
        rules = [mp.Pin, mp.Forbid]
        more["constraints"] = [
            rules[rng.integers(2)](int(rng.integers(experts)), int(rng.integers(ranks)))
            for _ in range(rng.integers(1, 3))
        ]
    cluster = mp.Cluster(speeds=speeds, slots=slots)
    problem = mp.Problem(mp.LoadHistogram(tokens=tokens), cluster, **more)
    if kind == "moves":
        other = mp.Problem(mp.LoadHistogram(tokens=tokens[..., ::-1]), cluster, **more)
        current = mp.solve(other, work_limit=1000, seed=seed).plan.with_split(None)
        rule = mp.MaxMoves(current, per_layer=int(rng.integers(0, 4)))
        problem = mp.Problem(mp.LoadHistogram(tokens=tokens), cluster, constraints=[rule], **more)
    return kind, problem


def one(seed: int) -> tuple[str, float, float] | None:
    """Kind, gap of the plan to the optimum, gap of the optimum to the bound."""
    made = make(seed)
    if made is None:
        return None
    kind, problem = made
    best = optimum(problem)
    result = mp.solve(problem, work_limit=20_000, gap=0.0, seed=seed)
    if not np.isfinite(best):
        if result.status is not mp.Status.INFEASIBLE:
            raise AssertionError(f"seed {seed}: no plan exists, status {result.status}")
        return "infeasible", 0.0, 0.0
    if result.evaluation is None:
        raise AssertionError(f"seed {seed} ({kind}): optimum {best}, status {result.status}")
    mp.recompute(problem, result.bound)
    if result.bound.total > best * (1 + 1e-9):
        raise AssertionError(f"seed {seed} ({kind}): bound {result.bound.total} above {best}")
    if result.objective < best * (1 - 1e-9):
        raise AssertionError(f"seed {seed} ({kind}): plan {result.objective} below {best}")
    if best == 0:
        return kind, 0.0, 0.0
    return kind, result.objective / best - 1, best / max(result.bound.total, 1e-300) - 1


def main() -> None:
    """Run and print a table by kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("problems", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with Pool(options.processes) as pool:
        outcomes = [x for x in pool.imap(one, range(options.problems), chunksize=200) if x]
    count = Counter(kind for kind, *_ in outcomes)
    lines = ["# Many small problems against exhaustive search", ""]
    lines += [
        f"Made by `python -m tests.many_small {options.problems}`: {len(outcomes):,} problems, since"
    ]
    lines += [
        "seeds with fewer slots than experts give none. No bound was above the optimum, no plan"
    ]
    lines += ["below it, every bound was recomputed.", ""]
    lines += ["| kind | problems | plan optimal | mean plan gap | worst plan gap | bound tight |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, number in sorted(count.items()):
        plan = np.array([p for k, p, _ in outcomes if k == kind])
        bound = np.array([b for k, _, b in outcomes if k == kind])
        lines.append(
            f"| {kind} | {number} | {(plan < 1e-9).mean():.2%} | {plan.mean():.1e} "
            f"| {plan.max():.3f} | {(bound < 1e-9).mean():.2%} |"
        )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
