"""Plans for several windows of load, judged on windows that they were not made on.

A plan for mean, worst window or CVaR fits the windows that it saw, their noise included. What it
is worth shows on others only, and against the plain plan on the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares
from moeplace.solve import solve

#: A plan helps if it is faster by this share, held out, in every fold.
HELPS = 0.01


@dataclass(frozen=True, kw_only=True)
class Score:
    """One way to plan, on one fold.

    Attributes
    ----------
    planned_on : str
    in_sample, held_out, worst : float
        Imbalance ratio over the windows planned on, over the others, and of the worst of these.
    against_sum, worst_against_sum : float
        Held out, against the plan on the sum, as a share: below 0 is faster.
    """

    planned_on: str
    in_sample: float
    held_out: float
    worst: float
    against_sum: float
    worst_against_sum: float


def scores(
    problem: Problem,
    seen: Sequence[int],
    unseen: Sequence[int],
    *,
    time_limit: float = 2.0,
    seed: int = 0,
) -> list[Score]:
    """Plans made on the windows `seen`, priced on the windows `unseen`; the sum comes first.

    Under weighted routing every plan gets the best shares for each window.

    Raises
    ------
    ProblemError
        If a window does not exist, is on both sides, or a side has none.
    """
    both = [*seen, *unseen]
    if not seen or not unseen or len(set(both)) < len(both):
        raise ProblemError("Windows to plan on and to score on: at least one each, none twice.")
    for window in both:
        if not 0 <= window < problem.windows:
            raise ProblemError(f"There is no window {window}: there are {problem.windows}.")
    on, off = (_chosen(problem, part) for part in (seen, unseen))
    half = [0] * (on.windows // 2) + [1] * (on.windows - on.windows // 2)
    ways = [("sum", on.aggregate())]
    if on.windows > 1:
        regimes = replace(on, loads=on.loads.regimes(half), window_weight=None)
        ways += [
            ("mean of windows", replace(on, objective="mean")),
            ("worst window", replace(on, objective="worst")),
            ("CVaR 0.75", replace(on, objective="cvar", cvar_alpha=0.75)),
            ("two regimes, mean", replace(regimes, objective="mean")),
            ("two regimes, worst", replace(regimes, objective="worst")),
        ]
    mean_on, mean_off = (replace(each, objective="mean") for each in (on, off))
    found: list[Score] = []
    for name, way in ways:
        plan = solve(way, time_limit=time_limit, gap=1e-5, seed=seed).plan.with_split(None)
        price = (at_best_shares if off.routing == "weighted" else evaluate)(mean_off, plan)
        sample = (at_best_shares if off.routing == "weighted" else evaluate)(mean_on, plan)
        fluid = mean_off.step_seconds(mean_off.fluid)
        worst = float((price.step_seconds[fluid > 0] / fluid[fluid > 0]).max(initial=1.0))
        base = found[0] if found else None
        found.append(
            Score(
                planned_on=name,
                in_sample=sample.imbalance,
                held_out=price.imbalance,
                worst=worst,
                against_sum=price.imbalance / base.held_out - 1 if base else 0.0,
                worst_against_sum=worst / base.worst - 1 if base else 0.0,
            )
        )
    return found


def folds(problem: Problem) -> dict[str, tuple[list[int], list[int]]]:
    """Windows to plan on and to score on: every other one, both ways, and earlier on later.

    Raises
    ------
    ProblemError
        If there are fewer than four windows.
    """
    count = problem.windows
    if count < 4:
        raise ProblemError(
            f"Holding windows out needs at least 4 of them, got {count}: record more, or cut the "
            "record into more windows."
        )
    every = list(range(count))
    return {
        "even on odd": (every[::2], every[1::2]),
        "odd on even": (every[1::2], every[::2]),
        "earlier on later": (every[: count // 2], every[count // 2 :]),
    }


def verdict(found: dict[str, list[Score]]) -> str:
    """Whether any way to plan is worth it, in a sentence."""
    names = [score.planned_on for score in next(iter(found.values()))[1:]]
    worth = {}
    for name in names:
        gains = [
            -next(score for score in each if score.planned_on == name).against_sum
            for each in found.values()
        ]
        worth[name] = min(gains)
    if not worth or max(worth.values()) < HELPS:
        return (
            "Does not help: no plan for several windows is faster by "
            f"{HELPS:.0%} on windows that it did not see, in every fold. Plan on the sum."
        )
    best = max(worth, key=lambda name: worth[name])
    return f"Helps: planned on {best}, held-out windows are faster by {worth[best]:.1%} or more."


def _chosen(problem: Problem, windows: Sequence[int]) -> Problem:
    return replace(problem, loads=problem.loads.select(list(windows)), window_weight=None)
