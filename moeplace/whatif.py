"""What a change would buy: slots, GPUs, losses, dispatch; each answer with its proven bound.

An answer is a plan for the changed problem, priced by `evaluate`, and a lower bound on what any
plan could reach there. So "at best" in an answer is a proof, whatever the search missed.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeplace._check import IntArray
from moeplace.bounds import lower_bound
from moeplace.constraints import Constraint, MaxMoves, TokenCapacity
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.plan import Plan
from moeplace.problem import Problem, check_problem
from moeplace.result import OPTIMAL_GAP, Limits
from moeplace.result import gap as over
from moeplace.safety import emptied, halves, twice, twice_bound, unserved, without
from moeplace.search.split import at_best_shares
from moeplace.solve import solve
from moeplace.sweep import sweep

#: Relative slow-down that is asked about.
SLOWER = 0.1
#: Plans within this of the best one count as good as the best.
GOOD = 1e-3
#: Seconds of the whole table by default, and the gap at which a search stops.
SECONDS, GAP = 8.0, 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What one change would do.

    Attributes
    ----------
    question : str
    price : float or None
        Step time of the plan found after the change; None if there is none.
    lower_bound : float or None
        No plan is faster after the change.
    change : float or None
        Price against the base's, as a share: below 0 is faster.
    at_best : float or None
        The same of the bound: no plan changes more than this for the better.
    note : str
    plan : Plan or None
    """

    question: str
    price: float | None = None
    lower_bound: float | None = None
    change: float | None = None
    at_best: float | None = None
    note: str = ""
    plan: Plan | None = None

    @property
    def gap(self) -> float | None:
        """Price / bound - 1."""
        if self.price is None or self.lower_bound is None:
            return None
        return float(over(self.price, self.lower_bound))


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """All answers; the first is the base, the problem as it is."""

    problem: Problem
    answers: tuple[Answer, ...]


