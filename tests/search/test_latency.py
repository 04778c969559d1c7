from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace._check import FloatArray
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.problem import Problem
from moeplace.search.construct import construct
from moeplace.search.latency import TrueTimes, _seconds, linear, model_of
from moeplace.search.state import State
from tests.test_latency import models

#: DeepSeek-V3 fp8, EP 8, H100: startup s, s per expert, s per assignment.
H100 = ([31e-6], [14e-6], [0.117e-6])


def real(tokens: float, windows: int = 1, layers: int = 6, **options: object) -> Problem:
    """Layers of a 256-expert model on 32 unequal ranks, so many assignments a pass and layer."""
    one = generate((layers, 256, 288, 32), seed=1)
    loads = one.loads.tokens[:windows]
    cluster = Cluster.from_planes(*H100, 1 / one.cluster.speeds, one.cluster.slots)
    passes = loads.sum(axis=(1, 2)) / layers / tokens
    return Problem(mp.LoadHistogram(tokens=loads, passes=passes), cluster, **options)  # type: ignore[arg-type]


def as_table(one: Problem) -> Problem:
    """The same with what each rank takes at eight activated replicas, as a table."""
    points = np.geomspace(1, 1e5, 20)
    times = one.cluster.seconds(np.tile(points[:, None], 32), np.full(32, 8.0)).T
    return replace(one, cluster=Cluster.from_table(points, times, one.cluster.slots))


@given(models(), st.floats(0.0, 30.0), st.floats(0.0, 5.0))
def test_the_compiled_seconds_are_those_of_the_cluster(
    cluster: Cluster, tokens: float, active: float
) -> None:
    if not cluster.nonlinear:
        return
    active = active if tokens > 0 else 0.0
    each = np.full(2, tokens)
    want = cluster.seconds(each, np.full(2, active))
    found = [_seconds(model_of(cluster), g, active, tokens) for g in range(2)]
    assert found == pytest.approx(want.tolist(), rel=1e-12)


@pytest.mark.parametrize("tokens", [512, 60_000])
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("table", [False, True])
def test_what_the_search_counts_is_what_evaluate_says(
    tokens: float, windows: int, table: bool
) -> None:
    one = real(tokens, windows)
    one = as_table(one) if table else one
    state = State.of(linear(one), 0)
    construct(state)
    before = one.mean(evaluate(one, state.plan(one)).makespan)
    times = TrueTimes(one, state)
    heat = np.tile([0.02, 0.0], (one.layers, 1))
    with ThreadPoolExecutor(1) as pool:
        times.improve(np.arange(one.layers), 4000, heat, one.window_weight, pool, 1)
    after = one.mean(evaluate(one, state.plan(one)).makespan)
    np.testing.assert_allclose(times.cost, after, rtol=1e-9)
    assert (after <= before * (1 + 1e-12)).all()
    assert after.sum() < before.sum()


def costs(one: Problem, plan: mp.Plan) -> float:
    return evaluate(one, plan.with_split(None)).objective


@pytest.mark.parametrize("tokens", [512, 8192, 524_288])
def test_a_decode_or_prefill_model_ends_near_its_bound(tokens: float) -> None:
    one = real(tokens)
    blind = mp.solve(linear(one), work_limit=200_000 * one.layers)
    found = mp.solve(one, work_limit=200_000 * one.layers)
    assert found.gap < 0.01
    assert found.objective <= costs(one, blind.plan)


def test_rules_are_obeyed_by_true_times() -> None:
    one = real(4096)
    start = mp.solve(one, work_limit=20_000).plan
    drifted = replace(one, loads=replace(one.loads, tokens=one.loads.tokens[:, ::-1]))
    capacity = np.full(32, 4096 / 32 * 1.4)
    experts = np.arange(256)
    for rules in (
        [mp.MaxMoves(start, per_layer=12)],
        [mp.MaxMoves(start, total=30)],
        [mp.TokenCapacity(capacity)],
        [mp.MaxReplicas(1)],
        [mp.ReplicaBudget(256 * one.layers + 5)],
        [mp.Pin(3, 4), mp.Forbid(5, 6)],
        [mp.NodeGroups(experts // 64)],
    ):
        changed = replace(drifted, constraints=rules)
        if isinstance(rules[0], mp.NodeGroups):
            nodes = np.arange(32) // 8
            changed = replace(changed, cluster=replace(changed.cluster, nodes=nodes))
        found = mp.solve(changed, work_limit=200_000)
        assert found.evaluation is not None, rules
        assert found.evaluation.legal
        assert found.lower_bound <= found.objective
        if isinstance(rules[0], mp.MaxMoves):
            assert found.objective < costs(changed, start)


@pytest.mark.parametrize("objective", ["worst", "cvar"])
def test_several_windows_are_planned_by_their_objective(objective: str) -> None:
    one = real(2048, windows=4, layers=3, objective=objective)
    found = mp.solve(one, work_limit=400_000)
    assert found.lower_bound <= found.objective <= 1.05 * found.lower_bound


def test_the_same_bits_on_any_number_of_workers() -> None:
    one = real(1000, layers=4)
    plans = [mp.solve(one, work_limit=100_000, workers=workers).plan for workers in (1, 3)]
    assert np.array_equal(plans[0].slots, plans[1].slots)


@pytest.mark.parametrize("table", [False, True])
def test_shares_follow_the_true_times(table: bool) -> None:
    one = real(524_288, layers=2, routing="weighted")
    one = as_table(one) if table else one
    state = State.of(linear(one), 0)
    construct(state)
    plan = state.plan(one)
    even = evaluate(one, plan).makespan
    best = evaluate(one, mp.resplit(one, plan)).makespan
    assert (best <= even * (1 + 1e-12)).all()
    assert best.sum() < even.sum()


def test_a_linear_stand_in_measures_ranks_next_to_a_common_makespan() -> None:
    prefill, decode = linear(real(524_288)), linear(real(64))
    spread = [float(np.ptp(p.cluster.speeds) / p.cluster.speeds.mean()) for p in (prefill, decode)]
    true: FloatArray = real(64).cluster.speeds
    assert spread[0] == pytest.approx(np.ptp(true) / true.mean(), rel=0.3)
    assert not prefill.cluster.nonlinear


@pytest.mark.parametrize("routing", ["sglang-static", "ascend", "sglang-lp"])
def test_under_an_engines_own_rule_the_best_plan_by_speeds_is_priced_truly(routing: str) -> None:
    one = real(4096, layers=2, routing=routing)
    found = mp.solve(one, work_limit=50_000)
    assert found.evaluation is not None
    assert found.lower_bound <= found.objective == evaluate(one, found.plan).objective
