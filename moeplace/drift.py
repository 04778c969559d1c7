"""When to re-plan: a monitor of load windows and speeds that says keep or re-plan, and why.

Three triggers. `regret` (ours) asks what a new plan could save, measured against a proven bound
and against the noise of counting. `cosine` is ViBE's (arXiv 2606.00735): how far the mean load
vector has turned. `max-mean` is the imbalance of tokens, which vLLM logs as balancedness and
SGLang compares with ``--eplb-min-rebalancing-utilization-threshold``.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import FloatArray, numbers
from moeplace.bounds import lower_bound
from moeplace.constraints import MaxMoves
from moeplace.errors import ProblemError
from moeplace.evaluate import check_fits, evaluate
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem, check_problem
from moeplace.search.split import at_best_shares

Trigger = Literal["regret", "cosine", "max-mean"]
Action = Literal["keep", "resplit", "replan"]

#: What a trigger's value must exceed, where no threshold is given.
THRESHOLDS: dict[str, float] = {"regret": 0.03, "cosine": 0.05, "max-mean": 1.2}
#: Windows in a row that must exceed it.
PATIENCE: dict[str, int] = {"regret": 3, "cosine": 1, "max-mean": 1}
#: Windows between two looks: ViBE's H.
EVERY: dict[str, int] = {"regret": 1, "cosine": 10, "max-mean": 1}
#: Windows whose mean ViBE compares.
SAMPLES = 100
#: Resamples of the plan's own load whose median regret is the noise floor.
RESAMPLES = 9
#: Windows whose sum regret judges at most.
POOL = 16


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the monitor says of one window.

    Attributes
    ----------
    window : int
        Windows seen before this one.
    action : {"keep", "resplit", "replan"}
        "resplit": new shares for the same placement are enough (weighted routing).
    reason : str
    value, threshold : float
        What the trigger measured, and what it must exceed.
    regret, noise : float or None
        Regret less the gap the plan had when it was made, and its noise floor; regret alone.
    """

    window: int
    action: Action
    reason: str
    value: float
    threshold: float
    regret: float | None = None
    noise: float | None = None


