"""Step time against bytes moved: what each budget of moves buys, each with its proven bound."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moeplace._check import IntArray
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves
from moeplace.errors import ProblemError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.migrate import checked_bytes, relabel
from moeplace.plan import Plan, check_plan
from moeplace.problem import Problem, check_problem
from moeplace.result import gap as over
from moeplace.search.split import at_best_shares
from moeplace.solve import solve

#: Received copies a layer that are tried by default.
BUDGETS = (0, 2, 4, 8, 16, 32, 64)
#: Search steps a layer of each solve without a time limit.
STEPS = 350_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One budget of moves and the best plan found under it.

    Attributes
    ----------
    budget : int or None
        Copies that may be received, a layer or in total; None without a limit.
    moves, bytes : int
        What the plan needs.
    plan : Plan
    objective, lower_bound : float
        Price of the plan, and what no plan under this budget beats.
    kept : float
        Share of the gain of unlimited moves; 1 if there is none.
    """

    budget: int | None
    moves: int
    bytes: int
    plan: Plan
    objective: float
    lower_bound: float
    kept: float

    @property
    def gap(self) -> float:
        """Objective / bound - 1."""
        return float(over(self.objective, self.lower_bound))


def tradeoff(
    problem: Problem,
    current: Plan,
    *,
    expert_bytes: int | Sequence[int] | IntArray,
    budgets: Sequence[int] = BUDGETS,
    per: Literal["layer", "total"] = "layer",
    time_limit: float | None = None,
    gap: float = 1e-4,
    seed: int = 0,
    every: bool = False,
) -> list[Point]:
    """Plans by growing budget of moves, "stay" first; a plan that moves more must be better.

    Parameters
    ----------
    problem : Problem
        Its own `MaxMoves`, if any, is put aside.
    current : Plan
        What the ranks hold now.
    expert_bytes : int or array-like [layers]
    budgets : sequence of int
        Received copies to allow, `per` layer or in total. A budget of 0 may still give up copies,
        which changes the shares of even routing at no cost.
    time_limit : float, optional
        Seconds for each solve. By default steps limit it (`STEPS` a layer), not the clock: equal
        inputs give equal plans, on a busy machine too.
    every : bool
        Keep points that another one dominates.

    Raises
    ------
    ProblemError
        If a budget or the bytes of an expert are out of range.
    PlanError
        If the current plan has another shape than the problem.
    """
    check_problem(problem)
    check_plan(current)
    if per not in ("layer", "total"):
        raise ProblemError(f"Budgets are per layer or total, got {per!r}.")
    check_budgets(budgets)
    sizes = checked_bytes(expert_bytes, current.layers)
    rules = [rule for rule in problem.constraints if not isinstance(rule, MaxMoves)]
    free = replace(problem, constraints=rules)
    how: dict[str, Any] = {"time_limit": time_limit, "gap": gap, "seed": seed}
    if time_limit is None:
        how["work_limit"] = STEPS * problem.layers
    staying = at_best_shares(free, current)
    found: list[tuple[int | None, Evaluation, float]]
    found = [(0, staying, _bound(free, current))]
    for budget in sorted({int(budget) for budget in budgets}):
        limit = {"per_layer": budget} if per == "layer" else {"total": budget}
        result = solve(replace(free, constraints=[*rules, MaxMoves(current, **limit)]), **how)
        if result.evaluation is None:
            continue
        price = min(result.evaluation, found[-1][1], key=lambda each: each.objective)
        if price is not result.evaluation and not price.legal:  # two replicas on one rank
            price = result.evaluation
        found.append((budget, price, result.bound.total))
    best = solve(free, **how)
    if best.evaluation is not None:
        renamed = evaluate(free, relabel(free, current, best.plan))
        found.append((None, renamed, best.bound.total))
    points = []
    gain = staying.objective - min(price.objective for _, price, _ in found)
    for limited, price, bound in found:
        by_layer = price.plan.moves_from(current).sum(axis=1)
        points.append(
            Point(
                budget=limited,
                moves=int(by_layer.sum()),
                bytes=int((by_layer * sizes).sum()),
                plan=price.plan,
                objective=price.objective,
                lower_bound=min(bound, price.objective),
                kept=(staying.objective - price.objective) / gain if gain > 0 else 1.0,
            )
        )
    return points if every else undominated(points)


def check_budgets(budgets: Sequence[int]) -> None:
    """Raise ProblemError unless each budget is a whole number from 0."""
    for budget in budgets:
        whole = isinstance(budget, int | np.integer) and not isinstance(budget, bool)
        if not (whole and budget >= 0):
            raise ProblemError(f"A budget must be a whole number of copies from 0, got {budget!r}.")


def _bound(problem: Problem, current: Plan) -> float:
    """What no plan that receives no copy beats."""
    rules = [*problem.constraints, MaxMoves(current, total=0)]
    return lower_bound(replace(problem, constraints=rules), prices=False).total


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both bytes and price, by bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.objective)):
        if not kept or point.objective < kept[-1].objective:
            kept.append(point)
    return kept
