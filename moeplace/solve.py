"""Solve a problem: checks, one call for all methods, and the result."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from moeplace.auto import WARM_SHARE, asks, auto, is_small, price_open, rehearse_tiny, searched
from moeplace.bounds import lower_bound
from moeplace.clash import Clash, contradict, sought
from moeplace.clash import Search as RuleSearch
from moeplace.dual_bound import worth_pricing
from moeplace.errors import PolicyNotApplicable, ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.feasible import explain_infeasible, refuted
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem, check_problem
from moeplace.result import OPTIMAL_GAP, Limits, Progress, Result, Status, finish
from moeplace.search.split import at_best_shares

if TYPE_CHECKING:
    from moeplace.search.run import Run

#: Exact solvers; see `moeplace.exact.solvers` for what each can do.
EXACT = ("cp-sat", "highs", "gscip", "cbc")
METHODS = ("auto", *EXACT, *POLICIES)
WarmStart = Literal["auto", "lpt", "greedy", "none"]
#: Seconds, or deterministic seconds, of each layer that an exact method has without limits.
DEFAULT_SECONDS = 10.0


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
    warm_start: WarmStart = "auto",
    solver_options: Mapping[str, Any] | None = None,
    solver_log: Callable[[str], None] | None = None,
    fill: bool = False,
) -> Result:
    """Find a plan and prove how far from the optimum it can be.

    Parameters
    ----------
    problem : Problem
        What to solve.
    method : str
        "auto": construction, exchange search and, where a gap is left, the published policies,
        the best of all by `evaluate` for each layer; small layers are then proven by trying every
        placement. "cp-sat", "highs", "gscip", "cbc": the exact formulation, by one solver, from
        the plan of `warm_start`. Or the name of one policy.
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
    warm_start : {"auto", "lpt", "greedy", "none"}
        What exact methods start from: the portfolio's best plan, largest processing time alone,
        greedy EPLB, or nothing.
    solver_options : mapping, optional
        Parameters of an exact method's solver, passed on under its own names.
    solver_log : callable, optional
        Called with each line of the solver's log.
    fill : bool
        Put a replica into every slot that the plan leaves EMPTY, as most engines' files need; it
        may cost time, above all where an activated replica costs some.

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
    check_problem(problem)
    # compiled code: imported to be used
    import moeplace.search.compiling  # noqa: F401 - tells when kernels are compiled
    from moeplace.search.portfolio import rehearse
    from moeplace.search.run import Run

    limits = Limits(time=time_limit, work=work_limit, gap=gap)
    if method not in METHODS:
        raise ProblemError(f"Method must be one of {', '.join(METHODS)}, got {method!r}.")
    if warm_start not in get_args(WarmStart):
        choices = ", ".join(get_args(WarmStart))
        raise ProblemError(f"Warm start must be one of {choices}, got {warm_start!r}.")
    if method not in EXACT and (warm_start != "auto" or solver_options or solver_log is not None):
        raise ProblemError(
            f"Warm start, solver options and solver log are for {', '.join(EXACT)}, not for "
            f"{method}."
        )
    for option, value in (solver_options or {}).items():
        if not isinstance(value, bool | int | float | str):
            raise ProblemError(
                f"The solver's parameter {option} must be a number, true, false or a text, got "
                f"{value!r}."
            )
    if method in EXACT:
        from moeplace.exact.model import refuse_table

        refuse_table(problem)
    if method in EXACT and work_limit is not None and not _has_work(method):
        raise ProblemError(f"{method} has no deterministic measure of work: give a time limit.")
    for name, value, least in (("seed", seed, 0), ("workers", workers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProblemError(f"The {name} must be a whole number from {least}, got {value!r}.")
    rehearse(
        problem.routing == "weighted",
        problem.windows > 1,
        start is not None or problem.max_moves is not None or is_small(problem),
        problem.node_groups is not None,
        "even" if problem.routing == "weighted" else problem.routing,
        problem.cluster.nonlinear,
    )
    if method == "auto" and is_small(problem):
        rehearse_tiny()
    if worth_pricing(problem):
        import scipy.optimize  # noqa: F401 - loaded before the clock starts
    if method in EXACT or (method == "auto" and is_small(problem) and asks(problem)):
        from moeplace.exact.load import load_ortools

        load_ortools()
        import ortools.sat.python.cp_model  # noqa: F401 - loaded before the clock starts
    began = time.perf_counter()
    bound = lower_bound(problem, time_limit, prices=False)
    reason = explain_infeasible(problem) or refuted(problem, bound)
    until = None if time_limit is None else began + time_limit
    rules = RuleSearch(problem, until, seed)  # which of them clash
    if reason is not None:
        clash = rules.known(reason)
        return Result(
            problem=problem,
            method=method,
            status=Status.INFEASIBLE,
            bound=bound,
            evaluation=None,
            limits=limits,
            seconds=time.perf_counter() - began,
            reason=str(clash or reason),
            clash=() if clash is None else clash.rules,
        )
    if method in POLICIES:
        run = Run(problem, bound, limits, began, seed, workers, progress, _policy(problem, method))
        price_open(run)
        assert run.best is not None
        return finish(problem, method, run.bound, run.best, limits, run.seconds)
    ends = replace(limits, gap=max(gap, OPTIMAL_GAP / 2))  # then no more can be proven
    run = Run(problem, bound, ends, began, seed, workers, progress)
    interrupted = False
    clash, claim = None, ""
    try:
        if method == "auto":
            clash = auto(run, start, rules)
        else:
            if start is not None:
                run.offer(start, "The start plan")
            if warm_start == "auto":
                clash = _warm_start(run, start, rules)
            options = solver_options or {}
            if clash is None and _exact(run, start, method, warm_start, options, solver_log):
                claim = f"{method} claims that no plan obeys all rules (its word, not checked)"
                clash = rules.find()
                contradict(run, rules, method)
    except KeyboardInterrupt:
        if run.best is None:
            raise
        interrupted = True
    if fill and run.best is not None:
        from moeplace.search.fill import fill as filled

        run.best = evaluate(problem, filled(problem, run.best.plan))
    spent = time.perf_counter() - began
    if run.best is not None:
        return finish(problem, method, run.bound, run.best, limits, spent, run.work, interrupted)
    reason = str(clash or claim or _none_found(run))
    return Result(
        problem=problem,
        method=method,
        status=Status.INFEASIBLE if clash or claim else Status.NONE_IN_TIME,
        bound=run.bound,
        evaluation=None,
        limits=limits,
        seconds=spent,
        work=run.work,
        reason=reason,
        clash=() if clash is None else clash.rules,
    )


def _has_work(method: str) -> bool:
    from moeplace.exact.solvers import SOLVERS

    return SOLVERS[method].work


def _warm_start(run: "Run", start: Plan | None, rules: RuleSearch) -> Clash | None:
    """A plan for an exact method to begin with; if our search finds none, whether rules clash."""
    limits = run.limits
    steps = 200_000 * run.problem.layers
    work = steps if limits.work is None else int(WARM_SHARE * limits.work)
    time_limit = None if limits.time is None else WARM_SHARE * limits.time
    searched(run, start, Limits(time=time_limit, work=work, gap=limits.gap))
    return sought(run, rules, 2 * WARM_SHARE)


def _exact(
    run: "Run",
    start: Plan | None,
    method: str,
    warm_start: str,
    options: Mapping[str, Any],
    log: Callable[[str], None] | None,
) -> bool:
    """One exact solver from a warm start; True if it claims that there is no plan."""
    from moeplace.exact.run import STEPS, Exact
    from moeplace.exact.solvers import SOLVERS

    problem, limits = run.problem, run.limits
    if warm_start == "greedy":
        with suppress(PolicyNotApplicable):
            run.offer(POLICIES["eplb"](problem))
    elif warm_start == "lpt":
        searched(run, start, Limits(time=0.0, gap=limits.gap))
    price_open(run)
    work_left = None
    if limits.work is not None:
        work_left = max(limits.work - run.work, 0) / STEPS
    elif limits.time is None:
        work_left = DEFAULT_SECONDS * problem.layers
        if not SOLVERS[method].work:
            run.limits = replace(limits, time=run.seconds + work_left)
            work_left = None
    exact = Exact(run, method, options=options, log=log, work=work_left)
    exact.cold = warm_start == "none" and start is None
    exact.solve()
    if exact.interrupted:
        raise KeyboardInterrupt
    return exact.infeasible and run.best is None


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
