"""Shadow prices: what a token, a slot and a faster rank are worth, from the LP's duals.

The LP is the formulation without whole numbers. With a plan given, its placement is fixed: under
weighted routing the prices are then those of the plan itself. Without one they are those of the
LP's bound, in which slots hardly ever bind.
"""

import re
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from moeplace._check import FloatArray
from moeplace.errors import ProblemError, SolverError
from moeplace.exact.model import Model, build
from moeplace.plan import Plan
from moeplace.problem import Problem, check_problem

_EXPERT = re.compile(r"_e(\d+)_")
_TIME = re.compile(r"time_l\d+_w(\d+)_g(\d+)$")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prices:
    """Derivatives of the LP's optimum; seconds, or token units if speeds are relative.

    Attributes
    ----------
    objective : array [layers]
        The LP's optimum, layer weights included.
    token : array [windows, layers, experts]
        For one more token of the expert (per forward pass if passes are known).
    slot : array [layers, ranks]
        Saved by one more slot; to the first order, so at most for small changes.
    speed : array [layers, ranks]
        Saved by 1 % more speed.
    """

    objective: FloatArray
    token: FloatArray
    slot: FloatArray
    speed: FloatArray


def shadow_prices(problem: Problem, plan: Plan | None = None) -> Prices:
    """Prices of every layer, for the mean over windows.

    Raises
    ------
    ProblemError
        If latency has planes (an activation has no price of its own), the objective is not the
        mean, or a rule holds over all layers.
    """
    check_problem(problem)
    if problem.cluster.planes is not None:
        raise ProblemError("Shadow prices are for linear speeds, not for latency planes.")
    rules = problem.max_moves
    coupled = problem.replica_budget is not None or (rules is not None and rules.total is not None)
    if coupled or (problem.objective != "mean" and problem.windows > 1):
        raise ProblemError(
            "Shadow prices are for layers that stand alone: drop totals over layers and use the "
            "objective mean."
        )
    shape = (problem.windows, problem.layers, problem.experts)
    token = np.zeros(shape)
    slot, speed = np.zeros((2, problem.layers, problem.ranks))
    objective = np.zeros(problem.layers)
    free = np.full(problem.fluid.shape, np.inf)
    for layer in range(problem.layers):
        model = build(problem, [layer], problem.fluid, free, window_weight=problem.window_weight)
        objective[layer] = _layer(model, problem, layer, plan, token, slot, speed)
    return Prices(objective=objective, token=token, slot=slot, speed=speed)


def _layer(
    model: Model,
    problem: Problem,
    layer: int,
    plan: Plan | None,
    token: FloatArray,
    slot: FloatArray,
    speed: FloatArray,
) -> float:
    low, high = model.low.copy(), model.high.copy()
    times = [n for n, name in enumerate(model.columns) if name.startswith("T_")]
    low[times] = 0.0  # bounds of T would take the price of what they are made of
    if plan is not None:
        fixed = model.values(problem, plan)
        whole = model.whole & ~np.isnan(fixed)
        low[whole] = high[whole] = fixed[whole]
    equal = model.row_low == model.row_high
    up = ~equal & np.isfinite(model.row_high)
    down = ~equal & np.isfinite(model.row_low)
    found = linprog(  # type: ignore[call-overload]
        model.cost,
        A_ub=sparse.vstack([model.rows[up], -model.rows[down]]),
        b_ub=np.concatenate([model.row_high[up], -model.row_low[down]]),
        A_eq=model.rows[equal] if equal.any() else None,
        b_eq=model.row_low[equal] if equal.any() else None,
        bounds=np.stack([low, high], axis=1),
        method="highs",
    )
    if found.status != 0:
        raise SolverError(f"The LP of layer {layer} was not solved: {found.message}")
    dual = np.zeros(model.row_low.size)
    dual[up] = -found.ineqlin.marginals[: int(up.sum())]
    expert_of = np.array(
        [int(m.group(1)) if (m := _EXPERT.search(name)) else -1 for name in model.columns]
    )
    for row, name in enumerate(model.row_names):
        if match := _TIME.match(name):
            window, rank = int(match.group(1)), int(match.group(2))
            here = slice(model.rows.indptr[row], model.rows.indptr[row + 1])
            columns, value = model.rows.indices[here], model.rows.data[here]
            mine = expert_of[columns] >= 0
            spent = value[mine] * found.x[columns[mine]]
            load = problem.tokens[window, layer, expert_of[columns[mine]]]
            price = dual[row] * model.unit
            np.add.at(token[window, layer], expert_of[columns[mine]], price * spent / load)
            speed[layer, rank] += 0.01 * price * (spent.sum() - model.row_high[row])
        elif name.startswith("slots_"):
            slot[layer, int(name.rsplit("_g", 1)[1])] = dual[row] * model.unit
    return float(found.fun + model.constant) * model.unit
