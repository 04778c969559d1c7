"""Which re-plan pays: the plans of `tradeoff`, weighed by what they save and what moving costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from moeplace.errors import ProblemError
from moeplace.migrate import Engine, check_engine, checked_bytes, migrate
from moeplace.plan import Plan, check_plan
from moeplace.problem import Problem, check_problem
from moeplace.search.split import at_best_shares
from moeplace.tradeoff import BUDGETS, Point, tradeoff
from moeplace.transfer import Links, Migration, Mode, Payback, check_slowdown, payback


@dataclass(frozen=True, kw_only=True)
class Economy:
    """What moving weights costs a system, and how long a plan will serve.

    Parameters
    ----------
    expert_bytes : int
        Bytes of one expert's weights; the largest layer's, if they differ.
    links : Links
    steps : float
        Steps until the next re-plan, over which a plan must earn what its migration costs.
    step_seconds : float, optional
        Seconds of a step's MoE layers under the current plan, as measured; needed where the
        problem's own times are not seconds per step (relative speeds, or loads without passes).
    mode : {"stall", "slowed"}
        Whether serving stops while weights move, or goes on slower beside it.
    slowdown, share : float
        As in `payback`, for the latter.
    engine : {"vllm", "sglang"}
    chunk : int, optional

    Raises
    ------
    ProblemError
        If a value is out of range.
    """

    expert_bytes: int
    links: Links
    steps: float
    step_seconds: float | None = None
    mode: Mode = "stall"
    slowdown: float = 0.1
    share: float = 0.5
    engine: Engine = "vllm"
    chunk: int | None = None

    def __post_init__(self) -> None:
        checked_bytes(self.expert_bytes, 1)
        if not 0 <= self.steps < float("inf"):
            raise ProblemError(f"Steps must be a finite number from 0, got {self.steps!r}.")
        if self.step_seconds is not None and not 0 < self.step_seconds <= 1e12:
            raise ProblemError(
                f"Seconds of a step must be above 0 and at most 1e12, got {self.step_seconds!r}."
            )
        if self.mode not in get_args(Mode):
            raise ProblemError(
                f"Mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}."
            )
        check_slowdown(self.slowdown, self.share)
        check_engine(self.engine, self.chunk)

    def before(self, problem: Problem, price: float) -> float:
        """Seconds of a step under the current plan.

        Raises
        ------
        ProblemError
            If neither the problem nor `step_seconds` says it.
        """
        if self.step_seconds is not None:
            return self.step_seconds
        if problem.cluster.speed_unit != "tokens/s" or problem.loads.passes is None:
            raise ProblemError(
                "The problem's times are not seconds per forward pass (its speeds are relative, "
                "or its loads have no passes): give step_seconds, the measured seconds of a "
                "step's MoE layers under the current plan."
            )
        return price


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """The best re-plan, or none.

    Attributes
    ----------
    pays : bool
    reason : str
    point : Point
        The plan that nets most; staying, if nothing pays.
    migration : Migration
    payback : Payback
    net : float
        Seconds won over the economy's steps, the migration's cost taken off.
    points : tuple of Point
        All that were weighed.
    """

    pays: bool
    reason: str
    point: Point
    migration: Migration
    payback: Payback
    net: float
    points: tuple[Point, ...]


def propose(
    problem: Problem,
    current: Plan,
    economy: Economy,
    *,
    budgets: Sequence[int] = BUDGETS,
    time_limit: float | None = None,
    seed: int = 0,
) -> Proposal:
    """The plan that nets most seconds over the economy's steps.

    Parameters
    ----------
    problem : Problem
        The loads and speeds of now, e.g. `Monitor.now`.
    current : Plan
    economy : Economy
    budgets : sequence of int
        Received copies a layer to try; no limit is always tried too.
    time_limit : float, optional
        Seconds for each solve; by default steps limit it, as `tradeoff` says.

    Raises
    ------
    ProblemError
        If seconds per step are not known, or an option is out of range.
    """
    check_problem(problem)
    check_plan(current)
    if not isinstance(economy, Economy):
        raise ProblemError(
            f"What moving costs must be a moeplace.Economy, got {type(economy).__name__}."
        )
    points = tradeoff(
        problem,
        current,
        expert_bytes=economy.expert_bytes,
        budgets=budgets,
        time_limit=time_limit,
        seed=seed,
    )
    stay = at_best_shares(problem, current).objective
    before = economy.before(problem, stay)
    offers = []
    for point in points:
        steps = migrate(
            current,
            point.plan,
            expert_bytes=economy.expert_bytes,
            nodes=problem.cluster.nodes,
            engine=economy.engine,
            chunk=economy.chunk,
        )
        earned = payback(
            steps,
            economy.links,
            before=before,
            after=before * (point.objective / stay if stay > 0 else 1.0),
            slowdown=economy.slowdown,
            share=economy.share,
        )
        offers.append((earned.net(economy.steps, economy.mode), point, steps, earned))
    net, point, steps, earned = max(offers, key=lambda offer: offer[0])
    pays = net > 0 and point.objective < stay
    if pays:
        reason = (
            f"{point.moves} copies save {1 - point.objective / stay:.2%} of a step and are earned "
            f"after {earned.steps(economy.mode):,.0f} of {economy.steps:,.0f} steps"
        )
    else:
        most = 1 - min(each.objective for each in points) / stay if stay > 0 else 0.0
        reason = f"nothing pays: at most {most:.2%} of a step could be saved"
    return Proposal(
        pays=pays,
        reason=reason,
        point=point,
        migration=steps,
        payback=earned,
        net=net,
        points=tuple(points),
    )
