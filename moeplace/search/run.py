"""One call of `solve`: its limits, and the best legal plan that any stage offers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.bounds import mean_bound
from moeplace.claims import Bound, layer_floor
from moeplace.constraints import (
    CAPACITY_SLACK,
)
from moeplace.errors import PlanError
from moeplace.evaluate import Evaluation, evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.result import Limits, Progress
from moeplace.search.split import at_best_shares
from moeplace.search.state import State

#: Search steps between two looks at the clock, a few milliseconds.
STRIDE = 400_000
#: Search steps for each layer if neither time nor work is limited.
DEFAULT_WORK = 2_000_000


@dataclass
class Run:
    """One call of `solve`: its limits and the best legal plan so far."""

    problem: Problem
    bound: Bound
    limits: Limits
    began: float
    seed: int
    workers: int
    progress: Callable[[Progress], None] | None
    best: Evaluation | None = None
    work: int = 0
    reported: float = 0.0
    from_start: bool = False  # then layers within the gap stay as they are: fewer moves
    quota: IntArray | None = None  # most replicas in each layer [layers], if that is limited
    nearest: Evaluation | None = None  # its tokens break rules; until one is legal
    patience: float = 1.0  # share of the time limit without a plan, after which it is given up

    def late(self, share: float = 1.0) -> bool:
        """Whether the time, or a share of it, is up."""
        limit = self.limits.time
        if self.best is None:
            share *= self.patience
        return limit is not None and self.seconds >= limit * share

    @property
    def seconds(self) -> float:
        """Wall time since the call."""
        return time.perf_counter() - self.began

    @cached_property
    def steps(self) -> float:
        """Search steps allowed over all layers."""
        if self.limits.work is not None:
            return float(self.limits.work)
        return DEFAULT_WORK * self.problem.layers if self.limits.time is None else float("inf")

    @cached_property
    def targets(self) -> FloatArray:
        """Bound [layers] on the makespan of the mean load, on which the search works."""
        if self.problem.windows == 1:
            return np.asarray(self.bound.per_layer[0])
        return mean_bound(self.problem)

    @property
    def open(self) -> BoolArray:
        """Layers [layers] whose best makespan is above the gap, by the mean over windows."""
        if self.best is None:
            return np.ones(self.problem.layers, dtype=np.bool_)
        coupled = self.problem.objective != "mean"
        if coupled and self.best.objective <= self.bound.total * (1 + self.limits.gap):
            return np.zeros(self.problem.layers, dtype=np.bool_)
        reached = self.problem.mean(self.best.makespan)
        bound = layer_floor(self.problem, self.bound)
        return np.asarray(reached > bound * (1 + self.limits.gap))

    @property
    def kept(self) -> Evaluation | None:
        """The best legal plan, or the one whose tokens come nearest to where they may go."""
        return self.nearest if self.best is None else self.best

    def over(self, priced: Evaluation) -> FloatArray:
        """Tokens in each layer [layers] where they may not go, over all windows.

        Above the ranks' capacities, and off their node beyond `MaxOffNode`.
        """
        capacity = self.problem.capacity * (1 + CAPACITY_SLACK)
        over = np.asarray(np.maximum(priced.rank_tokens - capacity, 0.0).sum(axis=(0, 2)))
        excess = priced.off_node_excess
        if excess is None:
            return over
        return np.asarray(over + (excess * self.problem.tokens.sum(axis=2)).sum(axis=0))

    @property
    def closed(self) -> bool:
        """Whether the objective is within the gap."""
        most = self.bound.total * (1 + self.limits.gap)
        return self.best is not None and self.best.objective <= most

    def offer(self, plan: Plan, name: str = "") -> None:
        """Keep the plan where it is better, layer by layer; an illegal one is passed over.

        Layers do not constrain each other (totals of moves and replicas aside), so under the mean
        over windows the best of two plans is the better one in each layer. The worst window and
        CVaR couple layers: there, the better of the two plans, or of their layers mixed, is kept.
        Until a plan obeys token capacities and `MaxOffNode` in all layers, the mixed one is kept as
        `nearest`.

        Raises
        ------
        PlanError
            If the plan is illegal and has a `name`, i.e. is the user's.
        """
        problem = self.problem
        new = at_best_shares(problem, plan) if plan.split is None else evaluate(problem, plan)
        if not new.legal and name:
            raise PlanError(f"{name} breaks a rule of the problem: {new.violations[0]}.")
        if not self._near(new):
            return
        if self.quota is not None and (plan.replicas.sum(axis=1) > self.quota).any():
            return
        old = self.kept
        if old is None:
            self._keep([new])
            return
        better = self._better(new, old)
        if not (new.legal and old.legal):
            more, less = self.over(new), self.over(old)
            better = (more < less) | (more == less) & better
        if self.from_start:
            better &= self.open
        candidates = [old, new] if not self.from_start else [old]
        if better.all():
            candidates.append(new)
        elif better.any():
            candidates.append(evaluate(problem, mix(better, new.plan, old.plan)))
        self._keep(candidates)

    def _better(self, new: Evaluation, old: Evaluation) -> BoolArray:
        """Layers [layers] to be taken from the new plan: where windows cost less, all in all.

        If layers are coupled, one after the other, where the objective falls.
        """
        problem = self.problem
        if problem.objective == "mean":
            return np.asarray(problem.mean(new.makespan) < problem.mean(old.makespan))
        change = (new.makespan - old.makespan) * problem.layer_weight
        steps, least = old.step_seconds, old.objective
        better = np.zeros(problem.layers, dtype=np.bool_)
        for layer in range(problem.layers):
            tried = steps + change[:, layer]
            total = float((tried * problem.risk_weight(tried)).sum())
            if total < least * (1 - 1e-12):
                steps, least, better[layer] = tried, total, True
        return better

    def _near(self, priced: Evaluation) -> bool:
        """Whether a plan breaks no rule but token capacities and `MaxOffNode`."""
        over = priced.rank_tokens > self.problem.capacity * (1 + CAPACITY_SLACK)
        known = np.count_nonzero(over)
        if priced.off_node_excess is not None:
            known += np.count_nonzero(priced.off_node_excess)
        return len(priced.violations) == known

    def _keep(self, candidates: list[Evaluation]) -> None:
        legal = [priced for priced in candidates if priced.legal]
        if legal:
            self.best = min(legal, key=lambda priced: priced.objective)
            return
        near = [priced for priced in candidates if self._near(priced)]
        self.nearest = min(near, key=lambda priced: (self.over(priced) > 0).sum())

    def report(self, state: State) -> None:
        """Tell the callback of the best plan and the bound, at most ten times a second.

        Where the state's makespans are not the price (several windows, shares, an engine's rule,
        latency models) its plan is priced, twice a second; shares are dear, so there the best plan
        that was kept is told.
        """
        problem, now = self.problem, time.perf_counter()
        apart = problem.windows > 1 or problem.routing != "even" or problem.cluster.nonlinear
        if self.progress is None or now - self.reported < (0.5 if apart else 0.1):
            return
        self.reported = now
        makespan, bound = state.makespan * state.unit, self.targets
        price = float((makespan * problem.layer_weight).sum())
        least = float((bound * problem.layer_weight).sum())
        done = makespan <= bound * (1 + self.limits.gap)
        if apart:
            least, found = self.bound.total, self.kept
            if problem.routing != "weighted" or found is None:
                tried = state.plan(problem)
                new = at_best_shares(problem, tried) if found is None else evaluate(problem, tried)
                if found is None or (new.legal and new.objective < found.objective):
                    found = new
            price, floor = found.objective, layer_floor(problem, self.bound)
            done = problem.mean(found.makespan) <= floor * (1 + self.limits.gap)
        elif self.best is not None:
            price = min(price, self.best.objective)
        self.progress(
            Progress(
                seconds=self.seconds,
                objective=price,
                lower_bound=min(least, price),
                layers_done=int(done.sum()),
                layers=problem.layers,
            )
        )


def part(run: Run, share: float, parts: int) -> Limits:
    """One of `parts` equal parts of what is left of a share of time and work."""
    time, work = run.limits.time, None
    if time is not None:
        time = max(time * share - run.seconds, 0.0) / parts
    if run.steps < float("inf"):
        work = int(max(run.steps * share - run.work, 0) / parts)
    return Limits(time=time, work=work, gap=run.limits.gap)


def chunks(budget: IntArray) -> list[IntArray]:
    """Positions of `budget` in calls of about STRIDE steps, so that clock and Ctrl-C are heeded."""
    call = budget.cumsum() // STRIDE
    return np.split(np.arange(budget.size), np.flatnonzero(np.diff(call)) + 1)


def mix(take: BoolArray, new: Plan, old: Plan) -> Plan:
    """Layers of `new` where `take` [layers] is true, of `old` elsewhere."""
    split = None
    if new.split is not None and old.split is not None:
        split = np.where(take[:, None], new.split, old.split)
    return Plan(
        slots=np.where(take[:, None], new.slots, old.slots),
        rank_slots=old.rank_slots,
        experts=old.experts,
        split=split,
    )
