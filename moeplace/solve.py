"""Solve a problem: the methods by name, and the portfolio `auto`."""

import time
from collections.abc import Callable

from moeplace.bounds import lower_bound
from moeplace.errors import ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Limits, Progress, Result, finish


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
    """Find a plan and prove how far from the optimum it can be."""
    began = time.perf_counter()
    limits = Limits(time=time_limit, work=work_limit, gap=gap)
    bound = lower_bound(problem)
    if method not in POLICIES:
        raise ProblemError(f"no method {method!r}")
    evaluation = evaluate(problem, POLICIES[method](problem))
    return finish(problem, method, bound, evaluation, limits, time.perf_counter() - began)
