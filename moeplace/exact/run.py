"""Exact methods at work: models of layers, time spent where the gap is, claims collected."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.claims import Claim, layer_floor, with_claims
from moeplace.errors import SolverError
from moeplace.evaluate import Evaluation
from moeplace.exact.model import Model, build, cutoffs
from moeplace.exact.solvers import SOLVERS, Answer, Request, Stop
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.result import OPTIMAL_GAP, Progress
from moeplace.search.run import Run

#: Replicas that may exist, over all layers, up to which layers that depend on each other make one
#: model; beyond, prices stand for the rules over all layers.
WHOLE = 40_000
#: Seconds that solvers have to stop when they are told to.
PATIENCE = 5.0
#: Rounds of prices and window weights.
PRICES = 6
#: A solver's deterministic second, in steps of the search.
STEPS = 100_000_000


@dataclass
class Exact:
    """One solver on one problem.

    Attributes
    ----------
    run : Run
        Best plan so far, bound, limits.
    name : str
        A key of `SOLVERS`.
    options : mapping
        The solver's own parameters.
    log : callable, optional
        Called with lines of its log.
    work : float, optional
        Deterministic seconds in all, if time is not limited.
    """

    run: Run
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    log: Callable[[str], None] | None = None
    work: float | None = None
    cold: bool = False
    share: float = 1.0  # of the time limit
    gap: float | None = None  # to stop at, if not the run's
    stop: Stop = field(default_factory=Stop)
    infeasible: bool = False
    hints: list[tuple[float, float]] = field(default_factory=list)  # hinted, first reported

    @property
    def problem(self) -> Problem:
        """The run's problem."""
        return self.run.problem

    def solve(self) -> None:
        """Improve the run's plan and bound until its limits, or nothing is left open.

        A KeyboardInterrupt stops the solvers and is raised again when what they found is kept.
        """
        if not _coupled(self.problem):
            self._layers()
        elif self._replicas() <= WHOLE:
            self._whole()
        else:
            self._prices()

    def _replicas(self) -> int:
        problem = self.problem
        each = int(problem.allowed.sum())
        return each * (problem.windows if problem.routing == "weighted" else 2)

    def left(self) -> float | None:
        """Seconds left; None without a limit."""
        limit = self.run.limits.time
        return None if limit is None else max(limit * self.share - self.run.seconds, 0.0)

    def _layers(self) -> None:
        """Layers that do not depend on each other, in rounds: most to the largest gaps."""
        run, problem = self.run, self.problem
        done = np.zeros(problem.layers, dtype=np.bool_)
        weight = problem.window_weight
        work = self.work
        while True:
            gaps = self._gaps()
            open_layers = np.flatnonzero((gaps > 0) & ~done)
            left = self.left()
            if open_layers.size == 0 or left == 0.0 or self.stop.called:
                return
            part = np.full(open_layers.size, 1.0)
            if np.isfinite(gaps[open_layers]).all():
                part = 0.5 / part.size + 0.5 * gaps[open_layers] / gaps[open_layers].sum()
            part = part / part.sum()
            together = min(run.workers, open_layers.size)
            if left is not None:
                last = open_layers.size == 1 or left < 0.2 * open_layers.size
                left = left * together * (1.0 if last else 0.5)
            if work is not None:
                spend = work if open_layers.size == 1 else work / 2
                work -= spend
            tasks = []
            for layer, mine in zip(open_layers.tolist(), part.tolist(), strict=True):
                seconds = None if left is None else left * mine
                steps = None if work is None else spend * mine
                tasks.append((layer, seconds, steps))
            for layer, ended in self._each(tasks, weight, 0.0, 0.0, run.workers // together):
                done[layer] |= ended
            if work is not None and work < 0.01:
                return
            if left is None and work is None:
                done[:] = True

    def _gaps(self) -> FloatArray:
        """Seconds [layers] that a layer may still save, 0 where it is within the gap."""
        run, problem = self.run, self.problem
        if run.best is None:
            return np.full(problem.layers, np.inf)
        price = problem.mean(run.best.makespan) * problem.layer_weight
        floor = layer_floor(problem, run.bound) * problem.layer_weight
        gap = max(self._gap, OPTIMAL_GAP / 2)
        return np.where(price > floor * (1 + gap), price - floor, 0.0)

    @property
    def _gap(self) -> float:
        return self.run.limits.gap if self.gap is None else self.gap

    def _each(
        self,
        tasks: list[tuple[int, float | None, float | None]],
        weight: FloatArray,
        move_price: float,
        replica_price: float,
        workers: int,
    ) -> list[tuple[int, bool]]:
        """Solve layers alone, several at once; returns (layer, whether its solver finished)."""
        run, problem = self.run, self.problem
        priced = move_price > 0 or replica_price > 0 or problem.objective != "mean"
        ended = []
        if run.best is None or priced or self.cold:
            cut = np.full(run.bound.per_layer.shape, np.inf)
        else:
            cut = cutoffs(problem, run.bound.per_layer, run.best, alone=True)

        def one(task: tuple[int, float | None, float | None]) -> tuple[int, Model, Answer] | None:
            layer, seconds, work = task
            left = self.left()
            if left == 0.0:  # building a model of a real size takes a second, too
                return None
            if seconds is not None and left is not None:
                seconds = min(seconds, left)
            model = build(
                problem,
                [layer],
                run.bound.per_layer,
                cut,
                window_weight=weight,
                move_price=move_price,
                replica_price=replica_price,
            )
            return layer, model, self._ask(model, seconds, work, max(workers, 1))

        found = [each for each in self._run(one, tasks, run.workers) if each is not None]
        slots = None if run.best is None else run.best.plan.slots.copy()
        fresh: dict[int, Any] = {}
        for layer, model, answer in found:
            ended.append((layer, answer.ended in ("optimal", "infeasible")))
            self._claim(model, answer, weight, move_price, replica_price, cut)
            if answer.values is not None:
                fresh[layer] = model.slots(problem, answer.values)[0]
        if slots is None and len(fresh) == problem.layers:
            slots = np.array([fresh[layer] for layer in range(problem.layers)])
        if slots is not None and fresh:
            for layer, mine in fresh.items():
                slots[layer] = mine
            self._offer(slots)
        return ended

    def _offer(self, slots: Any) -> Evaluation | None:
        problem = self.problem
        plan = Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)
        self.run.offer(plan)
        return self.run.best

    def _whole(self) -> None:
        """All layers in one model."""
        run, problem = self.run, self.problem
        if self.left() == 0.0:
            return
        cut = np.full(run.bound.per_layer.shape, np.inf)
        if run.best is not None and not self.cold:
            cut = cutoffs(problem, run.bound.per_layer, run.best, alone=False)
        model = build(problem, range(problem.layers), run.bound.per_layer, cut)

        def one(_: int) -> Answer:
            return self._ask(model, self.left(), self.work, run.workers)

        for answer in self._run(one, [0], 1):
            self._claim(model, answer, None, 0.0, 0.0, cut)
            if answer.values is not None:
                self._offer(model.slots(problem, answer.values))

    def _prices(self) -> None:
        """Large coupled problems: window weights and prices for rules over all layers.

        Weights follow the steps of the plans found, prices what they use of the rules: a
        subgradient method, whose every step gives a bound (see `claims.Claim`).
        """
        run, problem = self.run, self.problem
        rules, budget = problem.max_moves, problem.replica_budget
        weight = problem.window_weight
        if run.best is not None:
            weight = problem.risk_weight(run.best.step_seconds)
        each = run.bound.recomputed / max(problem.layers * problem.experts, 1)
        moves = each if rules is not None and rules.total is not None else 0.0
        replicas = each if budget is not None else 0.0
        for turn in range(PRICES):
            left = self.left()
            if left == 0.0 or self.stop.called:
                return
            seconds = None if left is None else left / (PRICES - turn) / problem.layers
            work = None if self.work is None else self.work / PRICES / problem.layers
            if seconds is not None:
                seconds *= min(run.workers, problem.layers)
            tasks = [(layer, seconds, work) for layer in range(problem.layers)]
            self._each(tasks, weight, moves, replicas, 1)
            best = run.best
            if best is None:
                moves, replicas = 2 * moves, 2 * replicas
                continue
            if rules is not None and rules.total is not None:
                used = int(best.plan.moves_from(rules.current).sum())
                moves *= 0.5 if used < rules.total else 1.5
            if budget is not None:
                held = int((best.plan.slots >= 0).sum())
                replicas *= 0.5 if held < budget else 1.5
            if problem.objective != "mean":
                weight = 0.5 * weight + 0.5 * problem.risk_weight(best.step_seconds)
                weight = weight / weight.sum()

    def _ask(self, model: Model, seconds: float | None, work: float | None, workers: int) -> Answer:
        run, solver = self.run, SOLVERS[self.name]
        hint = None
        if run.best is not None and solver.hint and not self.cold:
            hint = model.values(self.problem, run.best.plan)
        answer = solver.solve(
            model,
            Request(
                hint=hint,
                seconds=seconds,
                work=work if solver.work else None,
                gap=self._gap / 2 if self._gap > 1e-7 else 0.0,
                seed=run.seed,
                workers=workers,
                options=self.options,
                log=self.log,
                incumbent=self._seen(model),
                stop=self.stop,
            ),
        )
        if hint is not None and answer.first is not None and not np.isnan(hint).any():
            self.hints.append((float(model.cost @ hint) + model.constant, answer.first))
        return answer

    def _seen(self, model: Model) -> Callable[[float, float], None]:
        """Tell the run's progress of a solution of `model`."""

        def tell(price: float, bound: float) -> None:
            run = self.run
            now = time.perf_counter()
            if run.progress is None or now - run.reported < 0.1:
                return
            run.reported = now
            alone = len(model.layers) == 1 and self.problem.layers > 1
            run.progress(
                Progress(
                    seconds=run.seconds,
                    objective=price * model.unit,
                    lower_bound=bound * model.unit,
                    layers_done=int((self._gaps() == 0).sum()),
                    layers=self.problem.layers,
                    layer=model.layers[0] if alone else None,
                )
            )

        return tell

    def _claim(
        self,
        model: Model,
        answer: Answer,
        weight: FloatArray | None,
        move_price: float,
        replica_price: float,
        cut: FloatArray,
    ) -> None:
        """Keep what the solver claims; refuse what a known plan contradicts."""
        run, problem = self.run, self.problem
        if answer.ended == "infeasible":
            if np.isfinite(cut[:, list(model.layers)]).all() or run.best is not None:
                raise SolverError(
                    f"{self.name} claims that layers {list(model.layers)} have no plan, but one "
                    "is known. Please report this with the instance."
                )
            self.infeasible = True
            return
        value = float(answer.bound * model.unit)
        if not np.isfinite(value):
            return
        if weight is None and run.best is not None:
            price = run.best.objective
        elif run.best is not None and not (move_price or replica_price) and weight is not None:
            (layer,) = model.layers
            price = float(weight @ run.best.makespan[:, layer]) * problem.layer_weight[layer]
        else:
            price = np.inf
        if value > price * (1 + OPTIMAL_GAP):
            raise SolverError(
                f"{self.name} claims a lower bound of {value!r} for layers {list(model.layers)}, "
                f"above a plan of {price!r}. Please report this with the instance."
            )
        claim = Claim(
            layers=model.layers,
            weight=weight,
            value=value,
            by=f"{self.name} ({SOLVERS[self.name].version})",
            move_price=move_price,
            replica_price=replica_price,
        )
        run.bound = with_claims(problem, run.bound, [claim])

    def _run(self, call: Callable[[Any], Any], tasks: list[Any], workers: int) -> list[Any]:
        """Call in threads (solvers release the interpreter), so that Ctrl-C stops them all.

        A solver that does not stop within PATIENCE is left behind (HiGHS looks up now and then
        only); its thread ends with the process.
        """
        waiting: list[Future[Any]] = [Future() for _ in tasks]
        work = iter(list(zip(waiting, tasks, strict=True)))  # next() of it is atomic

        def serve() -> None:
            for future, task in work:
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(call(task))
                except BaseException as error:
                    future.set_exception(error)
                    for other in waiting:  # those that run go on to their end
                        other.cancel()

        for _ in range(min(max(workers, 1), len(tasks))):
            threading.Thread(target=serve, daemon=True).start()
        try:
            while wait(waiting, timeout=0.1).not_done:
                pass
        except KeyboardInterrupt:
            self.stop.stop()
            for future in waiting:
                future.cancel()
            wait(waiting, timeout=PATIENCE)
            self.interrupted = True
        return [future.result() for future in waiting if future.done() and not future.cancelled()]

    interrupted: bool = False


def _coupled(problem: Problem) -> bool:
    """Whether layers depend on each other."""
    if problem.layers == 1:
        return problem.objective != "mean" and problem.windows > 1
    rules = problem.max_moves
    return (
        (problem.objective != "mean" and problem.windows > 1)
        or (rules is not None and rules.total is not None)
        or problem.replica_budget is not None
    )