def whatif(
    problem: Problem,
    *,
    decode: Problem | None = None,
    slots_most: int | None = None,
    time_limit: float = SECONDS,
    work_limit: int | None = None,
    workers: int = 1,
    seed: int = 0,
) -> Table:
    """Answer all questions that make sense for the problem.

    Parameters
    ----------
    problem : Problem
        Its `MaxMoves` is put aside: changes of hardware need a new plan.
    decode : Problem, optional
        The same model and cluster under decode loads, where `problem` has those of prefill: what
        a placement for each phase buys over one for both.
    slots_most : int, optional
        Slots that a rank's memory has room for; the curve of redundant experts ends there. By
        default two more than the largest rank has, and never more than experts.
    time_limit : float
        Seconds for all answers together.
    work_limit : int, optional
        Search steps of each solve instead: then equal inputs give equal answers.
    workers : int
        Threads.
    seed : int

    Raises
    ------
    ProblemError
        If an option is out of range, or the problem has no plan as it is.
    """
    check_problem(problem)
    if not 0 < time_limit < float("inf"):
        raise ProblemError(f"The time limit must be positive and finite, got {time_limit!r}.")
    limits = Limits(
        time=time_limit / _Questions.SOLVES if work_limit is None else None,
        work=work_limit,
        gap=GAP,
    )
    least = -(-problem.experts // problem.ranks)
    whole = isinstance(slots_most, int | np.integer) and not isinstance(slots_most, bool)
    if slots_most is not None and not (whole and least <= slots_most <= problem.experts):
        raise ProblemError(
            f"Most slots of a rank must be a whole number from {least} (fewer do not hold "
            f"{problem.experts} experts on {problem.ranks} ranks) to {problem.experts} (one for "
            f"each expert), got {slots_most!r}."
        )
    rules = [rule for rule in problem.constraints if not isinstance(rule, MaxMoves)]
    questions = _Questions(replace(problem, constraints=rules), limits, workers, seed)
    usual = min(int(problem.cluster.slots.max()) + 2, problem.experts)
    most = usual if slots_most is None else slots_most
    asked: list[tuple[Any, ...]] = [
        (questions, "slots"),
        (questions, "redundancy", most),
        *((questions, name) for name in ("slow", "lost", "safe", "added", "swapped", "dispatch")),
    ]
    if decode is not None:
        asked.append((questions, "phases", decode))
    answers = [questions.base, *itertools.chain(*sweep(_ask, asked))]
    return Table(problem=problem, answers=tuple(answers))


def _ask(questions: "_Questions", name: str, *more: Any) -> list[Answer]:
    """The answers to one kind of question."""
    return list(getattr(questions, name)(*more))


class _Questions:
    """The questions about one problem, and what they are compared with."""

    #: Solves of a whole table, about: each gets this part of the time.
    SOLVES = 24

    def __init__(self, problem: Problem, limits: Limits, workers: int, seed: int) -> None:
        self.problem = problem
        self.how: dict[str, Any] = {
            "time_limit": limits.time,
            "work_limit": limits.work,
            "gap": limits.gap,
            "workers": workers,
            "seed": seed,
        }
        self.price = 0.0
        self.base = self._solved("as it is", problem)
        if self.base.price is None or self.base.plan is None:
            raise ProblemError(f"The problem has no plan as it is: {self.base.note}")
        self.price, self.plan = self.base.price, self.base.plan
        self.base = self._answer("as it is", self.price, self.base.lower_bound, plan=self.plan)

    def _answer(
        self, question: str, price: float, bound: float | None, note: str = "", **more: Any
    ) -> Answer:
        least = None if bound is None else min(bound, price)
        return Answer(
            question=question,
            price=price,
            lower_bound=least,
            change=self._change(price),
            at_best=None if least is None else self._change(least),
            note=note,
            **more,
        )

    def _change(self, price: float) -> float:
        return price / self.price - 1.0 if self.price > 0 else 0.0

    def _solved(self, question: str, problem: Problem, note: str = "", **more: Any) -> Answer:
        result = solve(problem, **(self.how | more))
        if result.evaluation is None:
            why = f"{result.status}: {result.reason}"
            return Answer(question=question, note="; ".join(filter(None, [note, why])))
        return self._answer(question, result.objective, result.lower_bound, note, plan=result.plan)

    def _tried(
        self, question: str, change: Callable[[], Problem], note: str = "", **more: Any
    ) -> Answer:
        """Solve what `change` makes of the problem, or say why that is no problem."""
        try:
            problem = change()
        except ProblemError as cause:
            return Answer(question=question, note=f"impossible: {cause}")
        return self._solved(question, problem, note, **more)

    def _slots(self, slots: IntArray) -> Problem:
        return replace(self.problem, cluster=replace(self.problem.cluster, slots=slots))

    # ---------------------------------------------------------------------------- questions

    def slots(self) -> Iterator[Answer]:
        """One more slot on every rank, and one fewer."""
        slots = self.problem.cluster.slots
        for more, word in ((1, "one more slot a rank"), (-1, "one fewer slot a rank")):
            yield self._tried(word, lambda more=more: self._slots(np.maximum(slots + more, 0)))  # type: ignore[misc]

    def redundancy(self, most: int) -> Iterator[Answer]:
        """Curve of redundant experts, and the fewest that are as good as any number."""
        problem = self.problem
        experts, ranks = problem.experts, problem.ranks
        fluid = problem.total(problem.fluid)
        least = -(-experts // ranks)
        curve = []
        for each in range(least, max(most, least) + 1):
            redundant = each * ranks - experts
            answer = self._tried(
                f"{redundant} redundant experts ({each} slots a rank)",
                lambda each=each: self._slots(np.full(ranks, each)),  # type: ignore[misc]
            )
            if answer.price is not None:
                curve.append((redundant, answer))
            yield answer
        if curve:
            cheapest = min(answer.price or 0.0 for _, answer in curve)
            fewest, answer = next(
                pair for pair in curve if (pair[1].price or 0.0) <= cheapest * (1 + GOOD)
            )
            assert answer.price is not None
            left = max(1 - fluid / answer.price, 0.0) if answer.price > 0 else 0.0
            yield replace(
                answer,
                question=f"best number of redundant experts: {fewest}",
                lower_bound=min(fluid, answer.price),
                at_best=self._change(min(fluid, answer.price)),
                note="no number of slots, however large, saves more"
                + (f" than {_share(left)} of this" if left > OPTIMAL_GAP else ""),
            )
        if problem.routing == "weighted":
            each = -(-(experts + ranks - 1) // ranks)
            yield self._tried(
                f"ranks - 1 = {ranks - 1} redundant experts",
                lambda: self._slots(np.full(ranks, each)),
                "enough for weighted routing where speeds differ by less than about 30 %",
            )

    def slow(self) -> Iterator[Answer]:
        """One rank 10 % slower: the worst one, before and after a new plan."""
        problem = self.problem
        worst, at = -1.0, 0
        for rank in range(problem.ranks):
            changed = self._speed(rank, 1 - SLOWER)
            price = evaluate(changed, self.plan).objective
            if price > worst:
                worst, at = price, rank
        changed = self._speed(at, 1 - SLOWER)
        yield self._answer(
            f"rank {at} {SLOWER:.0%} slower, plan kept", worst, None, "the worst rank for that"
        )
        yield self._solved(f"rank {at} {SLOWER:.0%} slower, new plan", changed)

    def _speed(self, rank: int, factor: float) -> Problem:
        speeds = np.array(self.problem.cluster.speeds)
        speeds[rank] *= factor
        return replace(self.problem, cluster=replace(self.problem.cluster, speeds=speeds))

    def lost(self) -> Iterator[Answer]:
        """The loss of a rank, and of a node: which hurts most, and what a new plan makes of it."""
        speeds, nodes = self.problem.cluster.speeds, self.problem.cluster.nodes
        assert nodes is not None
        if self.problem.ranks > 1:
            rank = int(speeds.argmax())
            yield self._lost(f"rank {rank} (the fastest) lost", np.arange(speeds.size) == rank)
        names = np.unique(nodes)
        if names.size > 1:
            power = [speeds[nodes == name].sum() for name in names]
            node = int(names[int(np.argmax(power))])
            yield self._lost(f"node {node} (the fastest) lost", nodes == node)

    def _lost(self, question: str, gone: Any) -> Answer:
        only = unserved(self.plan, gone)
        note = f"{only:,} experts of {self.plan.layers} layers unserved until then"
        return self._tried(f"{question}, new plan", lambda: without(self.problem, gone), note)

    def safe(self) -> Iterator[Answer]:
        """Every expert on two ranks, and on two nodes: the cost of surviving a loss."""
        problem = self.problem
        nodes = problem.cluster.nodes
        assert nodes is not None
        for what, group in (("ranks", np.arange(problem.ranks)), ("nodes", nodes)):
            if np.unique(group).size < 2:
                continue
            sides = halves(problem.cluster.speeds, group)
            needs = max(-(-problem.experts // int(side.sum())) for side in (sides, ~sides))
            most = int(problem.cluster.slots.min())
            for each in (needs, needs + 1) if most <= needs else (0,):
                within = self._slots(np.full(problem.ranks, each)) if each else problem
                yield self._safe(f"every expert on two {what}", within, sides, group, each)

    def _safe(
        self, question: str, within: Problem, sides: Any, group: IntArray, each: int
    ) -> Answer:
        note = f"with {each} slots a rank" if each else ""
        try:
            plan = twice(within, sides, self.how)
        except (PlanError, ProblemError) as cause:
            return Answer(question=question, note=f"impossible: {cause}")
        found = at_best_shares(within, plan)
        if not found.legal:
            return Answer(question=question, note=f"none found: {found.violations[0]}")
        worst = max(
            evaluate(within, emptied(within, found.plan, group == one)).objective
            for one in np.unique(group)
        )
        after = f"after a loss {self._change(worst):+.1%} until a new plan"
        bound = max(twice_bound(within), lower_bound(within).total)
        note = "; ".join(filter(None, [note, after]))
        return self._answer(question, found.objective, bound, note, plan=found.plan)

    def added(self) -> Iterator[Answer]:
        """One more rank, and one more node, as fast as the mean and with as many slots."""
        nodes = self.problem.cluster.nodes
        assert nodes is not None
        counts = np.bincount(nodes)
        sizes = [("one rank added", 1)]
        if (counts > 0).sum() > 1:
            sizes.append((f"one node of {int(counts.max())} ranks added", int(counts.max())))
        for question, count in sizes:
            yield self._tried(question, lambda count=count: _with(self.problem, count))  # type: ignore[misc]

    def swapped(self) -> Iterator[Answer]:
        """Which GPU to swap out first: the bound says for which one most can be gained."""
        problem = self.problem
        speeds = problem.cluster.speeds
        median = float(np.median(speeds))
        slow = np.flatnonzero(speeds < median * (1 - 1e-12))
        if not slow.size:  # no GPU is slower than most
            return
        first = int(slow[np.argmin([self._swapped(g, median) for g in slow.tolist()])])
        changed = self._speed(first, median / float(speeds[first]))
        kept = at_best_shares(changed, self.plan).objective
        yield self._solved(
            f"GPU of rank {first} swapped for a median one",
            changed,
            f"the first to swap; without a new plan {self._change(kept):+.2%}",
        )

    def _swapped(self, rank: int, speed: float) -> float:
        changed = self._speed(rank, speed / float(self.problem.cluster.speeds[rank]))
        return lower_bound(changed, prices=False).total

    def dispatch(self) -> Iterator[Answer]:
        """The other routing."""
        other = "weighted" if self.problem.routing == "even" else "even"
        yield self._tried(
            f"{other} dispatch",
            lambda: replace(self.problem, routing=other),  # type: ignore[arg-type]
        )

    def phases(self, decode: Problem) -> list[Answer]:
        """A placement for each phase against one for both, on the phases' own loads."""
        prefill = self.problem
        mine = (prefill.layers, prefill.experts, prefill.cluster.slots.tolist())
        if (decode.layers, decode.experts, decode.cluster.slots.tolist()) != mine:
            raise ProblemError(
                "Prefill and decode must be of one model on one cluster: their layers, experts or "
                "slots differ."
            )
        later = replace(decode, constraints=prefill.constraints, routing=prefill.routing)
        own = {"prefill": prefill, "decode": later}
        both = _joined(prefill, decode)
        joint = solve(both, **self.how)
        answers = []
        for name, problem in own.items():
            alone = solve(problem, **self.how)
            if joint.evaluation is None or alone.evaluation is None:
                answers.append(Answer(question=f"{name} alone", note="no plan was found"))
                continue
            shared = at_best_shares(problem, joint.plan).objective
            answers.append(
                Answer(
                    question=f"{name}: a placement of its own",
                    price=alone.objective,
                    lower_bound=alone.lower_bound,
                    change=alone.objective / shared - 1 if shared > 0 else 0.0,
                    at_best=alone.lower_bound / shared - 1 if shared > 0 else 0.0,
                    note="against one placement for both phases",
                    plan=alone.plan,
                )
            )
        return answers


# --------------------------------------------------------------------------- changed problems


def _with(problem: Problem, count: int) -> Problem:
    """The problem with so many more ranks on a node of their own, each like the mean rank."""
    cluster = problem.cluster
    assert cluster.nodes is not None
    base = np.asarray(problem.base_load)
    more = np.repeat(base.mean(axis=-1, keepdims=True), count, axis=-1)
    rules: list[Constraint] = []
    for rule in problem.constraints:
        if isinstance(rule, TokenCapacity):
            tokens = rule.of(problem.ranks)
            rule = TokenCapacity(np.append(tokens, np.full(count, tokens.mean())))
        if not isinstance(rule, MaxMoves):
            rules.append(rule)
    each = int(np.floor(np.median(cluster.slots)))
    changed = replace(
        cluster,
        speeds=np.append(cluster.speeds, np.full(count, cluster.speeds.mean())),
        slots=np.append(cluster.slots, np.full(count, each)),
        nodes=np.append(cluster.nodes, np.full(count, cluster.nodes.max() + 1)),
    )
    base = np.concatenate([base, more], axis=-1)
    return replace(problem, cluster=changed, base_load=base, constraints=rules)


def _joined(prefill: Problem, decode: Problem) -> Problem:
    """Both phases as windows of one problem, weighted by their own steps."""
    from moeplace.loads import LoadHistogram

    passes: Any = None
    if (prefill.loads.passes is None) != (decode.loads.passes is None):
        raise ProblemError("Prefill and decode must both have passes, or neither.")
    if prefill.loads.passes is not None and decode.loads.passes is not None:
        passes = np.append(prefill.loads.passes, decode.loads.passes)
    tokens = np.concatenate([prefill.loads.tokens, decode.loads.tokens])
    base = np.concatenate(
        [
            np.broadcast_to(each.base_load, (each.windows, each.layers, each.ranks))
            for each in (prefill, decode)
        ]
    )
    loads = LoadHistogram(tokens=tokens, passes=passes)
    return replace(prefill, loads=loads, base_load=base, window_weight=None)


def _share(value: float) -> str:
    return f"{value:.2%}" if value >= 5e-5 else f"{100 * value:.1g}%"
