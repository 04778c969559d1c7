"""How the engine shares an expert's tokens among its replicas."""

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import PlanError
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem


def shares(problem: Problem, plan: Plan) -> FloatArray:
    """Share of its expert's tokens that each slot takes, [layers, slots] or with windows first.

    Even routing: 1 / replicas (vLLM, TensorRT-LLM and SGLang `dynamic`; two copies on one rank
    take two shares). Weighted routing: what the plan stores; a plan without shares is priced
    evenly, as an engine that was given no shares would run it.

    Raises
    ------
    PlanError
        If the plan stores shares that the routing cannot realise, or for another number of
        windows.
    """
    if plan.split is None:
        held = plan.slots != EMPTY
        count = np.take_along_axis(plan.replicas, np.where(held, plan.slots, 0), axis=1)
        return np.where(held, 1.0 / count, 0.0)
    if problem.routing == "even":
        raise PlanError(
            "Plan stores shares but the problem's routing is even: the engine would ignore "
            'them. Drop the shares or set routing="weighted".'
        )
    if plan.split.ndim == 3 and plan.split.shape[0] != problem.windows:
        raise PlanError(
            f"Plan stores shares for {plan.split.shape[0]} windows but the problem has "
            f"{problem.windows}. Re-split the placement for this problem."
        )
    return plan.split
