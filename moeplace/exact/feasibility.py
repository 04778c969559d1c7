"""Whether any plan obeys a problem's rules, by CP-SAT and the formulation without its makespans."""

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np

from moeplace._check import IntArray
from moeplace.bounds import longest
from moeplace.constraints import Constraint, MaxOffNode, MaxReplicas, TokenCapacity
from moeplace.exact import cpsat
from moeplace.exact.model import Model, build
from moeplace.exact.solvers import Ended, Request, Stop
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem

#: Columns (roughly) up to which a model is built.
COLUMNS = 80_000
#: Without these steps of its presolve CP-SAT takes 0.5 s for 256 experts in groups on nodes where
#: it took 6 s.
OPTIONS = {"cp_model_probing_level": 0, "symmetry_level": 0}


def find_placement(
    problem: Problem, seconds: float | None, work: float | None
) -> tuple[Ended, IntArray | None]:
    """Ask for any placement that obeys all rules that the formulation knows.

    Latency does not matter to them, and without token capacities neither do tokens and routing.
    `MaxOffNode`, and capacities under engines' dispatch rules, are left out.

    Parameters
    ----------
    problem : Problem
    seconds, work : float, optional
        Limits of wall time, and of CP-SAT's deterministic measure of work.

    Returns
    -------
    ended : {"optimal", "infeasible", "unknown"}
        Optimal if one was found; "infeasible" is CP-SAT's claim.
    slots : array [layers, slots] or None
    """
    plain = _plain(problem)
    if _columns(plain) > COLUMNS:
        return "unknown", None
    most = longest(plain, plain.tokens, plain.base)
    model = _timeless(build(plain, range(plain.layers), plain.fluid, most))
    stop = Stop()
    request = Request(seconds=seconds, work=work, options=OPTIONS, stop=stop)
    with ThreadPoolExecutor(1) as pool:  # the solver releases the interpreter, so Ctrl-C stops it
        asked = pool.submit(cpsat.solve, model, request)
        try:
            while not wait([asked], timeout=0.1).done:
                pass
        except KeyboardInterrupt:
            stop.stop()
            raise
        answer = asked.result()
    return answer.ended, None if answer.values is None else model.slots(plain, answer.values)


def _plain(problem: Problem) -> Problem:
    """The same rules without what does not matter to them."""
    shared = problem.routing in ("even", "weighted")
    rules: list[Constraint] = [
        rule
        for rule in problem.constraints
        if not isinstance(rule, MaxOffNode) and (shared or not isinstance(rule, TokenCapacity))
    ]
    limited = shared and bool(np.isfinite(problem.capacity).any())
    if not limited:  # then replicas beyond the first and pinned ones never help
        few = np.maximum(problem.pinned.sum(axis=2).max(axis=0), 1)
        few = np.minimum(few, problem.most_replicas)
        rules = [*(r for r in rules if not isinstance(r, MaxReplicas)), MaxReplicas(few)]
    cluster = problem.cluster
    tokens = problem.tokens if limited else np.zeros((1, problem.layers, problem.experts))
    return Problem(
        LoadHistogram(tokens=tokens),
        Cluster(speeds=cluster.speeds, slots=cluster.slots, nodes=cluster.nodes),
        routing=problem.routing if limited else "weighted",
        constraints=rules,
        base_load=problem.base if limited else None,
    )


def _columns(problem: Problem) -> int:
    """Columns of its model, about."""
    replicas = int(problem.allowed.sum())
    if not np.isfinite(problem.capacity).any():
        return replicas
    return replicas * (1 + problem.windows if problem.routing == "weighted" else 4)


def _timeless(model: Model) -> Model:
    """The model without makespans: their rows are dropped, and nothing is minimised."""
    times = [column for block in model.blocks for column in block.time if column >= 0]
    of_times = np.zeros(model.cost.size)
    of_times[times] = 1.0
    kept = np.flatnonzero(abs(model.rows) @ of_times == 0)
    return replace(
        model,
        cost=np.zeros_like(model.cost),
        rows=model.rows[kept],
        row_low=model.row_low[kept],
        row_high=model.row_high[kept],
        row_names=[model.row_names[row] for row in kept.tolist()],
    )
