"""HiGHS and GSCIP through OR-Tools' MathOpt (never through highspy: see `load`)."""

import datetime as dt
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moeplace.errors import ProblemError, SolverError
from moeplace.exact.load import load_highs, load_ortools
from moeplace.exact.model import Model
from moeplace.exact.solvers import Answer, Request, lowered

#: Where a whole number, or a text, may belong among SCIP's parameters.
SCIP_TYPES = {
    int: ("int_params", "long_params", "real_params"),
    str: ("string_params", "char_params"),
}


def to_mathopt(model: Model) -> tuple[Any, list[Any]]:
    """The model and its variables in MathOpt's terms."""
    load_ortools()
    from ortools.math_opt.python import mathopt

    made = mathopt.Model()
    variables = [
        made.add_variable(lb=low, ub=high, is_integer=whole, name=name)
        for low, high, whole, name in zip(
            model.low.tolist(),
            model.high.tolist(),
            model.whole.tolist(),
            model.columns,
            strict=True,
        )
    ]
    start, index, value = (
        part.tolist() for part in (model.rows.indptr, model.rows.indices, model.rows.data)
    )
    bounds = zip(model.row_low.tolist(), model.row_high.tolist(), model.row_names, strict=True)
    for row, (low, high, name) in enumerate(bounds):
        constraint = made.add_linear_constraint(lb=low, ub=high, name=name)
        for at in range(start[row], start[row + 1]):
            constraint.set_coefficient(variables[index[at]], value[at])
    made.objective.is_maximize = False
    made.objective.offset = float(model.constant)
    for column in np.flatnonzero(model.cost):
        made.objective.set_linear_coefficient(variables[column], float(model.cost[column]))
    return made, variables


def solve(model: Model, request: Request, kind: str) -> Answer:
    """Solve by the MathOpt solver `kind`; its dual bound is lowered by the tolerances."""
    if kind == "HIGHS":
        load_highs()
    from ortools.math_opt.python import mathopt
    from ortools.util.python.solve_interrupter import SolveInterrupter

    made, variables = to_mathopt(model)
    options = mathopt.SolveParameters(
        threads=None if kind == "HIGHS" else request.workers,  # HiGHS's threads are global
        relative_gap_tolerance=request.gap,
        absolute_gap_tolerance=0.0,
        random_seed=request.seed,
    )
    if request.seconds is not None:
        options.time_limit = dt.timedelta(seconds=max(request.seconds, 1e-3))
    _pass_on(options, kind, request.options)
    given = mathopt.ModelSolveParameters()
    if request.hint is not None:
        known = np.flatnonzero(~np.isnan(request.hint)).tolist()
        start = {variables[n]: float(request.hint[n]) for n in known}
        given.solution_hints.append(mathopt.SolutionHint(variable_values=start))
    interrupter = None
    if request.stop is not None and kind == "HIGHS":  # GSCIP's event handler fails with one
        interrupter = SolveInterrupter()
        request.stop.on_stop(interrupter.interrupt)
    log = None
    if request.log is not None:
        write = request.log

        def log(lines: Sequence[str]) -> None:
            for line in lines:
                write(line)

    try:
        result = mathopt.solve(
            made,
            mathopt.SolverType[kind],
            params=options,
            model_params=given,
            msg_cb=log,
            interrupter=interrupter,
        )
    except AttributeError as cause:  # how ortools 9.15 fails to tell of a status
        why = f"{kind} through MathOpt refuses the model: {cause.__context__}"
        if request.options and "INVALID_ARGUMENT" in why:
            names = ", ".join(request.options)
            raise ProblemError(f"{why}. Check the solver's own parameters ({names}).") from cause
        raise SolverError(why) from cause
    ended = result.termination
    reason = ended.reason.name
    if reason in ("INFEASIBLE", "INFEASIBLE_OR_UNBOUNDED"):
        return Answer(ended="infeasible", bound=np.inf)
    bound = lowered(ended.objective_bounds.dual_bound)
    if result.has_primal_feasible_solution():
        values = np.array(result.variable_values(variables))
        return Answer(
            ended="optimal" if reason == "OPTIMAL" else "feasible", bound=bound, values=values
        )
    if reason in ("NO_SOLUTION_FOUND", "FEASIBLE"):
        return Answer(ended="unknown", bound=bound)
    raise SolverError(f"{kind} through MathOpt ended with {reason}: {ended.detail}")


def _pass_on(options: Any, kind: str, given: Any) -> None:
    """Set the solver's own parameters, by type of value; SCIP has several for some."""
    if kind == "HIGHS":
        own = options.highs
        tables = {bool: "bool_options", int: "int_options", float: "double_options"}
        own.double_options["mip_feasibility_tolerance"] = 1e-9
        own.double_options["primal_feasibility_tolerance"] = 1e-9
    else:
        own = options.gscip
        tables = {bool: "bool_params", int: "int_params", float: "real_params"}
    for name, value in given.items():
        table = tables.get(type(value), "string_options" if kind == "HIGHS" else "string_params")
        if kind == "GSCIP":
            types = SCIP_TYPES.get(type(value), ())
            table = next(filter(partial(_takes, name, value), types), table)
        getattr(own, table)[name] = value


def _takes(name: str, value: Any, table: str) -> bool:
    """Whether SCIP has a parameter of that type: it is asked with an empty model."""
    from ortools.math_opt.python import mathopt

    options = mathopt.SolveParameters()
    getattr(options.gscip, table)[name] = value
    try:
        mathopt.solve(mathopt.Model(), mathopt.SolverType.GSCIP, params=options)
    except (AttributeError, RuntimeError, ValueError):
        return False
    return True
