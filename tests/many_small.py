"""Tens of thousands of random small problems against exhaustive search; outside CI.

    python -m tests.many_small 40000 --processes 2 > docs/results/many_small.md

Each is solved by `auto`; a bound above the optimum or a plan below it ends the run.
"""

import argparse
from collections import Counter
from multiprocessing import Pool
from typing import Any

import numpy as np

import moeplace as mp
from tests.brute_force import optimum

KINDS = (
    "plain",
    "ties",
    "zeros",
    "base",
    "pins",
    "slow",
    "unequal slots",
    "two windows",
    "moves",
    "capacity",
    "capacity, two windows",
    "most replicas",
    "replica budget",
    "cvar",
    "capacity and moves",
    "budget and moves",
    "several rules",
)
#: Two layers, which these rules or this objective couple.
COUPLED = ("replica budget", "cvar", "budget and moves")


def make(seed: int) -> tuple[str, mp.Problem] | None:
    """A random problem of at most 5 experts on at most 3 ranks, and its kind."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    experts, ranks = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    layers = 2 if kind in COUPLED else 1
    windows = 3 if kind == "cvar" else 2 if "two windows" in kind else 1
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
    if "two windows" in kind:
        more["objective"] = "worst" if rng.random() < 0.5 else "mean"
    if kind == "cvar":
        more["objective"], more["cvar_alpha"] = "cvar", float(rng.choice([0.3, 0.5, 0.8]))
    some = kind == "several rules"
    rules: list[Any] = []
    if kind == "pins" or (some and rng.random() < 0.5):
        rules += [
            [mp.Pin, mp.Forbid][rng.integers(2)](
                int(rng.integers(experts)), int(rng.integers(ranks))
            )
            for _ in range(rng.integers(1, 3))
        ]
    if "capacity" in kind or (some and rng.random() < 0.7):
        fair = tokens.sum(axis=2).max() / ranks * rng.uniform(1.0, 1.5)
        rules.append(mp.TokenCapacity(fair * rng.uniform(0.8, 1.2, ranks)))
    if kind == "most replicas" or (some and rng.random() < 0.7):
        rules.append(mp.MaxReplicas(rng.integers(1, 3, experts)))
    if "budget" in kind or (some and rng.random() < 0.5):
        rules.append(mp.ReplicaBudget(layers * experts + int(rng.integers(0, 4))))
    cluster = mp.Cluster(speeds=speeds, slots=slots)
    problem = mp.Problem(mp.LoadHistogram(tokens=tokens), cluster, constraints=rules, **more)
    if "moves" in kind:
        other = mp.Problem(mp.LoadHistogram(tokens=tokens[..., ::-1]), cluster, **more)
        current = mp.solve(other, work_limit=1000, seed=seed).plan.with_split(None)
        rules.append(mp.MaxMoves(current, per_layer=int(rng.integers(0, 4))))
        problem = mp.Problem(mp.LoadHistogram(tokens=tokens), cluster, constraints=rules, **more)
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
        if result.evaluation is not None:
            raise AssertionError(f"seed {seed}: no plan exists, status {result.status}")
        proven = result.status is mp.Status.INFEASIBLE
        return f"no plan exists ({'' if proven else 'not '}proven)", 0.0, 0.0
    if result.status is mp.Status.INFEASIBLE:
        raise AssertionError(f"seed {seed} ({kind}): optimum {best}, said to be infeasible")
    if result.evaluation is None:
        return kind, np.inf, 0.0
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
    lines += ["| kind | problems | plan found | optimal | mean gap | worst gap | bound tight |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind, number in sorted(count.items()):
        plan = np.array([p for k, p, _ in outcomes if k == kind])
        bound = np.array([b for k, _, b in outcomes if k == kind])
        found = np.isfinite(plan)
        lines.append(
            f"| {kind} | {number} | {found.mean():.2%} | {(plan < 1e-9).mean():.2%} "
            f"| {plan[found].mean():.1e} | {plan[found].max():.3f} | {(bound < 1e-9).mean():.2%} |"
        )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
