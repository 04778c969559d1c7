"""Which rules exclude each other: a set of them without a plan, none of which could be missing.

QuickXplain (Junker, AAAI 2004) halves the rules again and again, so that a few that clash are
found among many with few questions. A question, whether some rules leave a plan, is answered by
counting (`feasible`), by bounds, by a plan that a short search finds, and else by CP-SAT.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplace._check import IntArray
from moeplace.bounds import lower_bound
from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxMoves,
    MaxReplicas,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.errors import SolverError
from moeplace.feasible import explain_infeasible, refuted
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.result import Limits

if TYPE_CHECKING:
    from moeplace.search.run import Run

#: What counting decides by itself, and what lies in single layers and goes first.
COUNTED, SINGLE = (Pin, Forbid, MaxReplicas, ReplicaBudget), (Pin, Forbid)
#: CP-SAT's deterministic seconds for a question, if time is not limited, and for a first try; and
#: long questions that it may leave open before it is asked no more.
ASKED, FIRST, OPEN = 2.0, 0.2, 3
#: Seconds that a question has at least: a model of a real size takes as long to build.
LEAST = 0.5
#: Search steps for each slot before CP-SAT is asked.
STEPS = 200
#: Rules, and entries of arrays, that are spelt out.
NAMED, ENTRIES = 8, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Clash:
    """Rules that leave no plan.

    Attributes
    ----------
    rules : tuple of constraints
    why : str
        A sentence that names the layer, unless only all layers together have no plan.
    least : bool
        Whether without any one of the rules there is a plan (of that layer).
    """

    rules: tuple[Constraint, ...]
    why: str
    least: bool

    def __str__(self) -> str:
        """The sentence, and the rules by name."""
        shown = [named(rule) for rule in self.rules[:NAMED]]
        if len(self.rules) > NAMED:
            shown.append(f"... ({len(self.rules)} in all)")
        most = "" if self.least else ", at most"
        return f"{self.why} Rules that clash{most}: {', '.join(shown)}."


@dataclass
class Search:
    """The search for rules that clash.

    Attributes
    ----------
    problem : Problem
    until : float, optional
        When to end, by `time.perf_counter`; else by CP-SAT's own measure of work.
    seed : int
    slots : dict
        Placements of layers under all rules, found on the way; of all layers if they are coupled.
    """

    problem: Problem
    until: float | None = None
    seed: int = 0
    slots: dict[int, IntArray] = field(default_factory=dict)
    open: int = 0  # questions without an answer
    reducing: bool = False
    counting: bool = False  # questions are answered by counting alone
    stopped: bool = False

    def known(self, why: str) -> Clash | None:
        """Reduce the rules of a problem that has no plan, as `why` says; None without time.

        Ctrl-C ends it with the rules so far.
        """
        if self._left() == 0.0:
            return None
        for layer, *_ in self._kinds(range(self.problem.layers)):
            if _proof(self._part(layer, self.problem.constraints)) is not None:
                return self._reduce(layer, why)
        return self._reduce(None, why)

    def find(self, suspects: Iterable[int] | None = None) -> Clash | None:
        """Look for rules that clash in a layer, then in all together; None if none are found.

        Parameters
        ----------
        suspects : iterable of int, optional
            Layers to look at; the others are known to have a plan.
        """
        problem = self.problem
        kinds = self._kinds(range(problem.layers) if suspects is None else suspects)
        for quick in (True, False):
            for n, layers in enumerate(kinds):
                questions = 2 * (len(kinds) - n) if quick else 1
                if self._excluded(layers[0], problem.constraints, questions):
                    return self._reduce(layers[0], "")
                if layers[0] in self.slots:
                    self.slots |= dict.fromkeys(layers, self.slots[layers[0]])
            kinds = [layers for layers in kinds if layers[0] not in self.slots]
        coupled = problem.replica_budget is not None
        coupled |= problem.max_moves is not None and problem.max_moves.total is not None
        if coupled and problem.layers > 1 and self._excluded(None, problem.constraints):
            return self._reduce(None, "")
        return None

    def _kinds(self, layers: Iterable[int]) -> list[list[int]]:
        """The layers, those together that look the same to the rules."""
        problem, kinds = self.problem, dict[bytes, list[int]]()
        rules = problem.max_moves
        by_tokens = np.isfinite(problem.capacity).any() or problem.max_off_node is not None
        for layer in layers:
            key = problem.allowed[layer].tobytes() + problem.pinned[layer].tobytes()
            if by_tokens:
                key += problem.tokens[:, layer].tobytes() + problem.base[:, layer].tobytes()
            if rules is not None:
                key += rules.current.slots[layer].tobytes()
            kinds.setdefault(key, []).append(int(layer))
        return list(kinds.values())

    def _reduce(self, layer: int | None, why: str) -> Clash:
        """The fewest rules, of those that touch the layer, that leave no plan.

        Where counting is enough, first as many as that needs: then the sentence fits the rules.
        """
        self.reducing = True
        rules = [rule for rule in self.problem.constraints if _touches(rule, layer, self.problem)]
        rules.sort(key=lambda rule: isinstance(rule, SINGLE))  # stable: these may be many
        counted = _proof(self._part(layer, rules)) is not None
        if counted:
            self.counting = True
            rules = self._least(layer, [], False, rules)
            self.counting = False
        before = self.open
        found = self._least(layer, [], False, rules) if len(rules) > 1 else rules
        proof = _proof(self._part(layer, found))
        if proof is not None:
            why = proof if layer is None else proof.replace("layer 0:", f"layer {layer}:", 1)
        elif counted or not why:
            place = "" if layer is None else f"layer {layer}: "
            why = f"{place}CP-SAT claims that no plan obeys all rules (its word, not checked)."
        return Clash(rules=tuple(found), why=why, least=self.open == before)

    def _least(
        self, layer: int | None, kept: list[Constraint], more: bool, rules: list[Constraint]
    ) -> list[Constraint]:
        """Of `rules`, which clash beside those that are `kept`, those that must stay.

        `more`: some of `kept` are new since these were last known to leave a plan.
        """
        if more and self._excluded(layer, kept):
            return []
        if len(rules) <= 1:
            return rules
        half = len(rules) // 2
        first, second = rules[:half], rules[half:]
        late = self._least(layer, kept + first, True, second)
        early = self._least(layer, kept + late, bool(late), first)
        return early + late

    def _excluded(
        self, layer: int | None, rules: Sequence[Constraint], questions: int = 1
    ) -> bool | None:
        """Whether the rules leave no plan; None if that is not found out.

        By CP-SAT for a part of the time that is left, more of it the fewer `questions` follow.
        """
        try:
            return self._asked(layer, rules, questions)
        except KeyboardInterrupt:
            if not self.reducing:
                raise
            self.stopped = True
            self.open += 1
            return None

    def _asked(self, layer: int | None, rules: Sequence[Constraint], questions: int) -> bool | None:
        whole = list(rules) == list(self.problem.constraints)
        if not rules:
            return False
        if not self.stopped and self._left() != 0.0:
            part = self._part(layer, rules)
            if _proof(part) is not None:
                return True
            if self.counting or (not whole and all(isinstance(rule, COUNTED) for rule in rules)):
                return False
            slots = self._placed(part)
            if slots is None and self.open < OPEN:  # no more than that, lest it takes long
                from moeplace.exact.feasibility import find_placement

                left = self._left()
                seconds = None if left is None else max(left / max(questions, 3), LEAST)
                work = None if left is not None else ASKED if questions == 1 else FIRST
                ended, slots = find_placement(part, seconds, work)
                if ended == "infeasible":
                    return True
            if slots is not None:
                if whole:
                    layers = range(self.problem.layers) if layer is None else [layer]
                    self.slots |= dict(zip(layers, slots, strict=True))
                return False
        self.open += questions == 1
        return None

    def _placed(self, part: Problem) -> IntArray | None:
        """Slots of a plan that a short search finds."""
        from moeplace.search.portfolio import search
        from moeplace.search.run import Run

        limits = Limits(work=STEPS * part.cluster.total_slots * part.layers, time=self._left())
        bound = lower_bound(part, 0.0)
        run = Run(part, bound, limits, time.perf_counter(), self.seed, 1, None)
        search(run, None)
        return None if run.best is None else run.best.plan.slots

    def _part(self, layer: int | None, rules: Sequence[Constraint]) -> Problem:
        """One layer (or all) under some rules; latency, which does not matter, is left out."""
        problem = self.problem
        given = problem.cluster
        cluster = Cluster(speeds=given.speeds, slots=given.slots, nodes=given.nodes)
        if layer is None:
            return replace(problem, cluster=cluster, constraints=list(rules))
        return Problem(
            LoadHistogram(tokens=problem.tokens[:, [layer]]),
            cluster,
            routing=problem.routing,
            base_load=problem.base[:, [layer]],
            constraints=[_of_layer(r, layer) for r in rules if _touches(r, layer, problem)],
        )

    def _left(self) -> float | None:
        return None if self.until is None else max(self.until - time.perf_counter(), 0.0)


def sought(run: "Run", rules: Search, share: float) -> Clash | None:
    """Rules that clash, looked for until a share of the time if the search found no plan.

    A plan that is found on the way is kept.
    """
    if run.best is not None or run.late(share) or not run.problem.constraints:
        return None
    until = rules.until
    if until is not None:
        rules.until = run.began + share * (until - run.began)
    nearest = run.nearest
    clash = rules.find(None if nearest is None else np.flatnonzero(run.over(nearest) > 0).tolist())
    rules.until = until
    if clash is None:
        _offer_placements(run, rules)
    return clash


def _offer_placements(run: "Run", rules: Search) -> None:
    """Offer what was found while clashes were sought, with the rest of the nearest plan."""
    problem = run.problem
    slots = np.full((problem.layers, problem.cluster.total_slots), EMPTY)
    if run.nearest is not None:
        slots[:] = run.nearest.plan.slots
    elif len(rules.slots) < problem.layers:
        return
    for layer, mine in rules.slots.items():
        slots[layer] = mine
    run.offer(Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts))


def contradict(run: "Run", rules: Search, method: str) -> None:
    """Raise SolverError if a plan was found where a solver claims that there is none."""
    _offer_placements(run, rules)
    if run.best is not None:
        raise SolverError(
            f"{method} claims that no plan obeys all constraints, but one is known. Please report "
            "this with the instance."
        )


def _proof(part: Problem) -> str | None:
    """Why there is no plan, by counting or by bounds."""
    found = explain_infeasible(part)
    if found is None and any(isinstance(rule, TokenCapacity) for rule in part.constraints):
        found = refuted(part, lower_bound(part, 0.0))
    return found


def _touches(rule: Constraint, layer: int | None, problem: Problem) -> bool:
    """Whether the rule says something of this layer alone (or of all, if it is None)."""
    if layer is None:
        return True
    if isinstance(rule, SINGLE):
        return rule.layer in (None, layer)
    return not isinstance(rule, ReplicaBudget) or problem.layers == 1


def _of_layer(rule: Constraint, layer: int) -> Constraint:
    """The rule for a problem of this layer alone."""
    if isinstance(rule, SINGLE):
        return replace(rule, layer=None)
    if not isinstance(rule, MaxMoves):
        return rule
    given = rule.current
    limits = [limit for limit in (rule.per_layer, rule.total) if limit is not None]
    current = Plan(slots=given.slots[[layer]], rank_slots=given.rank_slots, experts=given.experts)
    return MaxMoves(current, per_layer=min(limits, default=None))


def named(rule: Constraint) -> str:
    """A rule as it is written in Python, long arrays cut short and plans left out."""
    given = []
    for part in fields(rule):
        value = getattr(rule, part.name)
        if value is not None and not isinstance(value, Plan):
            given.append(f"{part.name}={_short(value)}")
    return f"{type(rule).__name__}({', '.join(given)})"


def _short(value: Any) -> str:
    if np.ndim(value) == 0:
        return f"{float(value):.12g}"
    entries = [_short(entry) for entry in np.asarray(value).tolist()]
    dots = ["..."] if len(entries) > ENTRIES else []
    return f"[{', '.join([*entries[:ENTRIES], *dots])}]"
