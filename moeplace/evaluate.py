"""THE objective: what a plan costs on a problem. Every plan, from every method, is priced here."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplace._check import FloatArray
from moeplace.constraints import Forbid, Pin
from moeplace.dispatch import shares
from moeplace.errors import PlanError
from moeplace.plan import EMPTY, Plan, check_plan
from moeplace.problem import Problem, check_problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Price of a plan.

    Attributes
    ----------
    problem : Problem
    plan : Plan
    rank_tokens : array [windows, layers, ranks]
        Tokens that each rank runs (per forward pass if passes are known), base load included.
    rank_seconds : array [windows, layers, ranks]
        Time of each rank; seconds, or token units if speeds are relative.
    makespan : array [windows, layers]
        Time of the slowest rank.
    step_seconds : array [windows]
        Sum of makespans over layers with their weights.
    objective : float
        Mean or worst window of `step_seconds`.
    violations : tuple of str
        Constraints that the plan breaks, and duplicates on a rank; empty for a legal plan.
    off_node_excess : array [windows, layers] or None
        Under `MaxOffNode`, by how much the share of copies that leave their node is above what may.
    """

    problem: Problem
    plan: Plan
    rank_tokens: FloatArray
    rank_seconds: FloatArray
    makespan: FloatArray
    step_seconds: FloatArray
    objective: float
    violations: tuple[str, ...]
    off_node_excess: FloatArray | None = None

    @property
    def legal(self) -> bool:
        """Whether the plan obeys every rule of the problem."""
        return not self.violations

    @cached_property
    def ratio(self) -> FloatArray:
        """Imbalance ratio [windows, layers]: makespan / fluid bound; 1 for an empty layer."""
        fluid = self.problem.fluid
        return np.where(fluid > 0, self.makespan / np.where(fluid > 0, fluid, 1.0), 1.0)

    @cached_property
    def imbalance(self) -> float:
        """Imbalance ratio of the whole: objective / the same total of the fluid bounds."""
        fluid = self.problem.total(self.problem.fluid)
        return self.objective / fluid if fluid > 0 else 1.0

    @cached_property
    def balancedness(self) -> FloatArray:
        """Mean over most tokens of a rank [windows, layers], as vLLM logs it; 1 if empty."""
        most = self.rank_tokens.max(axis=2)
        mean = self.rank_tokens.mean(axis=2)
        return np.where(most > 0, mean / np.where(most > 0, most, 1.0), 1.0)


def evaluate(problem: Problem, plan: Plan) -> Evaluation:
    """Price a plan at its stored shares (or even ones, if it stores none).

    Raises
    ------
    PlanError
        If the plan has other layers, experts or slots than the problem, or shares that the
        routing cannot realise.
    """
    check_fits(problem, plan)
    share = shares(problem, plan)
    held = np.broadcast_to(np.where(plan.slots != EMPTY, plan.slots, 0), share.shape)
    if share.ndim == 2:
        held, share = held[None], share[None]
    slot_tokens = np.take_along_axis(problem.tokens, held, axis=2) * share
    by_rank = np.maximum(plan.by_rank(slot_tokens), 0.0)
    tokens = problem.base + by_rank.sum(axis=3)
    seconds = problem.cluster.seconds(tokens, problem.cluster.activated(by_rank))
    makespan = seconds.max(axis=2)
    excess = None
    if problem.max_off_node is not None:
        from moeplace.topology import off_node_excess  # which prices plans too

        excess = off_node_excess(problem, plan, problem.max_off_node)
    return Evaluation(
        problem=problem,
        plan=plan,
        rank_tokens=tokens,
        rank_seconds=seconds,
        makespan=makespan,
        step_seconds=problem.step_seconds(makespan),
        objective=problem.total(makespan),
        violations=_violations(problem, plan, tokens, excess),
        off_node_excess=excess,
    )


def check_fits(problem: Problem, plan: Plan) -> None:
    """Raise PlanError if the plan is for another shape than the problem, or no plan."""
    check_problem(problem)
    check_plan(plan)
    for name, mine, theirs in (
        ("layers", plan.layers, problem.layers),
        ("experts", plan.experts, problem.experts),
        ("slots per rank", plan.rank_slots.tolist(), problem.cluster.slots.tolist()),
    ):
        if mine != theirs:
            raise PlanError(
                f"Plan has {_short(mine)} {name} but the problem has {_short(theirs)}: "
                "it was made for another model or cluster."
            )


def _violations(
    problem: Problem, plan: Plan, tokens: FloatArray, excess: FloatArray | None
) -> tuple[str, ...]:
    """Every rule of the problem that the plan breaks, a sentence each.

    `tokens` [windows, layers, ranks] is what ranks run under the plan, `excess`
    [windows, layers] what leaves nodes beyond `MaxOffNode`.
    """
    found = [
        f"layer {layer}: rank {rank} holds two replicas of one expert"
        for layer, rank in np.argwhere(plan.duplicates)
    ]
    single = not _where_they_may(problem, plan)  # there may be tens of thousands of these rules
    for constraint in problem.constraints:
        if single or not isinstance(constraint, Pin | Forbid):
            found += constraint.violations(plan, problem.cluster, tokens)
    if excess is not None and (most := problem.max_off_node) is not None:
        found += [
            f"layer {layer}: {most + excess[window, layer]:.6g} of the copies in window {window} "
            f"leave their node, at most {most:g} may"
            for window, layer in np.argwhere(excess > 0)
        ]
    return tuple(found)


def _where_they_may(problem: Problem, plan: Plan) -> bool:
    """Whether every pin and every forbid is obeyed."""
    if not any(isinstance(rule, Pin | Forbid) for rule in problem.constraints):
        return True
    held = plan.held()
    return not ((held & ~problem.allowed).any() or (problem.pinned & ~held).any())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:56] + " ...]"
