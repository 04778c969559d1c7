"""CBC through PuLP, and the model files that PuLP writes."""

import logging
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.errors import ProblemError, SolverError
from moeplace.exact.load import load_pulp
from moeplace.exact.model import Model
from moeplace.exact.solvers import Answer, Request, lowered

logger = logging.getLogger(__name__)

#: Seconds that CBC has to write its solution once it was told to stop.
PATIENCE = 3.0
#: What CBC's log says of a model without solutions (the objective is bounded).
INFEASIBLE = "^(Problem is infeasible|Pre-processing says infeasible|Result - Problem proven inf)"
#: What CBC's log says of a parameter that it does not know, or of a value that is none.
NO_OPTION = "(No match for|.* is illegal for .* parameter)"


def to_pulp(model: Model, hint: Any = None) -> tuple[Any, list[Any]]:
    """The model and its variables in PuLP's terms; `hint` [columns] as initial values."""
    pulp = load_pulp()
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
    """Solve by the CBC that comes with PuLP, from files that PuLP writes and reads.

    PuLP's own status says Optimal at a time limit, and it passes no bound on: CBC's log says how
    it ended, and its bound. It runs apart from the terminal, so that Ctrl-C reaches it once.
    """
    pulp = load_pulp()
    with tempfile.TemporaryDirectory(prefix="moeplace-cbc-") as folder:
        mps, start, log, solution = (
            str(Path(folder) / name) for name in ("model.mps", "start.mst", "cbc.log", "cbc.sol")
        )
        made, variables = to_pulp(model, request.hint)
        cbc = pulp.COIN_CMD(path=pulp.apis.coin_api.pulp_cbc_path)
        written, names, rows, _ = made.writeMPS(mps, rename=1)
        options: dict[str, Any] = {
            "threads": request.workers if request.workers > 1 else None,
            "sec": None if request.seconds is None else max(request.seconds, 0.01),
            "timeMode": "elapsed",
            "ratioGap": request.gap,
            "allowableGap": 0,
            "increment": 1e-9,  # solutions that are better by less are not looked for
            "primalTolerance": 1e-9,
            "randomCbcSeed": request.seed + 1,
            **request.options,
        }
        command = [cbc.path, mps]
        if request.hint is not None:
            cbc.writesol(start, made, written, names, rows)
            command += ["-mips", start]
        for name, value in options.items():
            if value is not None:
                command += [f"-{name}", str(value)]
        command += ["-solve", "-printingOptions", "all", "-solution", solution]
        ended = 0
        try:
            ended = _run(command, log, request)
            lines = Path(log).read_text(errors="replace").splitlines()
            _, found, _, _, _, status = cbc.readsol_MPS(solution, made, written, names, rows)
        except OSError as cause:  # killed before it wrote anything
            if request.stop is not None and request.stop.called:
                return Answer(ended="unknown", bound=-np.inf)
            if ended < 0 and request.seconds is not None:  # as when time is out in its presolve
                logger.warning("CBC ended by signal %d at its time limit: no answer", -ended)
                return Answer(ended="unknown", bound=-np.inf)
            raise SolverError(f"CBC failed: {cause}") from cause
    for line in lines:
        if request.log is not None:
            request.log(line)
        if request.options and re.match(NO_OPTION, line):
            names = ", ".join(request.options)
            raise ProblemError(
                f"CBC does not take its parameters ({names}): {line.strip()!r}. Correct them."
            )
    text = "\n".join(lines)
    solved = status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if not solved and re.search(INFEASIBLE, text, re.MULTILINE):
        return Answer(ended="infeasible", bound=np.inf)
    proven = status == pulp.LpSolutionOptimal and "Result - Optimal solution found" in text
    values = np.array([found[variable.name] for variable in variables], dtype=float)
    bound = -np.inf
    if proven and request.gap == 0:
        bound = float(model.cost @ values)  # then CBC writes the objective alone
    elif possible := re.findall(r"best possible ([-+.\de]+)", text):
        bound = float(possible[-1])
    elif rounded := re.findall(r"^Lower bound: +(\S+)", text, re.MULTILINE):
        bound = float(rounded[-1]) - 5e-4  # three digits, rounded up as well as down
    return Answer(
        ended="optimal" if proven else "feasible" if solved else "unknown",
        bound=lowered(bound) + model.constant,
        values=values if solved else None,
    )


def _run(command: list[str], log: str, request: Request) -> int:
    """Run CBC until it ends, or is told to stop and does so soon; its exit code, 0 if not ended."""
    with Path(log).open("w") as out:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            if request.stop is not None:
                request.stop.on_stop(lambda: running.send_signal(signal.SIGINT))
            while True:
                try:
                    return running.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    if request.stop is not None and request.stop.called:
                        return 0
        finally:
            if running.poll() is None:  # told to stop in vain, or an error here
                running.kill()
                running.wait()
