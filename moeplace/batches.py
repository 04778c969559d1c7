"""What random batches add to a plan's price.

`evaluate` prices a plan at the expected counts of a forward pass. Real batches scatter around
them, and the slowest rank of each batch is what a layer waits for: by Jensen's inequality the
expected makespan is above the makespan of expected counts (a maximum is convex), most where a
pass has few tokens. Batches are drawn here as if each assignment chose its replica by itself
(multinomial over slots): no correlation between the experts of one token, or within a request.
"""

from dataclasses import dataclass

import numpy as np

from moeplace._check import FloatArray
from moeplace.dispatch import shares
from moeplace.errors import ProblemError
from moeplace.evaluate import check_fits
from moeplace.plan import EMPTY, Plan, by_rank
from moeplace.problem import Problem, check_problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """A plan over sampled batches.

    Attributes
    ----------
    batches : int
        Forward passes drawn for each window.
    makespan : array [windows, layers]
        Mean time of the slowest rank.
    standard_error : array [windows, layers]
    step_seconds : array [windows]
        Sum over layers of the mean makespans.
    objective : float
        As `Evaluation.objective`, of the mean makespans.
    """

    batches: int
    makespan: FloatArray
    standard_error: FloatArray
    step_seconds: FloatArray
    objective: float


def over_batches(problem: Problem, plan: Plan, batches: int = 64, seed: int = 0) -> Batches:
    """Draw batches of each window's mean size and price them.

    Parameters
    ----------
    problem : Problem
        With `passes`: without them nothing says how large a batch is.
    plan : Plan
        At its stored shares.
    batches : int
    seed : int
        Each layer's draws come from (seed, layer).

    Raises
    ------
    ProblemError
        If there are no passes, or fewer than 2 batches are asked for.
    PlanError
        If the plan does not fit the problem.
    """
    check_problem(problem)
    if problem.loads.passes is None:
        raise ProblemError(
            "Batches need tokens per forward pass: give the loads `passes`, the number of forward "
            "passes in each window."
        )
    if isinstance(batches, bool) or not isinstance(batches, int) or not 2 <= batches <= 1 << 20:
        raise ProblemError(f"Batches must be a whole number from 2 to 2**20, got {batches!r}.")
    check_fits(problem, plan)
    share = shares(problem, plan)
    share = share[None] if share.ndim == 2 else share
    cluster = problem.cluster
    mean = np.empty((problem.windows, problem.layers))
    error = np.empty_like(mean)
    for layer in range(problem.layers):
        draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(layer,)))
        held = plan.slots[layer]
        for window in range(problem.windows):
            part = share[min(window, share.shape[0] - 1), layer]
            load = np.where(held != EMPTY, problem.tokens[window, layer, held] * part, 0.0)
            total = float(load.sum())
            counts = np.zeros((batches, held.size), dtype=np.int64)
            if total > 0:
                # a mean size that is not whole: some batches are one larger
                size = np.floor(total + draw.random(batches)).astype(np.int64)
                counts = draw.multinomial(size, load / total)
            each = np.maximum(by_rank(counts, plan.rank_slots), 0)
            tokens = problem.base[window, layer] + each.sum(axis=2)
            active = (each > 0).sum(axis=2).astype(np.float64)
            slowest = cluster.seconds(tokens, active).max(axis=1)
            mean[window, layer] = slowest.mean()
            error[window, layer] = slowest.std(ddof=1) / np.sqrt(batches)
    return Batches(
        batches=batches,
        makespan=mean,
        standard_error=error,
        step_seconds=problem.step_seconds(mean),
        objective=problem.total(mean),
    )
