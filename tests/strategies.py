"""Hypothesis strategies and builders that several test modules share."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxReplicas,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.hardware import Cluster
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem

#: Zero, ties, small counts and means.
COUNTS = st.integers(0, 6).map(float)
MEANS = st.floats(0.0, 10.0, allow_subnormal=False)
SPEEDS = st.one_of(st.sampled_from([0.5, 1.0, 1.5]), st.floats(0.3, 1.5))


def problem(loads: Any, speeds: Any, slots: Any, **options: Any) -> Problem:
    """A problem from plain lists: loads [experts], [layers, experts] or with windows first."""
    loads = np.asarray(loads, dtype=float)
    passes = options.pop("passes", None)
    unit = options.pop("speed_unit", "tokens/s")
    tokens = loads[None] if loads.ndim == 1 else loads
    cluster = Cluster.from_speeds(speeds, slots, speed_unit=unit)
    return Problem(LoadHistogram(tokens=tokens, passes=passes), cluster, **options)


def plan(slots: Any, rank_slots: Any, experts: int | None = None, **options: Any) -> Plan:
    """A plan from plain lists: slots [slots] or [layers, slots]."""
    slots = np.asarray(slots)
    slots = slots[None] if slots.ndim == 1 else slots
    return Plan(
        slots=slots,
        rank_slots=rank_slots,
        experts=int(slots.max()) + 1 if experts is None else experts,
        **options,
    )


@st.composite
def slot_counts(draw: st.DrawFn, experts: int, ranks: int) -> list[int]:
    """Slots of each rank: unequal, some 0, some more than experts, enough for all experts."""
    slots = draw(st.lists(st.integers(0, experts + 1), min_size=ranks, max_size=ranks))
    for g in range(ranks):
        missing = experts - sum(min(k, experts) for k in slots)
        slots[g] += max(0, min(missing, experts - slots[g]))
    return slots


@st.composite
def tiny_problems(
    draw: st.DrawFn,
    *,
    routing: str | None = None,
    max_experts: int = 6,
    max_ranks: int = 3,
    max_layers: int = 1,
    max_windows: int = 1,
    base: bool = True,
    constraints: bool = False,
    limits: bool = False,
    whole: bool | None = None,
) -> Problem:
    """Problems that brute force can solve, with everything that is odd but legal.

    `constraints` draws pins and forbids, and limits of replicas for each expert; `limits` also
    token capacities and a budget of replicas, rarely too small for any plan.
    """
    experts = draw(st.integers(1, max_experts))
    ranks = draw(st.integers(1, max_ranks))
    windows = draw(st.integers(1, max_windows))
    layers = draw(st.integers(1, max_layers))
    whole = draw(st.booleans()) if whole is None else whole
    entry = COUNTS if whole else MEANS
    count = windows * layers * experts
    tokens = draw(st.lists(entry, min_size=count, max_size=count))
    options: dict[str, Any] = {"routing": routing or draw(st.sampled_from(["even", "weighted"]))}
    if windows > 1:
        options["objective"] = draw(st.sampled_from(["mean", "worst", "cvar"]))
        options["cvar_alpha"] = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
        options["window_weight"] = draw(
            st.lists(st.integers(1, 3), min_size=windows, max_size=windows)
        )
    if layers > 1:
        options["layer_weight"] = draw(
            st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=layers, max_size=layers)
        )
    if base and draw(st.booleans()):
        size = windows * layers * ranks
        loads = draw(st.lists(entry, min_size=size, max_size=size))
        options["base_load"] = np.reshape(loads, (windows, layers, ranks))
    if constraints:
        options["constraints"] = draw(rules(layers, experts, ranks))
    loads = np.reshape(tokens, (windows, layers, experts))
    if limits:
        total = loads.sum(axis=2) + np.sum(options.get("base_load", 0.0), axis=-1)
        more = draw(limiting(layers, experts, ranks, float(total.max())))
        options["constraints"] = options.get("constraints", []) + more
    return Problem(
        LoadHistogram(tokens=loads),
        Cluster(
            speeds=draw(st.lists(SPEEDS, min_size=ranks, max_size=ranks)),
            slots=draw(slot_counts(experts, ranks)),
        ),
        **options,
    )


@st.composite
def rules(draw: st.DrawFn, layers: int, experts: int, ranks: int) -> list[Constraint]:
    """A few pins and forbids, which may leave no placement at all, and limits of replicas."""
    few: list[Constraint] = []
    if draw(st.integers(0, 3)) == 3:
        most = st.lists(st.integers(1, 3), min_size=experts, max_size=experts)
        few.append(MaxReplicas(draw(st.one_of(st.integers(1, 2), most.map(np.array)))))
    return few + draw(
        st.lists(
            st.builds(
                lambda kind, expert, rank, layer: kind(expert, rank, layer),
                st.sampled_from([Pin, Forbid]),
                st.integers(0, experts - 1),
                st.integers(0, ranks - 1),
                st.one_of(st.none(), st.integers(0, layers - 1)),
            ),
            max_size=4,
        )
    )


@st.composite
def limiting(
    draw: st.DrawFn, layers: int, experts: int, ranks: int, total: float
) -> list[Constraint]:
    """Token capacities next to the fair share of `total`, and a budget of replicas, or one."""
    few: list[Constraint] = []
    which = draw(st.integers(0, 2))
    if which != 1:
        part = st.lists(st.sampled_from([0.8, 1.0, 1.3, 2.0]), min_size=ranks, max_size=ranks)
        few.append(TokenCapacity(np.array(draw(part)) * (total / ranks + 1.0)))
    if which != 0 and layers * experts > 1:
        few.append(ReplicaBudget(layers * experts + draw(st.sampled_from([0, 1, 2, 3, 4, -1]))))
    return few


@st.composite
def legal_plans(draw: st.DrawFn, problem: Problem) -> Plan:
    """Any placement of the problem: one copy of each expert where there is room, then others."""
    most = np.minimum(problem.cluster.slots, problem.experts).tolist()
    layers = []
    for _ in range(problem.layers):
        held: list[list[int]] = [[] for _ in most]
        for expert in draw(st.permutations(range(problem.experts))):
            free = [g for g in range(len(most)) if len(held[g]) < most[g]]
            held[draw(st.sampled_from(free))].append(expert)
        for g, experts in enumerate(held):
            others = sorted(set(range(problem.experts)) - set(experts))
            room = most[g] - len(experts)
            if others and room:
                experts += draw(st.lists(st.sampled_from(others), max_size=room, unique=True))
        layers.append(
            [
                expert
                for experts, size in zip(held, problem.cluster.slots.tolist(), strict=True)
                for expert in experts + [EMPTY] * (size - len(experts))
            ]
        )
    return Plan(slots=layers, rank_slots=problem.cluster.slots, experts=problem.experts)
