"""Solve a problem: the methods by name, and the portfolio `auto`."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from moeplace.bounds import lower_bound
from moeplace.errors import PolicyNotApplicable, ProblemError
from moeplace.evaluate import Evaluation
from moeplace.feasible import explain_infeasible, refuted
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Limits, Progress, Result, Status, finish
from moeplace.search.split import at_best_shares

if TYPE_CHECKING:
    from moeplace.search.portfolio import Run

METHODS = ("auto", *POLICIES)


def solve(
    problem: Problem,
    method: str = "auto",
    *,
    time_limit: float | None = None,
    work_limit: int | None = None,
    gap: float = 1e-4,
    seed: int = 0,
    workers: int = 1,
    start: Plan | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Find a plan and prove how far from the optimum it can be.

    Parameters
    ----------
    problem : Problem
        What to solve.
    method : str
        "auto": construction, exchange search and, where a gap is left, the published policies,
        the best of all by `evaluate` for each layer. Or the name of one policy.
    time_limit : float, optional
        Seconds of wall time; loading kernels (once a process) and compiling them (once after
        installation) come before and are not counted. 0 still gives a plan and its bound.
    work_limit : int, optional
        Search steps over all layers. Without a time limit this (by default
        2,000,000 a layer) and the gap end the search, and equal inputs give equal bits on any
        machine, number of workers and process.
    gap : float
        Stop a layer when its makespan is within (1 + gap) of its lower bound.
    seed : int
    workers : int
        Threads over layers.
    start : Plan, optional
        A plan to improve on; the result is never worse. Layers that it solves within the gap
        stay as they are, and where few moves bring a layer within the gap, few are made.
    progress : callable, optional
        Called with a `Progress` now and then.

    Returns
    -------
    Result
        With status infeasible and the reason if the constraints exclude each other.

    Raises
    ------
    ProblemError
        If an option is out of range.
    PolicyNotApplicable
        If the named policy cannot be used, or its plan breaks a rule of the problem.
    PlanError
        If `start` does not fit the problem or breaks a rule.
    """
    # compiled code: imported to be used
    import moeplace.search.compiling  # noqa: F401 - tells when kernels are compiled
    from moeplace.search.portfolio import Run, rehearse, search

    limits = Limits(time=time_limit, work=work_limit, gap=gap)
    if method not in METHODS:
        raise ProblemError(f"Method must be one of {', '.join(METHODS)}, got {method!r}.")
    for name, value, least in (("seed", seed, 0), ("workers", workers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProblemError(f"The {name} must be a whole number from {least}, got {value!r}.")
    rehearse(
        problem.routing == "weighted",
        problem.windows > 1,
        start is not None or problem.max_moves is not None,
        problem.node_groups is not None,
    )
    began = time.perf_counter()
    bound = lower_bound(problem)
    reason = explain_infeasible(problem) or refuted(problem, bound)
    if reason is not None:
        return Result(
            problem=problem,
            method=method,
            status=Status.INFEASIBLE,
            bound=bound,
            evaluation=None,
            limits=limits,
            seconds=time.perf_counter() - began,
            reason=reason,
        )
    if method != "auto":
        evaluation = _policy(problem, method)
        return finish(problem, method, bound, evaluation, limits, time.perf_counter() - began)
    run = Run(problem, bound, limits, began, seed, workers, progress)
    interrupted = False
    try:
        search(run, start)
    except KeyboardInterrupt:
        if run.best is None:
            raise
        interrupted = True
    spent = time.perf_counter() - began
    if run.best is not None:
        return finish(problem, method, bound, run.best, limits, spent, run.work, interrupted)
    return Result(
        problem=problem,
        method=method,
        status=Status.NONE_IN_TIME,
        bound=bound,
        evaluation=None,
        limits=limits,
        seconds=spent,
        work=run.work,
        reason=_none_found(run),
    )


def _none_found(run: "Run") -> str:
    reason = "the search found no plan that obeys all constraints; they may exclude each other"
    if run.nearest is None:
        return reason
    return f"{reason} (the nearest found: {run.nearest.violations[0]})"


def _policy(problem: Problem, name: str) -> Evaluation:
    evaluation = at_best_shares(problem, POLICIES[name](problem))
    if not evaluation.legal:
        raise PolicyNotApplicable(
            f"Policy {name} gives no legal plan here: {evaluation.violations[0]} "
            f"({len(evaluation.violations)} in all). Use method auto; compare shows its price."
        )
    return evaluation
