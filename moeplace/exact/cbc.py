"""CBC through PuLP, and the model files that PuLP writes."""

import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.errors import SolverError
from moeplace.exact.model import Model
from moeplace.exact.solvers import Answer, Request, lowered


def to_pulp(model: Model, hint: Any = None) -> tuple[Any, list[Any]]:
    """The model and its variables in PuLP's terms; `hint` [columns] as initial values."""
    import pulp

    made = pulp.LpProblem("moeplace", pulp.LpMinimize)
    variables = []
    for n, name in enumerate(model.columns):
        low, high = float(model.low[n]), float(model.high[n])
        category = pulp.LpInteger if model.whole[n] else pulp.LpContinuous
        top = high if np.isfinite(high) else None
        variable = made.add_variable(name, low, top, category)
        if hint is not None and not np.isnan(hint[n]):
            variable.setInitialValue(float(np.clip(hint[n], low, high)), check=False)
        variables.append(variable)
    priced = np.flatnonzero(model.cost)
    cost = pulp.LpAffineExpression([(variables[n], float(model.cost[n])) for n in priced])
    made += cost + float(model.constant)
    start, index, value = model.rows.indptr, model.rows.indices, model.rows.data
    for row, name in enumerate(model.row_names):
        at = range(start[row], start[row + 1])
        terms = [(variables[index[n]], float(value[n])) for n in at]
        low, high = float(model.row_low[row]), float(model.row_high[row])
        if low == high:
            made += pulp.LpConstraint(
                pulp.LpAffineExpression(terms), pulp.LpConstraintEQ, name, low
            )
            continue
        if np.isfinite(high):
            made += pulp.LpConstraint(
                pulp.LpAffineExpression(terms), pulp.LpConstraintLE, name, high
            )
        if np.isfinite(low):
            label = f"{name}_least" if np.isfinite(high) else name
            made += pulp.LpConstraint(
                pulp.LpAffineExpression(terms), pulp.LpConstraintGE, label, low
            )
    return made, variables


def solve(model: Model, request: Request) -> Answer:
    """Solve by CBC. PuLP's own status says Optimal at a time limit: `sol_status` is read instead.

    PuLP passes no bound on; CBC's log has it, and says when the gap was closed.
    """
    import pulp

    made, variables = to_pulp(model, request.hint)
    options = [
        "ratioGap 0",
        "allowableGap 0",
        "primalTolerance 1e-9",
        f"randomCbcSeed {request.seed + 1}",
    ]
    if request.gap:
        options[0] = f"ratioGap {request.gap}"
    options += [f"{name} {value}" for name, value in request.options.items()]
    with tempfile.TemporaryDirectory(prefix="moeplace-cbc-") as folder:
        log = Path(folder) / "cbc.log"
        with warnings.catch_warnings():  # PuLP 4 leaves CBC to a package of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = pulp.PULP_CBC_CMD(
                msg=False,
                timeLimit=None if request.seconds is None else max(request.seconds, 0.01),
                threads=request.workers if request.workers > 1 else None,
                warmStart=request.hint is not None,
                options=options,
                logPath=str(log),
                keepFiles=False,
            )
        solver.tmpDir = folder
        try:
            made.solve(solver)
        except (pulp.PulpSolverError, subprocess.SubprocessError, OSError) as cause:
            if request.stop is not None and request.stop.called:
                return Answer(ended="unknown", bound=-np.inf)
            raise SolverError(f"CBC failed: {cause}") from cause
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if request.log is not None:
        for line in lines:
            request.log(line)
    text = "\n".join(lines)
    bound = -np.inf
    for line in lines:
        if line.startswith("Lower bound:"):
            bound = float(line.split(":")[1])
    if made.sol_status in (pulp.LpSolutionInfeasible, pulp.LpSolutionUnbounded) and (
        "proven infeasible" in text or "is infeasible" in text
    ):
        return Answer(ended="infeasible", bound=np.inf)
    if made.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Answer(ended="unknown", bound=-np.inf)
    values = np.array([float(variable.varValue or 0.0) for variable in variables])
    proven = made.sol_status == pulp.LpSolutionOptimal and "Optimal solution found" in text
    if proven:
        bound = float(model.cost @ values)
    return Answer(
        ended="optimal" if proven else "feasible",
        bound=lowered(bound) + model.constant,
        values=values,
    )
