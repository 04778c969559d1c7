"""When to re-plan: triggers on known loads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.bounds import lower_bound
from moeplace.drift import Monitor
from moeplace.errors import PlanError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.hardware import Cluster
from moeplace.instances import generate, read_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.split import resplit
from moeplace.solve import solve
from tests.strategies import plan, problem

REAL = Path(__file__).resolve().parents[1] / "instances" / "real"


@pytest.fixture(scope="module")
def tasks() -> tuple[Problem, Plan, Any]:
    """DeepSeek-V2-Lite on one task, 8 equal ranks, and the shares of all four tasks."""
    whole = read_instance(REAL / "dsv2lite-tasks_8x9_equal.json")
    shares = whole.loads.tokens / whole.loads.tokens.sum(axis=2, keepdims=True)
    loads = LoadHistogram(tokens=1e6 * shares[:1])
    one = replace(whole, loads=loads, window_weight=None)
    return one, solve(one, gap=1e-4).plan, shares


def drawn(shares: Any, assignments: int, windows: int, seed: int = 0) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [generator.multinomial(assignments, shares).astype(float) for _ in range(windows)]


@pytest.mark.parametrize("assignments", [5_120, 51_200, 512_000])
def test_pure_noise_is_no_reason(tasks: tuple[Problem, Plan, Any], assignments: int) -> None:
    one, current, shares = tasks
    monitor = Monitor(one, current)
    decisions = [monitor.observe(each) for each in drawn(shares[0], assignments, 60)]
    assert {decision.action for decision in decisions} == {"keep"}


def test_regret_sees_the_mix_that_cosine_misses(tasks: tuple[Problem, Plan, Any]) -> None:
    one, current, shares = tasks
    mix = 0.8 * shares[0] + 0.2 * shares[1]
    true = replace(one, loads=LoadHistogram(tokens=1e6 * mix))
    assert evaluate(true, current).imbalance > 1.05
    ours, cosine = Monitor(one, current), Monitor(one, current, trigger="cosine")
    windows = drawn(mix, 51_200, 40)
    decisions = [ours.observe(each) for each in windows]
    assert [decision.action for decision in decisions[:3]] == ["keep", "keep", "replan"]
    assert "2 of 3 windows in a row" in decisions[1].reason
    assert {cosine.observe(each).action for each in windows} == {"keep"}
    for _ in range(3):  # a plan made on what was seen ends it
        ours.adopt(solve(ours.now, gap=1e-4).plan, ours.loads)
        after = [ours.observe(each) for each in drawn(mix, 51_200, 15, seed=1)]
        if {decision.action for decision in after} == {"keep"}:
            break
    assert not ours.streak
    assert evaluate(true, ours.plan).imbalance < 1.03


def test_recorded_shift_is_seen_at_once_or_after_three_windows() -> None:
    whole = read_instance(REAL / "dsv2lite-windows_8x9_equal.json")
    seen = LoadHistogram(tokens=whole.loads.tokens[:4]).aggregate()
    start = replace(whole, loads=seen, window_weight=None)
    monitor = Monitor(start, solve(start, gap=1e-4).plan)
    actions = [monitor.observe(each).action for each in whole.loads.tokens[4:]]
    assert actions.index("replan") == 8 + 3 - 1 - 4  # windows 8, 9, 10 of 4 to 15


def test_noise_floor_is_the_regret_of_resamples(tasks: tuple[Problem, Plan, Any]) -> None:
    """Against windows drawn afresh, and falling with the root of the assignments."""
    one, current, shares = tasks
    monitor = Monitor(one, current)
    floors = []
    for assignments in (5_120, 51_200, 512_000):
        floor = monitor.noise(np.full(26, float(assignments)))
        regrets = []
        for window in drawn(shares[0], assignments, 15, seed=7):
            now = replace(one, loads=LoadHistogram(tokens=window))
            regrets.append(evaluate(now, current).objective / lower_bound(now).total - 1)
        assert floor == pytest.approx(np.median(regrets) - monitor.own, rel=0.1)
        floors.append(floor)
    assert floors[0] / floors[2] == pytest.approx(10, rel=0.2)


def test_a_slow_gpu_is_seen_by_regret_alone(tasks: tuple[Problem, Plan, Any]) -> None:
    one, current, shares = tasks
    monitors = {name: Monitor(one, current, trigger=name) for name in ("regret", "cosine")}  # type: ignore[arg-type]
    fired = dict.fromkeys(monitors, 0)
    for name, monitor in monitors.items():
        monitor.speeds([0.9] + [1.0] * 7)
        for window in drawn(shares[0], 512_000, 20):
            fired[name] += monitor.observe(window).action == "replan"
    assert fired["regret"] == 18
    assert fired["cosine"] == 0
    monitors["regret"].adopt(solve(monitors["regret"].now).plan, monitors["regret"].loads)
    assert monitors["regret"].observe(drawn(shares[0], 512_000, 1)[0]).value < 0.01


def test_max_mean_counts_tokens_of_ranks() -> None:
    start = problem([4.0, 4.0], [1.0, 1.0], [1, 1])
    monitor = Monitor(start, plan([0, 1], [1, 1]), trigger="max-mean", cooldown=0)
    assert monitor.observe([[5.0, 4.0]]).action == "keep"
    found = monitor.observe([[8.0, 2.0]])
    assert (found.action, found.value) == ("replan", 1.6)
    assert monitor.loads.tokens.tolist() == [[[13.0, 6.0]]]


def test_cosine_looks_every_tenth_window_at_the_mean() -> None:
    start = problem([4.0, 0.0], [1.0, 1.0], [1, 1])
    monitor = Monitor(start, plan([0, 1], [1, 1]), trigger="cosine", samples=10)
    decisions = [monitor.observe([[4.0, 0.0]]) for _ in range(15)]
    decisions += [monitor.observe([[0.0, 4.0]]) for _ in range(5)]
    assert {decision.action for decision in decisions[:19]} == {"keep"}
    assert decisions[19].action == "replan"
    assert decisions[19].value == pytest.approx(1 - 1 / np.sqrt(2))


def test_cooldown_after_a_change(tasks: tuple[Problem, Plan, Any]) -> None:
    one, current, shares = tasks
    monitor = Monitor(one, current, cooldown=5)
    windows = drawn(shares[1], 512_000, 14)
    actions = [monitor.observe(each).action for each in windows[:3]]
    assert actions == ["keep", "keep", "replan"]
    monitor.rest()  # it did not pay
    actions = [monitor.observe(each).action for each in windows[3:10]]
    assert actions == ["keep"] * 5 + ["replan"] * 2


def test_new_shares_are_enough_under_weighted_routing() -> None:
    start = problem([4.0, 2.0, 2.0], [1.0, 1.0], [2, 2], routing="weighted")
    current = resplit(start, plan([0, 1, 0, 2], [2, 2]))
    monitor = Monitor(start, current, pool=1)

    actions = [monitor.observe([[4e6, 3e6, 1e6]]).action for _ in range(3)]
    assert actions == ["keep", "keep", "resplit"]
    actions = [monitor.observe([[1e6, 6e6, 1e6]]).action for _ in range(3)]
    assert actions[-1] == "replan"


def test_base_loads_and_passes_grow_with_the_window() -> None:
    loads = LoadHistogram(tokens=[[[8.0, 8.0]]], passes=[2.0])
    cluster = Cluster.from_speeds([1.0, 1.0], 1)
    start = Problem(loads, cluster, base_load=[4.0, 0.0])
    monitor = Monitor(start, plan([0, 1], [1, 1]))
    assert monitor.own == pytest.approx(0.0, abs=1e-9)
    monitor.observe([[16.0, 16.0]], passes=4.0)
    assert monitor.now.base.tolist() == start.base.tolist()
    assert monitor.now.tokens.tolist() == start.tokens.tolist()
    without = Problem(LoadHistogram(tokens=[[[8.0, 8.0]]]), cluster, base_load=[4.0, 0.0])
    monitor = Monitor(without, plan([0, 1], [1, 1]))
    monitor.observe([[24.0, 24.0]])
    assert monitor.now.base.tolist() == [[[12.0, 0.0]]]


def test_odd_windows_and_options_are_refused() -> None:
    start = problem([4.0, 4.0], [1.0, 1.0], [1, 1])
    current = plan([0, 1], [1, 1])
    monitor = Monitor(start, current)
    assert monitor.observe([[0.0, 0.0]]).reason == "the window holds no tokens"
    with pytest.raises(ProblemError, match="nothing to re-plan on"):
        _ = monitor.loads
    with pytest.raises(ProblemError, match="1 layers x 2 experts, got \\(1, 3\\)"):
        monitor.observe([[1.0, 2.0, 3.0]])
    with pytest.raises(ProblemError, match="passes are known, unlike"):
        monitor.observe([[1.0, 2.0]], passes=1.0)
    with pytest.raises(ProblemError, match="Window"):
        monitor.observe([[1.0, -2.0]])
    with pytest.raises(ProblemError, match="2 speeds but|Cluster has 3 speeds"):
        monitor.speeds([1.0, 1.0, 1.0])
    options: tuple[tuple[dict[str, Any], str], ...] = (
        ({"trigger": "entropy"}, "one of regret, cosine, max-mean, got 'entropy'"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"patience": 0}, "patience must be a whole number from 1, got 0"),
        ({"cooldown": -1}, "cooldown must be"),
        ({"pool": 0}, "pool must be"),
    )
    for given, words in options:
        with pytest.raises(ProblemError, match=words):
            Monitor(start, current, **given)
    with pytest.raises(PlanError):
        Monitor(start, plan([0, 1, 0], [2, 1]))


def test_generated_drift_of_a_large_model_is_seen() -> None:
    start = generate((8, 256, 288, 32), 3).aggregate()
    later = generate((8, 256, 288, 32), 3, epoch=1).aggregate().loads.tokens[0]
    monitor = Monitor(start, solve(start, gap=1e-3).plan)
    shares = later / later.sum(axis=1, keepdims=True)
    assert [monitor.observe(each).action for each in drawn(shares, 51_200, 3)][-1] == "replan"
