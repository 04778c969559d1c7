"""Stages in which one placement serves all windows, or engines' rules or latency price it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.claims import layer_floor
from moeplace.dispatch import FIXED
from moeplace.evaluate import evaluate
from moeplace.search.construct import adopt
from moeplace.search.deal import deal
from moeplace.search.latency import TrueTimes
from moeplace.search.ruled import Ruled, local, undrawn
from moeplace.search.run import Run, chunks
from moeplace.search.state import State
from moeplace.search.windows import Windows

#: Share of time and work after which the experts of two ranks are dealt out anew, and search steps
#: that a trial of that counts as.
DEAL_AFTER, DEAL_STEPS = 0.5, 8_000
#: With fewer slots a rank than this, too few ways to deal them out suit more than two windows.
FEW_SLOTS = 8
#: Rounds of the search over several windows, and its first threshold: this over the slots, times
#: the cost (what one exchange changes shrinks with the number of slots); few slots have few ways
#: around a bad place, so their first threshold is at least the third number over their square.
ROUNDS, HEAT, FEW_HEAT = 20, 0.18, 7.0
#: The first threshold under latency planes or tables: this over the slots of a rank.
TRUE_HEAT = 0.1
#: The same threshold under a fixed dispatch rule, and search steps that a trial there counts as.
RULED_HEAT, RULED_STEPS = 0.6, 8
#: How far the weights of windows move, each round, to those that decide the CVaR.
RISK_STEP = 0.3


def true_targets(run: Run) -> FloatArray:
    """Mean makespans [layers] at which layers are done; 0 where windows are not just averaged."""
    if run.problem.objective != "mean":
        return np.zeros(run.problem.layers)
    return layer_floor(run.problem, run.bound) * (1 + run.limits.gap)


def all_windows(
    run: Run,
    state: State,
    pool: ThreadPoolExecutor,
    layers: IntArray,
    share: float = 1.0,
    allowance: IntArray | None = None,
) -> None:
    """One placement for all windows, or a fixed dispatch rule: anneal under the true price.

    Under latency planes or tables by the true times, with any number of windows. Windows that
    decide move the weights there. `allowance` [layers]: copies that each layer may receive.
    """
    problem = run.problem
    slots = problem.cluster.total_slots
    every: Windows | Ruled | TrueTimes
    if problem.cluster.nonlinear:
        every, effort = TrueTimes(problem, state, allowance, true_targets(run)), 1
        hottest = TRUE_HEAT * problem.ranks / slots
    elif problem.routing in FIXED:
        every, hottest, effort = Ruled(problem, state), RULED_HEAT / slots, RULED_STEPS
    else:
        every, hottest, effort = Windows(problem, state, allowance), max(HEAT, FEW_HEAT / slots), 1
        hottest /= slots
    effort *= problem.windows  # search steps of a trial
    weight = problem.window_weight.copy()
    if problem.objective == "worst":
        weight = np.full(problem.windows, 1.0 / problem.windows)
    trials, began, begun_work = 200, run.seconds, run.work
    whole, dealt = share, isinstance(every, Windows) and allowance is None
    if problem.windows > 2 and state.cap.max() < FEW_SLOTS:
        dealt = False
    if dealt:
        share *= DEAL_AFTER
    for turn in range(ROUNDS):
        if whole == 1.0 and run.late(share):
            break
        if run.late(share) or run.work >= run.steps * share:
            return
        if run.steps < float("inf"):
            left = (run.steps * share - begun_work) / (layers.size * effort * ROUNDS)
            trials = max(int(left), 1)
        cooling = np.array([1 - turn / ROUNDS, 1 - (turn + 1) / ROUNDS])
        heat = np.tile(hottest * cooling, (layers.size, 1))
        for mine in chunks(np.full(layers.size, trials * (10 + effort))):
            every.improve(layers[mine], trials, heat[mine], weight, pool, run.workers)
            run.report(state)
            if run.late(share):
                break
        run.work += trials * layers.size * effort
        if isinstance(every, TrueTimes) and (every.cost <= every.target).all():
            return
        if isinstance(every, Ruled) and problem.max_off_node is not None:
            run.offer(state.plan(problem))
            every.charge(layers, problem.max_off_node)
        if problem.objective != "mean" or np.isfinite(problem.capacity).any():
            run.offer(state.plan(problem))
        if problem.objective == "worst":
            steps = evaluate(problem, state.plan(problem)).step_seconds
            if steps.max() > 0:
                weight /= 1 + 20 * (1 - steps / steps.max())  # no exp: its last bit differs by CPU
                weight /= weight.sum()
        elif problem.objective == "cvar":
            steps = evaluate(problem, state.plan(problem)).step_seconds
            weight += RISK_STEP * (problem.risk_weight(steps) - weight)  # no jumps to and fro
        if problem.objective != "worst" and run.closed:
            return
        if run.limits.time is not None:
            spent = run.seconds - began
            began += spent
            left_time = run.limits.time * share - began
            pace = trials / max(spent, 1e-9)
            trials = max(int(min(pace * left_time / (ROUNDS - turn), 8.0 * trials)), 100)
    if dealt and isinstance(every, Windows):
        deal_out(run, every, weight, pool, whole)


def deal_out(
    run: Run, every: Windows, weight: FloatArray, pool: ThreadPoolExecutor, share: float
) -> None:
    """Deal the experts of two ranks out anew, again and again; most where most is above the bound.

    Where windows decide unequally, those that have time to spare get higher aims.
    """
    problem, state = run.problem, every.state
    bound = run.bound.per_layer  # [windows, layers]
    steps = bound @ problem.layer_weight
    risk = problem.risk_weight(steps)
    spare = np.divide(steps[risk > 0].min(), steps, out=np.ones_like(steps), where=steps > 0)
    aims = bound * np.maximum(spare, 1.0)[:, None] / state.unit
    aims[aims <= 0] = 1.0
    trials = 50
    while not run.late(share) and run.work < run.steps * share:
        run.offer(state.plan(problem))
        if run.closed:
            return
        assert run.kept is not None
        adopt(state, run.kept.plan, np.arange(problem.layers))
        above = weight @ (run.kept.makespan - aims * state.unit) * problem.layer_weight
        layers = np.flatnonzero(above > 0)
        if layers.size == 0:
            return
        layers = layers[np.argsort(-above[layers], kind="stable")]
        some = np.full(layers.size, trials) * (0.5 + 0.5 * above[layers] / above[layers].mean())
        left = (run.steps * share - run.work) / (DEAL_STEPS * some.sum())
        some = np.ceil(some * min(left, 1.0)).astype(np.int64)
        targets = (weight @ aims)[layers] * (1 + run.limits.gap)
        if problem.objective != "mean":
            targets[:] = 0.0
        for mine in chunks(some * DEAL_STEPS):
            deal(every, layers[mine], some[mine], targets[mine], aims, weight, pool, run.workers)
            if run.late(share):
                break
        run.work += int(some.sum()) * DEAL_STEPS
        trials = min(2 * trials, 1_000)


def under_rule(run: Run, state: State, pool: ThreadPoolExecutor) -> None:
    """A fixed dispatch rule: anneal; under sglang-static thrice, later where most is left to gain.

    There the best counts are far apart, and one start seldom suits all layers.
    """
    problem = run.problem
    assert run.kept is not None
    even, weight = run.kept.plan, problem.layer_weight
    tries = [(even, 1, 1.0)]
    if problem.routing == "sglang-static":
        fewer = undrawn(problem, even)
        tries = [(fewer, 1, 0.5), (even, 2, 0.75), (fewer, 4, 1.0)]
        near = local(problem)
        if near is not None and problem.max_off_node is not None:
            tries = [(fewer, 1, 0.3), (near, 1, 0.65), (near, 2, 1.0)]
        elif near is not None:
            tries[1] = (near, 2, 0.75)
    for start, part, share in tries:
        left = (layer_floor(problem, run.bound) - problem.mean(run.kept.makespan)) * weight
        left = np.where(run.over(run.kept) > 0, -np.inf, left)
        layers = np.argsort(left, kind="stable")
        layers = layers[: -(-layers.size // part)]
        adopt(state, start, layers)
        all_windows(run, state, pool, layers, share)
        run.offer(state.plan(problem))
