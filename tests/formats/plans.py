"""Plans that every engine can load, and what makes them unfit."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from moeplace.plan import Plan


def held(plan: Plan) -> list[list[list[int]]]:
    """Experts [layers][ranks][slots]."""
    return [
        [row[plan.rank_of_slot == rank].tolist() for rank in range(plan.ranks)]
        for row in plan.slots
    ]


def ordered(experts: Any) -> Any:
    """The same, each rank's experts in ascending order, EMPTY left out."""
    return [[sorted(e for e in rank if e >= 0) for rank in layer] for layer in experts]


@st.composite
def full_plans(
    draw: st.DrawFn, *, max_layers: int = 3, replicas: bool = True, alike: bool = False
) -> Plan:
    """Equal slots, none EMPTY, no duplicate on a rank; with one placement for all layers."""
    ranks = draw(st.integers(1, 4))
    each = draw(st.integers(1, 4))
    slots = ranks * each
    experts = draw(st.integers(each, slots)) if replicas else slots
    layers = draw(st.integers(1, max_layers))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [_row(random, ranks, each, experts) for _ in range(1 if alike else layers)]
    rows = rows * layers if alike else rows
    return Plan(slots=rows, rank_slots=[each] * ranks, experts=experts)


def _row(random: np.random.Generator, ranks: int, each: int, experts: int) -> list[int]:
    placed: list[list[int]] = [[] for _ in range(ranks)]
    for expert in random.permutation(experts):
        free = [rank for rank in placed if len(rank) < each]
        free[random.integers(len(free))].append(int(expert))
    for rank in placed:
        others = random.permutation([e for e in range(experts) if e not in rank])
        rank += [int(e) for e in others[: each - len(rank)]]
        random.shuffle(rank)
    return [expert for rank in placed for expert in rank]


GOOD = Plan(slots=[[0, 1, 2, 0], [1, 2, 0, 1]], rank_slots=[2, 2], experts=3)
UNEQUAL = Plan(slots=[[0, 1, 2]], rank_slots=[2, 1], experts=3)
EMPTY_SLOT = Plan(slots=[[0, 1, 2, 0], [0, 1, 2, -1]], rank_slots=[2, 2], experts=3)
TWICE = Plan(slots=[[0, 1, 2, 2]], rank_slots=[2, 2], experts=3, allow_duplicates=True)
SHARED = Plan(slots=[[0, 1, 2, 0]], rank_slots=[2, 2], experts=3, split=[[0.25, 1, 1, 0.75]])
