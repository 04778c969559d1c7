"""What a solve returns: a plan, its price, a proven bound, and how the two compare."""

import enum
from dataclasses import dataclass

import numpy as np

from moeplace._check import FloatArray
from moeplace.claims import Bound, layer_floor
from moeplace.constraints import Constraint
from moeplace.errors import MoeplaceError, ProblemError, SolverError
from moeplace.evaluate import Evaluation
from moeplace.plan import Plan
from moeplace.problem import Problem

#: A gap at or below this counts as none: the plan is optimal to rounding.
OPTIMAL_GAP = 1e-9


class Status(enum.StrEnum):
    """How a solve ended; each value is the strongest claim that was proven."""

    OPTIMAL = "optimal"  #: gap <= 1e-9
    WITHIN_GAP = "within_gap"  #: gap <= the gap that was asked for
    FEASIBLE = "feasible"  #: a legal plan; its gap is reported
    INFEASIBLE = "infeasible"  #: proven: no plan obeys the constraints
    NONE_IN_TIME = "none_in_time"  #: neither a plan nor a proof that there is none
    INTERRUPTED = "interrupted"  #: stopped by the user; the best plan so far is kept


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop.

    Parameters
    ----------
    time : float, optional
        Seconds of wall time, from the call. 0 still yields a plan and its bound.
    work : int, optional
        Search steps. With work alone, equal inputs give equal bits on any machine.
    gap : float
        Stop a layer at (1 + gap) x its lower bound.

    Raises
    ------
    ProblemError
        If one is negative or not a number.
    """

    time: float | None = None
    work: int | None = None
    gap: float = 1e-4

    def __post_init__(self) -> None:
        for name, value in (("time", self.time), ("work", self.work), ("gap", self.gap)):
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if value is None and name != "gap":
                continue
            if not (number and 0 <= value < float("inf")):  # type: ignore[operator]
                raise ProblemError(
                    f"The {name} limit must be a finite number of at least 0, got {value!r}."
                )
            if name == "work" and value != int(value):  # type: ignore[arg-type]
                raise ProblemError(f"The work limit counts steps: a whole number, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a running solve tells its callback: its best plan and bound so far.

    Of all layers together, or of one `layer` if a solver works on it.
    """

    seconds: float
    objective: float
    lower_bound: float
    layers_done: int
    layers: int
    layer: int | None = None

    @property
    def gap(self) -> float:
        """Objective / bound - 1."""
        return float(gap(self.objective, self.lower_bound))


@dataclass(frozen=True, kw_only=True, eq=False)
class Layers:
    """Makespan, bound and gap of each layer in each window, [windows, layers].

    They sum to the totals of a `Result` unless a coupled bound lifts the total.
    """

    objective: FloatArray
    lower_bound: FloatArray

    @property
    def gap(self) -> FloatArray:
        """Makespan / bound - 1; 0 where both are 0."""
        return gap(self.objective, self.lower_bound)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Outcome of `solve`.

    Attributes
    ----------
    problem : Problem
    method : str
    status : Status
    bound : Bound
    evaluation : Evaluation or None
        Price of the plan; None if there is none.
    limits : Limits
    seconds : float
        Wall time of the solve; loading and compiling kernels, once a process, is not counted.
    work : int
        Search steps used.
    reason : str
        Why there is no plan.
    clash : tuple of constraints
        Rules that exclude each other, if the status is infeasible and they were found.
    """

    problem: Problem
    method: str
    status: Status
    bound: Bound
    evaluation: Evaluation | None
    limits: Limits
    seconds: float
    work: int = 0
    reason: str = ""
    clash: tuple[Constraint, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan.

        Raises
        ------
        MoeplaceError
            If there is none (status infeasible or none_in_time).
        """
        return self._priced.plan

    @property
    def objective(self) -> float:
        """Price of the plan by `evaluate`; raises MoeplaceError if there is none."""
        return self._priced.objective

    @property
    def lower_bound(self) -> float:
        """Proven: no plan is cheaper. Cut off at the price, which it may exceed by rounding."""
        total = self.bound.total
        return total if self.evaluation is None else min(total, self.evaluation.objective)

    @property
    def gap(self) -> float:
        """Price / bound - 1; 0 if both are 0; infinite without a plan."""
        if self.evaluation is None:
            return float("inf")
        return float(gap(self.objective, self.lower_bound))

    @property
    def layers(self) -> Layers:
        """The same per window and layer."""
        makespan = self._priced.makespan
        floor = self.bound.per_layer
        if self.problem.windows == 1:  # else solvers claim bounds of the mean, not of a window
            floor = layer_floor(self.problem, self.bound)[None]
        return Layers(objective=makespan, lower_bound=np.minimum(floor, makespan))

    @property
    def _priced(self) -> Evaluation:
        if self.evaluation is None:
            raise MoeplaceError(f"There is no plan (status {self.status}): {self.reason}")
        return self.evaluation

    def __str__(self) -> str:
        """Summary with the comparison against contiguous and eplb, computed when printed."""
        from moeplace.compare import summary  # only printing needs the other methods

        return summary(self)


def gap(objective: FloatArray | float, bound: FloatArray | float) -> FloatArray:
    """Objective / bound - 1, elementwise; 0 where both are 0, infinite where only the bound is."""
    above = np.maximum(np.asarray(objective, dtype=float) - bound, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above == 0, 0.0, np.divide(above, bound))


def on_scale(progress: list[Progress], price: float) -> list[Progress]:
    """The steps of a search, or none if some were plans that break a rule and cost less."""
    if any(each.objective < price * (1 - 1e-12) for each in progress):
        return []
    return progress


def finish(
    problem: Problem,
    method: str,
    bound: Bound,
    evaluation: Evaluation,
    limits: Limits,
    seconds: float,
    work: int = 0,
    interrupted: bool = False,
) -> Result:
    """Build the result of a legal plan, with the strongest status that is proven.

    Raises
    ------
    SolverError
        If the bound is above the plan's price, or the plan breaks a rule: a fault of ours.
    """
    if not evaluation.legal:
        raise SolverError(f"Method {method} returned an illegal plan: {evaluation.violations[0]}.")
    over = evaluation.makespan < bound.per_layer * (1 - OPTIMAL_GAP)
    if over.any() or evaluation.objective < bound.total * (1 - OPTIMAL_GAP):
        raise SolverError(
            f"Method {method}: the plan costs {evaluation.objective!r}, below a lower bound of "
            f"{bound.total!r}. One of them is wrong; please report this with the instance."
        )
    left = float(gap(evaluation.objective, bound.total))
    status = Status.FEASIBLE
    if left <= OPTIMAL_GAP:
        status = Status.OPTIMAL
    elif interrupted:
        status = Status.INTERRUPTED
    elif left <= limits.gap:
        status = Status.WITHIN_GAP
    return Result(
        problem=problem,
        method=method,
        status=status,
        bound=bound,
        evaluation=evaluation,
        limits=limits,
        seconds=seconds,
        work=work,
    )