class Monitor:
    """Watches a plan in service.

    Parameters
    ----------
    problem : Problem
        With the loads that the plan was made on; its own `MaxMoves` is put aside. Regret's noise
        floor takes loads as counts of independent tokens: give raw counts, not means.
    plan : Plan
        What the ranks hold.
    trigger : {"regret", "cosine", "max-mean"}
    threshold : float, optional
        By default 0.03, 0.05 or 1.2. Regret's is at least twice the noise floor.
    patience : int, optional
        Windows in a row above the threshold; by default 3 for regret, else 1.
    cooldown : int
        Windows after a change, or a re-plan that was not made, in which nothing is changed.
    every : int, optional
        Look at each so many windows; by default 10 for cosine, else 1.
    samples : int
        Windows whose sum cosine compares and cosine and max-mean re-plan on.
    pool : int, optional
        Most windows whose sum regret judges; it also judges the last 1, 2, 4, ... of them. By
        default as many (16 at most) as bring twice the noise floor down to the threshold.
    seed : int
        Of the resamples.

    Raises
    ------
    ProblemError
        If an option is out of range.
    PlanError
        If the plan does not fit the problem.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        *,
        trigger: Trigger = "regret",
        threshold: float | None = None,
        patience: int | None = None,
        cooldown: int = 10,
        every: int | None = None,
        samples: int = SAMPLES,
        pool: int | None = None,
        seed: int = 0,
    ) -> None:
        check_problem(problem)
        if trigger not in get_args(Trigger):
            choices = ", ".join(get_args(Trigger))
            raise ProblemError(f"Trigger must be one of {choices}, got {trigger!r}.")
        self.trigger = trigger
        self.threshold = THRESHOLDS[trigger] if threshold is None else threshold
        self.patience = PATIENCE[trigger] if patience is None else patience
        self.every = EVERY[trigger] if every is None else every
        self.cooldown, self.samples, self.pool, self.seed = cooldown, samples, pool, seed
        if not 0 <= self.threshold < float("inf"):
            raise ProblemError(f"The threshold must be finite and at least 0, got {threshold!r}.")
        for name, value, least in (
            ("patience", self.patience, 1),
            ("every", self.every, 1),
            ("cooldown", cooldown, 0),
            ("samples", samples, 1),
            ("pool", 1 if pool is None else pool, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ProblemError(
                    f"Monitor: {name} must be a whole number from {least}, got {value!r}."
                )
        rules = [rule for rule in problem.constraints if not isinstance(rule, MaxMoves)]
        self.problem = replace(problem, constraints=rules).aggregate()
        self.windows = 0
        self.streak = 0
        self.quiet = 0  # windows of cooldown left
        self._scale = 1  # windows that regret judged by last
        self.recent = deque[tuple[FloatArray, float]](maxlen=max(samples, POOL, pool or 1))
        self.adopt(plan)
        self.quiet = 0

    # ------------------------------------------------------------------------- what happens

    def adopt(self, plan: Plan, loads: LoadHistogram | None = None) -> None:
        """The ranks hold `plan` from now on; it was made on `loads` (by default as before)."""
        if loads is not None:
            self.problem = self._on(loads.aggregate())
        check_fits(self.problem, plan)
        self.plan = plan
        self._known = dict[tuple[int, bool], float]()
        self._own: float | None = None
        self.rest()
        if self.trigger != "cosine":
            self.recent.clear()

    def rest(self) -> None:
        """Start the cooldown: a change was made, or does not pay now."""
        self.streak, self.quiet = 0, self.cooldown

    def speeds(self, speeds: Any) -> None:
        """New speeds [ranks], measured in service, in the unit of the problem's cluster.

        Plan and regret are judged by them from the next window on. The plan's own gap stays that
        of the speeds it was made for.
        """
        own = self.own
        cluster = replace(self.problem.cluster, speeds=speeds)
        if cluster.ranks != self.problem.ranks or cluster.speeds.size != self.problem.ranks:
            raise ProblemError(f"Speeds need {self.problem.ranks} numbers, one for each rank.")
        self.problem = replace(self.problem, cluster=cluster)
        self._own = own

    def observe(self, tokens: Any, passes: float | None = None) -> Decision:
        """Take one window of load, tokens [layers, experts], and decide.

        Raises
        ------
        ProblemError
            If the window has another shape than the problem, or is no legal load.
        """
        tokens = numbers(tokens, "Window", ("layer", "expert"), ProblemError)
        if tokens.shape != (self.problem.layers, self.problem.experts):
            raise ProblemError(
                f"A window must have {self.problem.layers} layers x {self.problem.experts} "
                f"experts, got {tokens.shape}: it was recorded from another model."
            )
        if (passes is None) != (self.problem.loads.passes is None):
            known = "unknown" if passes is None else "known"
            raise ProblemError(
                f"The window's passes are {known}, unlike those of the loads that the plan was "
                "made on: give both or none."
            )
        window, self.windows = self.windows, self.windows + 1
        if not tokens.any():
            return self._keep(window, "the window holds no tokens")
        self.recent.append((tokens, 0.0 if passes is None else float(passes)))
        cooling, self.quiet = self.quiet > 0, max(self.quiet - 1, 0)
        if self.windows % self.every:
            return self._keep(window, f"looks at every {self.every}th window")
        decision = {
            "regret": self._regret,
            "cosine": self._cosine,
            "max-mean": self._max_mean,
        }[self.trigger](window)
        if decision.action == "keep":
            self.streak = 0
            return decision
        self.streak += 1
        if cooling:
            return replace(decision, action="keep", reason=f"{decision.reason}; in cooldown")
        if self.streak < self.patience:
            reason = f"{decision.reason}; {self.streak} of {self.patience} windows in a row"
            return replace(decision, action="keep", reason=reason)
        return decision

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on as if nothing had happened, as plain values."""
        most = self.samples if self.trigger != "regret" else max(self.pool or POOL, self.streak)
        recent = list(self.recent)[-most:]
        passes = self.problem.loads.passes
        return {
            "slots": self.plan.slots.tolist(),
            "split": None if self.plan.split is None else self.plan.split.tolist(),
            "allow_duplicates": self.plan.allow_duplicates,
            "own": self.own,
            "speeds": self.problem.cluster.speeds.tolist(),
            "tokens": self.problem.loads.tokens[0].tolist(),
            "passes": None if passes is None else float(passes[0]),
            "windows": self.windows,
            "streak": self.streak,
            "quiet": self.quiet,
            "recent": [tokens.tolist() for tokens, _ in recent],
            "recent_passes": [passes for _, passes in recent],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, of a monitor of the same problem and options.

        Raises
        ------
        ProblemError
            If the state's loads have another shape.
        PlanError
            If the state's plan does not fit.
        """
        passes = state["passes"]
        loads = LoadHistogram(
            tokens=state["tokens"],
            passes=None if passes is None else np.array([passes]),
            phase=self.problem.loads.phase,
        )
        if (loads.layers, loads.experts) != (self.problem.layers, self.problem.experts):
            raise ProblemError(
                f"The state is of {loads.layers} layers x {loads.experts} experts, the problem "
                f"of {self.problem.layers} x {self.problem.experts}."
            )
        plan = Plan(
            slots=state["slots"],
            rank_slots=self.plan.rank_slots,
            experts=self.plan.experts,
            split=state["split"],
            allow_duplicates=state["allow_duplicates"],
        )
        self.adopt(plan, loads)
        self.speeds(state["speeds"])
        self._own = state["own"]
        self.windows, self.streak, self.quiet = state["windows"], state["streak"], state["quiet"]
        self.recent.clear()
        for tokens, weight in zip(state["recent"], state["recent_passes"], strict=True):
            axes = ("layer", "expert")
            self.recent.append((numbers(tokens, "Window", axes, ProblemError), weight))

    def _keep(self, window: int, reason: str) -> Decision:
        return Decision(
            window=window, action="keep", reason=reason, value=0.0, threshold=self.threshold
        )

    @property
    def loads(self) -> LoadHistogram:
        """What to re-plan on: the windows that regret judged by, or (cosine, max-mean) all."""
        if self.trigger == "regret":
            return self._sum(max(self._scale, self.streak))
        return self._sum(self.samples)

    def _sum(self, count: int) -> LoadHistogram:
        """The last `count` windows in one."""
        last = list(self.recent)[-count:]
        if not last:
            raise ProblemError("No window has been seen: there is nothing to re-plan on.")
        passes: Any = None
        if self.problem.loads.passes is not None:
            passes = sum(each for _, each in last)
        tokens = np.sum([tokens for tokens, _ in last], axis=0)
        return LoadHistogram(tokens=tokens, passes=passes, phase=self.problem.loads.phase)

    def _scales(self) -> list[int]:
        """Numbers of last windows to sum: 1, 2, 4, ... up to the pool.

        The noise floor falls with the root of the assignments.
        """
        most = self.pool
        if most is None:
            noise = self.noise(self.recent[-1][0].sum(axis=1))
            part = 2 * noise / self.threshold if self.threshold > 0 else POOL
            most = int(min(max(np.ceil(part * part), 1), POOL))
        most = min(most, len(self.recent))
        return [1 << n for n in range(most.bit_length()) if 1 << n < most] + [most]

    @property
    def now(self) -> Problem:
        """The problem of `loads` at the present speeds."""
        return self._on(self.loads)

    # ---------------------------------------------------------------------------- triggers

    def _regret(self, window: int) -> Decision:
        """Judge sums of the last windows and take the one that is furthest above its threshold.

        A large change shows in the last window; a small one needs several against the noise.
        """
        found: Decision | None = None
        for scale in self._scales():
            judged = self._judged(window, scale)
            if found is None or judged.value - judged.threshold > found.value - found.threshold:
                found, self._scale = judged, scale
        assert found is not None
        return found

    def _judged(self, window: int, scale: int) -> Decision:
        problem = self._on(self._sum(scale))
        best = self._gap(problem) - self.own
        noise = self.noise(problem.loads.tokens[0].sum(axis=1))
        threshold = max(self.threshold, 2 * noise)
        found = Decision(
            window=window, action="replan", reason="", value=best, threshold=threshold,
            regret=best, noise=noise,
        )  # fmt: skip
        of = "" if scale == 1 else f" of {scale} windows"
        if best > threshold:
            return replace(found, reason=f"regret{of} {best:.2%} is above {threshold:.2%}")
        if self.problem.routing == "weighted":
            now = self._gap(problem, stored=True) - self.own
            chance = 2 * self.noise(problem.loads.tokens[0].sum(axis=1), stored=True)
            if now > max(threshold, chance):
                reason = f"stored shares cost {now:.2%}{of}, the best shares {best:.2%}"
                return replace(found, action="resplit", reason=reason, value=now)
        reason = f"regret{of} {best:.2%} is within {threshold:.2%}"
        return replace(found, action="keep", reason=reason)

    def _cosine(self, window: int) -> Decision:
        far = self.loads.distance(self.problem.loads)
        layer = int(far.argmax())
        value = float(far[layer])
        fires = value > self.threshold
        side = "above" if fires else "within"
        return Decision(
            window=window,
            action="replan" if fires else "keep",
            reason=f"layer {layer} is {value:.4f} from its load, {side} {self.threshold:g}",
            value=value,
            threshold=self.threshold,
        )

    def _max_mean(self, window: int) -> Decision:
        problem = self._on(self._sum(1))
        found = evaluate(problem, _one_split(self.plan))
        value = float((1 / found.balancedness).mean())
        fires = value > self.threshold
        side = "above" if fires else "within"
        return Decision(
            window=window,
            action="replan" if fires else "keep",
            reason=f"max / mean tokens {value:.3f} is {side} {self.threshold:g}",
            value=value,
            threshold=self.threshold,
        )

    @property
    def own(self) -> float:
        """Gap that the plan had on the load it was made on."""
        if self._own is None:
            self._own = self._gap(self.problem)
        return self._own

    def noise(self, assignments: FloatArray, stored: bool = False) -> float:
        """Noise floor of regret at so many token assignments [layers] in a window.

        Median regret of the plan on multinomial resamples of its own load, less its regret on
        that load; at the best shares for each, or at the stored ones (weighted routing). Kept
        for windows of about the same size.
        """
        size = round(10 * np.log(max(float(assignments.sum()), 1.0)))  # steps of 10 %
        if (size, stored) not in self._known:
            generator = np.random.default_rng([self.seed, size])
            load = self.problem.loads.tokens[0]
            total = load.sum(axis=1, keepdims=True)
            shares = load / np.where(total > 0, total, 1.0)
            counts = np.where(total[:, 0] > 0, np.rint(assignments), 0).astype(np.int64)
            shares[total[:, 0] == 0] = 1.0 / load.shape[1]
            scale = np.where(counts > 0, total[:, 0] / np.maximum(counts, 1), 0.0)[:, None]
            found = []
            for _ in range(RESAMPLES):
                drawn: Any = generator.multinomial(counts, shares) * scale
                loads = LoadHistogram(tokens=drawn, passes=self.problem.loads.passes)
                found.append(self._gap(self._on(loads), stored))
            middle = float(np.median(found)) - self._gap(self.problem, stored)
            self._known[size, stored] = max(middle, 0.0)
        return self._known[size, stored]

    def _gap(self, problem: Problem, stored: bool = False) -> float:
        """Price over the bound, less 1: at the best shares, or at the stored ones."""
        if stored:
            price = evaluate(problem, _one_split(self.plan))
        else:
            price = at_best_shares(problem, self.plan)
        bound = lower_bound(problem, prices=False).total
        return price.objective / bound - 1.0 if bound > 0 else 0.0

    def _on(self, loads: LoadHistogram) -> Problem:
        """The problem with other loads; base loads grow with the passes, or else the tokens."""
        mine = self.problem.loads
        base = np.asarray(self.problem.base_load)
        if base.any():
            if mine.passes is not None and loads.passes is not None:
                base = base * (loads.passes.sum() / mine.passes.sum())
            elif mine.tokens.any():
                base = base * (loads.tokens.sum() / mine.tokens.sum())
        return replace(self.problem, loads=loads, base_load=base, window_weight=None)


def _one_split(plan: Plan) -> Plan:
    """The plan with one share for each slot: the mean over windows where it has several."""
    if plan.split is None or plan.split.ndim == 2:
        return plan
    mean = plan.split.mean(axis=0)
    total = plan._per_expert(mean)
    held = np.maximum(plan.slots, 0)
    sums = np.take_along_axis(total, held, axis=1)
    return plan.with_split(np.where(plan.slots != EMPTY, mean / np.where(sums > 0, sums, 1), 0.0))
