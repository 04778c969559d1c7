"""CP-SAT (OR-Tools): the formulation in whole numbers, rounded so that its bound stays valid."""

from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import ProblemError, SolverError
from moeplace.exact.load import load_ortools
from moeplace.exact.model import Model
from moeplace.exact.solvers import Answer, Request

#: Steps of a continuous column of range 1: makespans, whose error is the bound's, and shares.
GRID, SHARES = 1 << 24, 1 << 22
#: Relative gaps below this are the grid's; CP-SAT may take minutes for the last of them.
LEAST_GAP = 1e-7
#: Continuous columns take at most 2**RANGE values.
RANGE = 34
#: The objective stays below 2**OBJECTIVE: far larger ones make CP-SAT slow, and deaf to limits.
OBJECTIVE = 50
#: Rows are scaled by powers of two (so that the factor of a makespan stays exact): sums stay below
#: 2**LARGEST, and with whole columns less is enough, 2**MIXED.
LARGEST, MIXED = 50, 40


def to_integers(model: Model) -> tuple[Any, list[Any], float, FloatArray]:
    """A CP-SAT model that every solution of `model` satisfies, at no higher an objective.

    A continuous column x becomes the whole number k = floor(q x), so x lies in [k, k + 1) / q.
    A row sum a_j x_j <= b then implies sum a_j k_j / q_j <= b + sum of |a_j| / q_j over continuous
    columns with negative a_j; multiplied by a scale, coefficients are rounded down (k_j >= 0) and
    so is the right-hand side. Rows of whole columns and whole numbers stay as they are.

    Returns
    -------
    model, variables, factor, steps
        The CP-SAT objective times `factor` is at most cost . x; steps q [columns].
    """
    load_ortools()
    from ortools.sat.python import cp_model

    made = cp_model.CpModel()
    shares = ~model.whole & (model.low == 0) & (model.high == 1.0)
    widest = np.frexp(np.maximum(model.high, 1.0))[1]  # sums of a row stay below 2**62
    grid = np.minimum(float(GRID), 2.0 ** (RANGE - widest))
    steps = np.where(model.whole, 1.0, np.where(shares, float(SHARES), grid))
    variables = []
    for n, name in enumerate(model.columns):
        low, most = float(model.low[n]), float(model.high[n])
        least = round(low) if model.whole[n] else int(np.floor(low * steps[n] - 1e-6))
        high = round(most) if model.whole[n] else int(np.floor(most * steps[n] + 1e-6))
        variables.append(made.new_int_var(max(least, 0), max(high, least, 0), name))
    start, index, value = model.rows.indptr, model.rows.indices, model.rows.data
    for row in range(len(model.row_names)):
        here = slice(start[row], start[row + 1])
        columns, factors = index[here], value[here]
        low, limit = float(model.row_low[row]), float(model.row_high[row])
        mine = [variables[n] for n in columns]
        whole = model.whole[columns].all() and (factors == np.round(factors)).all()
        if whole:
            total = cp_model.LinearExpr.weighted_sum(mine, factors.astype(np.int64))
            if low == limit:
                made.add(total == round(low))
                continue
            if np.isfinite(limit):
                made.add(total <= int(np.floor(limit + 1e-9)))
            if np.isfinite(low):
                made.add(total >= int(np.ceil(low - 1e-9)))
            continue
        for sign, most in ((1.0, limit), (-1.0, -low)):  # as sum <= most
            if not np.isfinite(most):
                continue
            a = sign * factors
            q = steps[columns]
            loose = (~model.whole[columns] & (a < 0)) * np.abs(a) / q
            widest_sum = np.abs(a) @ np.maximum(model.high[columns], 1.0 / q)
            power = LARGEST if (q > 1).all() else MIXED
            power = min(
                power - max(np.frexp(np.abs(a).max())[1], 0), LARGEST - np.frexp(widest_sum)[1]
            )
            scale = 2.0**power
            rounded = np.floor(a / q * scale).astype(np.int64)
            right = int(np.floor((most + loose.sum()) * scale))
            made.add(cp_model.LinearExpr.weighted_sum(mine, rounded) <= right)
    priced = float(np.abs(model.cost) @ np.maximum(model.high, 1.0))
    scale = 2.0 ** (OBJECTIVE - np.frexp(priced)[1])
    cost = np.floor(model.cost / steps * scale).astype(np.int64)
    used = np.flatnonzero(cost)
    made.minimize(cp_model.LinearExpr.weighted_sum([variables[n] for n in used], cost[used]))
    return made, variables, 1.0 / scale, steps


def solve(model: Model, request: Request) -> Answer:
    """Solve by CP-SAT; its bound holds for `model` since the rounding only relaxes."""
    load_ortools()
    from ortools.sat.python import cp_model

    made, variables, factor, steps = to_integers(model)
    if request.hint is not None:
        for n in np.flatnonzero(~np.isnan(request.hint)).tolist():
            made.add_hint(variables[n], int(np.floor(request.hint[n] * steps[n] + 1e-9)))
    solver = cp_model.CpSolver()
    options = solver.parameters
    options.num_workers = request.workers
    options.random_seed = request.seed
    options.relative_gap_limit = max(request.gap, LEAST_GAP)
    options.catch_sigint_signal = False
    # With this step of presolve CP-SAT 9.15 lost the optimum of a model with a budget of replicas
    # over two layers, and claimed a bound above a known plan.
    options.presolve_inclusion_work_limit = 0
    if request.seconds is not None:
        options.max_time_in_seconds = max(request.seconds, 1e-3)
    if request.work is not None:
        options.max_deterministic_time = request.work
    for name, option in request.options.items():
        try:
            setattr(options, name, option)
        except (AttributeError, TypeError, ValueError) as cause:
            why = "there is none" if isinstance(cause, AttributeError) else "wrong type of value"
            raise ProblemError(
                f"CP-SAT does not take the parameter {name}={option!r}: {why}. See its "
                "SatParameters."
            ) from cause
    if request.log is not None:
        options.log_search_progress = True
        options.log_to_stdout = False
        solver.log_callback = request.log
    if request.stop is not None:
        request.stop.on_stop(solver.stop_search)
    first: list[float] = []

    class Seen(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            price = self.objective_value * factor + model.constant
            if not first:
                first.append(price)
            if request.incumbent is not None:
                request.incumbent(price, self.best_objective_bound * factor + model.constant)

    name = solver.status_name(solver.solve(made, Seen()))
    if name == "MODEL_INVALID" and request.options and not made.validate():
        names = ", ".join(request.options)
        raise ProblemError(f"CP-SAT does not take its parameters ({names}): out of range.")
    if name == "MODEL_INVALID":
        raise SolverError(f"CP-SAT refuses the model: {made.validate()}")
    if name == "INFEASIBLE":
        return Answer(ended="infeasible", bound=np.inf)
    bound = solver.best_objective_bound * factor + model.constant
    if name == "UNKNOWN":
        return Answer(ended="unknown", bound=bound if np.isfinite(bound) else -np.inf)
    return Answer(
        ended="optimal" if name == "OPTIMAL" else "feasible",
        bound=bound,
        values=np.array([solver.value(v) for v in variables]) / steps,
        first=first[0] if first else None,
    )
