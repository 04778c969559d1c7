"""All that a report tells: plans, bounds, the search, moves, what changes would buy."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.claims import Bound, layer_floor
from moeplace.constraints import MaxMoves
from moeplace.errors import PolicyNotApplicable, ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Progress, Result, on_scale
from moeplace.search.split import at_best_shares
from moeplace.solve import solve
from moeplace.tradeoff import BUDGETS, Point, tradeoff
from moeplace.whatif import Answer, whatif

OURS = "moeplace (auto)"
#: Policies that stand beside our plan when no plan is given.
BESIDE = ("eplb", "eplb_lpt")
#: Seconds of all searches by default, and their parts: the plan, what-if, the trade-off, a plan
#: for each window.
SECONDS = 60.0
PARTS = (0.3, 0.35, 0.25, 0.1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What is known about a problem and some plans.

    Attributes
    ----------
    problem : Problem
    plans : dict of str to Evaluation
        In order: the first is what the ranks hold now, the last ours.
    result : Result
        Our plan and the bound.
    progress : list of Progress
        The search for it.
    points : list of Point
        Step time against moves from the first plan; empty if none was found.
    answers : tuple of Answer
        What changes would buy.
    own : float or None
        Objective if each window had a plan of its own; None with one window.
    expert_bytes : int or None
    notes : list of str
        What could not be told, and why.
    """

    problem: Problem
    plans: dict[str, Evaluation]
    result: Result
    progress: list[Progress]
    points: list[Point]
    answers: tuple[Answer, ...]
    own: float | None
    expert_bytes: int | None
    notes: list[str]

    @property
    def bound(self) -> Bound:
        """The best bound that was proven."""
        return self.result.bound

    @property
    def first(self) -> Evaluation:
        """What the ranks hold now."""
        return next(iter(self.plans.values()))

    @property
    def ours(self) -> Evaluation:
        """The plan of the last search."""
        return self.plans[OURS]

    def floor(self) -> FloatArray:
        """Bound of each layer [layers], mean over windows as in `layer_cost`."""
        return layer_floor(self.problem, self.bound)

    def received(self) -> dict[str, IntArray]:
        """Copies that each plan but the first needs, by layer [layers]."""
        held = self.first.plan
        rest = list(self.plans.items())[1:]
        return {name: found.plan.moves_from(held).sum(axis=1) for name, found in rest}


def layer_cost(found: Evaluation) -> FloatArray:
    """Makespan of each layer [layers], mean over windows by their weights."""
    return found.problem.mean(found.makespan)


def rank_cost(found: Evaluation) -> FloatArray:
    """Time of each rank [layers, ranks], mean over windows by their weights."""
    return found.problem.mean(found.rank_seconds)


def study(
    problem: Problem,
    plans: Mapping[str, Plan] | None = None,
    *,
    time_limit: float = SECONDS,
    expert_bytes: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> Study:
    """Price plans, find our own, and ask what moves and changes would buy.

    Parameters
    ----------
    problem : Problem
    plans : mapping of name to Plan, optional
        The first is what the ranks hold now. By default the current plan of `MaxMoves`, or the
        contiguous one, and EPLB's.
    time_limit : float
        Seconds for all searches together, about.
    expert_bytes : int, optional
        Bytes of one expert; without it, moves are counted in copies.
    seed, workers : int

    Raises
    ------
    ProblemError
        If the time limit is not positive, or the problem has no plan.
    PlanError
        If a plan does not fit the problem.
    """
    if not 0 < time_limit < float("inf"):
        raise ProblemError(f"The time limit must be positive and finite, got {time_limit!r}.")
    notes: list[str] = []
    seconds = [part * time_limit for part in PARTS]
    priced = {
        name: at_best_shares(problem, plan) if plan.split is None else evaluate(problem, plan)
        for name, plan in (plans or {}).items()
    }
    if not priced:
        priced = _usual(problem)
    progress: list[Progress] = []
    result = solve(
        problem, time_limit=seconds[0], seed=seed, workers=workers, progress=progress.append
    )
    if result.evaluation is None:
        raise ProblemError(
            f"The problem has no plan to report on ({result.status}): "
            f"{result.reason or 'give more time'}."
        )
    progress = on_scale(progress, result.objective)
    progress.append(
        Progress(
            seconds=result.seconds,
            objective=result.objective,
            lower_bound=result.lower_bound,
            layers_done=problem.layers,
            layers=problem.layers,
        )
    )
    if not priced:
        notes.append("No plan to compare with was given, and no usual one applies.")
    priced[OURS] = result.evaluation
    held = next(iter(priced.values())).plan
    points: list[Point] = []
    answers: tuple[Answer, ...] = ()
    try:
        points = tradeoff(
            problem,
            held,
            expert_bytes=expert_bytes or 1,
            time_limit=seconds[2] / (len(BUDGETS) + 1),
            seed=seed,
        )
    except ProblemError as cause:
        notes.append(f"What a budget of moves buys could not be asked: {cause}")
    try:
        answers = whatif(problem, time_limit=seconds[1], workers=workers, seed=seed).answers
    except ProblemError as cause:
        notes.append(f"What changes would buy could not be asked: {cause}")
    own = _own(problem, seconds[3], seed) if problem.windows > 1 else None
    return Study(
        problem=problem,
        plans=priced,
        result=result,
        progress=progress,
        points=points,
        answers=answers,
        own=own,
        expert_bytes=expert_bytes,
        notes=notes,
    )


def _usual(problem: Problem) -> dict[str, Evaluation]:
    found: dict[str, Evaluation] = {}
    if problem.max_moves is not None:
        found["current plan"] = at_best_shares(problem, problem.max_moves.current.with_split(None))
    for name in ("contiguous",) * (not found) + BESIDE:
        with suppress(PolicyNotApplicable):
            found[name.replace("eplb_lpt", "eplb + lpt")] = at_best_shares(
                problem, POLICIES[name](problem)
            )
    return found


def _own(problem: Problem, seconds: float, seed: int) -> float | None:
    """Objective if each window had a plan of its own, without moves counted."""
    rules = [rule for rule in problem.constraints if not isinstance(rule, MaxMoves)]
    cost = np.empty((problem.windows, problem.layers))
    for window in range(problem.windows):
        base = np.broadcast_to(problem.base_load, (problem.windows, problem.layers, problem.ranks))[
            window : window + 1
        ]
        alone = replace(
            problem,
            loads=problem.loads.select([window]),
            base_load=base,
            window_weight=None,
            constraints=rules,
        )
        result = solve(alone, time_limit=seconds / problem.windows, seed=seed)
        if result.evaluation is None:
            return None
        cost[window] = result.evaluation.makespan[0]
    return problem.total(cost)
