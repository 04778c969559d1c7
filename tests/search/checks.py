"""What holds for every working state, recomputed from its slots alone."""

import numpy as np
import pytest

from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.construct import adopt, construct
from moeplace.search.state import BARRED, HELD, PINNED, State


def started(problem: Problem, plan: Plan | None = None, seed: int = 0) -> State:
    """A state that holds the constructed placement, or a given one."""
    state = State.of(problem, seed)
    assert construct(state) == -1
    if plan is not None:
        adopt(state, plan, np.arange(problem.layers))
    return state


def assert_consistent(state: State, problem: Problem, values: bool = True) -> None:
    """Copies, bits, values and tokens are those of the slots, and no rule is broken."""
    experts = problem.experts
    mean, base = problem.mean_load
    assert state.load[:, :-1] * state.unit[:, None] == pytest.approx(mean, rel=1e-12, abs=1e-300)
    assert not state.load[:, -1].any()
    for layer, rank in np.ndindex(problem.layers, problem.ranks):
        held = state.slot[layer, rank, : state.cap[rank]]
        real = held[held < experts]
        assert np.unique(real).size == real.size, "two copies on one rank"
        bits = state.on[layer, rank]
        assert (np.flatnonzero(bits & HELD) == np.sort(real)).all()
        assert ((bits[:-1] & BARRED == 0) == problem.allowed[layer, :, rank]).all()
        assert ((bits[:-1] & PINNED != 0) == problem.pinned[layer, :, rank]).all()
    held = np.stack([state.on[:, :, e] & HELD for e in range(experts)], axis=2) != 0
    copies = held.sum(axis=1)
    assert (copies >= 1).all(), "an expert is nowhere"
    assert (state.copies[:, :-1] == copies).all()
    assert (state.copies[:, -1] == state.cap.sum() - copies.sum(axis=1)).all()
    assert (state.copies >= state.least).all()
    assert (copies <= problem.most_replicas).all(), "more replicas than an expert may have"
    assert not (held.swapaxes(1, 2) & ~problem.allowed).any()
    assert not (problem.pinned & ~held.swapaxes(1, 2)).any()
    if not values:
        return
    for layer, rank in np.ndindex(problem.layers, problem.ranks):
        held = state.slot[layer, rank, : state.cap[rank]]
        counts = np.append(copies[layer], 1)
        value = state.load[layer, held] / counts[held]
        found = state.value[layer, rank, : state.cap[rank]]
        assert (found == value).all()
        assert (np.diff(found) >= 0).all(), "values are not sorted"
        total = base[layer, rank] / state.unit[layer] + value.sum()
        assert state.tokens[layer, rank] == pytest.approx(total, rel=1e-12, abs=1e-300)


def sets_on_ranks(plan: Plan) -> list[list[set[int]]]:
    """Experts on each rank of each layer."""
    return [[set(row) - {EMPTY} for row in layer] for layer in plan.by_rank(plan.slots).tolist()]
