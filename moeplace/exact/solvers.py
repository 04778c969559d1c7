"""Solvers for the formulation: what each can do, and one way to call them all."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

from moeplace._check import FloatArray
from moeplace.exact.model import Model

Ended = Literal["optimal", "feasible", "infeasible", "unknown"]

#: MILP solvers accept rows that are off by so much; their bounds are lowered by it.
TOLERANCE = 1e-6


class Stop:
    """Tells running solvers to stop, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], Any]] = []
        self.called = False

    def on_stop(self, call: Callable[[], Any]) -> None:
        """Have `call` called when stopped; at once if that has happened."""
        with self._lock:
            self._calls.append(call)
            called = self.called
        if called:
            call()

    def stop(self) -> None:
        """Stop every solver that was told of this."""
        with self._lock:
            self.called = True
            calls = list(self._calls)
        for call in calls:
            call()


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to solve a model.

    Attributes
    ----------
    hint : array [columns], optional
        A solution to start from; NaN where unknown.
    seconds, work : float, optional
        Limits of wall time, and of the solver's own deterministic measure of work.
    gap : float
        Relative gap to stop at.
    seed, workers : int
    options : mapping
        The solver's own parameters, passed on as they are.
    log : callable, optional
        Called with each line of the solver's log.
    incumbent : callable, optional
        Called with (objective in units, bound in units) of solutions on the way.
    stop : Stop, optional
    """

    hint: FloatArray | None = None
    seconds: float | None = None
    work: float | None = None
    gap: float = 0.0
    seed: int = 0
    workers: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    log: Callable[[str], None] | None = None
    incumbent: Callable[[float, float], None] | None = None
    stop: Stop | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a solver says of a model.

    Attributes
    ----------
    ended : {"optimal", "feasible", "infeasible", "unknown"}
        The solver's claim; a plan is priced by `evaluate` and a bound stands for itself.
    bound : float
        Its own bound on the objective in units of the model, lowered by its tolerances;
        infinite if it claims that there is no solution, -infinite if it has none.
    values : array [columns] or None
        Best solution.
    first : float or None
        Objective of the first solution that it reported: at a hint, the hint's.
    """

    ended: Ended
    bound: float
    values: FloatArray | None = None
    first: float | None = None


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver and what it can do.

    Attributes
    ----------
    package : str
        Distribution that brings it.
    module : str
        Module of this package with ``solve(model, request) -> Answer``.
    hint : bool
        Takes a start solution.
    work : bool
        Has a deterministic limit of work.
    bound : bool
        Reports a valid bound when stopped early.
    """

    package: str
    module: str
    hint: bool = True
    work: bool = False
    bound: bool = True
    kind: str = ""

    @property
    def version(self) -> str:
        """Version of the distribution."""
        return f"{self.package} {version(self.package)}"

    def solve(self, model: Model, request: Request) -> Answer:
        """Solve a model; a hint or limit that the solver cannot take is left out."""
        module = import_module(f"moeplace.exact.{self.module}")
        answer: Answer = (
            module.solve(model, request, self.kind) if self.kind else module.solve(model, request)
        )
        return answer


#: Solvers by the name of their method.
SOLVERS: dict[str, Solver] = {
    "cp-sat": Solver(package="ortools", module="cpsat", work=True),
    "highs": Solver(package="ortools", module="mathopt", kind="HIGHS"),
    "gscip": Solver(package="ortools", module="mathopt", kind="GSCIP"),
    "cbc": Solver(package="pulp", module="cbc", bound=False),
}


def lowered(bound: float) -> float:
    """A MILP solver's bound, less its tolerances; -infinite if it has none."""
    if not math.isfinite(bound):
        return -math.inf
    return bound - TOLERANCE * (1.0 + abs(bound))
