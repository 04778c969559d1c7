"""Two ranks' experts dealt out anew: the best way of all, rules kept, never worse."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.bounds import lower_bound
from moeplace.constraints import CAPACITY_SLACK, TokenCapacity
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.search import in_windows
from moeplace.search.deal import _best, _sums, deal
from moeplace.search.state import State
from moeplace.search.windows import Windows
from tests.search.checks import assert_consistent, started
from tests.search.test_windows import states, weighted_mean


def dealt(one: Problem, state: State, trials: int, workers: int = 1) -> Windows:
    every = Windows(one, state)
    aims = lower_bound(one).per_layer / state.unit
    aims = np.where(aims > 0, aims, 1.0)
    layers = np.arange(one.layers)
    many, none = np.full(one.layers, trials), np.zeros(one.layers)
    with ThreadPoolExecutor(workers) as pool:
        deal(every, layers, many, none, aims, one.window_weight, pool, workers)
    return every


@given(states(), st.integers(1, 200))
def test_rules_are_kept_and_no_layer_gets_worse(case: tuple[Problem, State], trials: int) -> None:
    one, state = case
    before = weighted_mean(one, state)
    over = (mp.evaluate(one, state.plan(one)).rank_tokens - one.capacity * (1 + CAPACITY_SLACK)) > 0
    copies = state.copies.copy()
    every = dealt(one, state, trials)
    assert_consistent(state, one, values=False)
    assert (state.copies == copies).all()
    if np.isinf(one.capacity).all():
        after = weighted_mean(one, state)
        assert (after <= before * (1 + 1e-9)).all()
        assert every.cost * state.unit == pytest.approx(after, rel=1e-9, abs=1e-300)
    elif not over.any():
        assert not mp.evaluate(one, state.plan(one)).violations


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 3), st.floats(0, 1.2))
def test_the_cheapest_of_all_ways_is_found(seed: int, n: int, rows: int, allowed: float) -> None:
    rng = np.random.default_rng(seed)
    share = rng.pareto(1.5, (n, rows)) * (rng.random((n, rows)) > 0.2)
    rest, stays = rng.random((2, rows))
    take = int(rng.integers(0, n + 1))
    total = rest + stays + share.sum(axis=0)
    most_g, most_h = allowed * total * np.array([[0.4], [0.6]])
    per_g, per_h = 1 / rng.uniform(0.5, 2, (2, rows))

    def cost(chosen: tuple[int, ...]) -> float:
        tokens = rest + share[list(chosen)].sum(axis=0)
        g = np.maximum(tokens - most_g, 0) * per_g
        h = np.maximum(total - tokens - most_h, 0) * per_h
        return float((g**2 + h**2).sum())

    least = min(cost(chosen) for chosen in combinations(range(n), take))
    half = n // 2
    first, bits = np.empty((1 << half, rows)), np.empty(1 << half, dtype=np.int64)
    second, bits_b = np.empty((1 << n - half, rows)), np.empty(1 << n - half, dtype=np.int64)
    _sums(share[:half], bits, first)
    _sums(share[half:], bits_b, second)
    row, begin = int(rng.integers(rows)), int(rng.integers(1 << half))
    a, b = _best(
        rest, total, most_g, most_h, per_g, per_h, row, 1e30, take, begin,
        bits, first, 1 << half, bits_b, second, 1 << n - half,
    )  # fmt: skip
    chosen = tuple(k for k in range(n) if (a | b << half) >> k & 1)
    assert a >= 0
    assert len(chosen) == take
    assert cost(chosen) == pytest.approx(least, rel=1e-6, abs=1e-12)
    none = _best(
        rest, total, most_g, most_h, per_g, per_h, row, least * (1 - 1e-6), take, begin,
        bits, first, 1 << half, bits_b, second, 1 << n - half,
    )  # fmt: skip
    assert least < 1e-9 or none == (-1, -1)


def two_windows(seed: int, layers: int = 1) -> Problem:
    now, later = (generate((layers, 256, 288, 32), seed, epoch=e).aggregate() for e in (0, 2))
    loads = LoadHistogram(tokens=np.concatenate([now.loads.tokens, later.loads.tokens]))
    return Problem(loads, now.cluster, objective="worst")


@pytest.mark.parametrize("seed", [100, 101])
def test_two_windows_at_real_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = two_windows(seed)
    new = mp.solve(one, work_limit=20_000_000, gap=1e-7)
    monkeypatch.setattr(in_windows, "DEAL_AFTER", 1.0)
    old = mp.solve(one, work_limit=20_000_000, gap=1e-7)
    assert new.evaluation is not None
    assert new.evaluation.legal
    assert new.gap < 5e-4
    assert new.gap < 0.3 * old.gap


def test_a_window_without_load_and_a_layer_without() -> None:
    one = two_windows(100, layers=2)
    tokens = one.loads.tokens.copy()
    tokens[1, 0] = 0
    tokens[:, 1] = 0
    empty = replace(one, loads=LoadHistogram(tokens=tokens))
    found = mp.solve(empty, work_limit=2_000_000, gap=1e-7)
    assert found.evaluation is not None
    assert found.evaluation.legal
    assert np.isfinite(found.gap)


def test_capacities_hold_in_both_windows() -> None:
    one = two_windows(100)
    mean = float(one.tokens[0].sum()) / one.ranks
    tight = replace(one, constraints=[TokenCapacity(1.11 * mean)])
    found = mp.solve(tight, work_limit=20_000_000, gap=1e-7)
    assert found.evaluation is not None
    assert found.evaluation.legal


def test_the_same_from_any_number_of_threads() -> None:
    one = two_windows(101, layers=3)
    slots = []
    for workers in (1, 3):
        state = started(one, seed=5)
        dealt(one, state, 300, workers)
        slots.append(state.plan(one).slots)
    assert (slots[0] == slots[1]).all()
