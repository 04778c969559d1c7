"""Suites of live systems, cut to tiny cases."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import bench_live, instances, robust
from moeplace.bench import SUITES, markdown
from moeplace.bench_live import TRIGGERS
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve

INSTANCES = Path(__file__).resolve().parents[1] / "instances"
TINY = (2, 32, 40, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Few seeds, few steps, tiny shapes; gives the seeds that were asked for."""
    seeds: set[int] = set()

    def generate(shape: Any, seed: int, **options: Any) -> Problem:
        seeds.add(seed)
        return instances.generate(TINY, seed, **options)

    def quick(*arguments: Any, **options: Any) -> Result:
        options.pop("time_limit", None)
        return solve(*arguments, **options | {"work_limit": 2000})

    monkeypatch.setattr(bench_live, "generate", generate)
    monkeypatch.setattr(bench_live, "SEEDS", (100,))
    for module in (bench_live, robust):
        monkeypatch.setattr(module, "solve", quick)
    return seeds


def test_drift_has_a_row_for_each_trigger_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_live, "ASSIGNMENTS", (5_120,))
    rows = [
        bench_live._compared(INSTANCES, name, 5_120, trigger, options)
        for name in ("V2-Lite: another task", "A: drift 0.25 at once")
        for trigger, options in TRIGGERS
    ]
    told = {(row["load"], row["trigger"]): row for row in rows}
    never = told["V2-Lite: another task", "never"]
    assert never["delay, windows"] == "never"
    assert never["GB moved"] == "0"
    ours = told["V2-Lite: another task", "regret"]
    assert ours["delay, windows"] == "3"
    assert float(ours["above the bound"][:-1]) < float(never["above the bound"][:-1]) / 2
    assert markdown("drift", rows).count("\n") == 8 + len(rows)


def test_false_alarms_are_counted_on_a_load_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_live, "STILL", 60)
    row = bench_live._compared(INSTANCES, "V2-Lite: no change", 5_120, *TRIGGERS[1])
    assert row["false alarms in 1,000"] == "0"
    assert "delay, windows" not in row
    eager = {"trigger": "max-mean", "threshold": 1.0, "cooldown": 0}
    row = bench_live._compared(INSTANCES, "V2-Lite: no change", 5_120, "eager", eager)
    assert row["false alarms in 1,000"] == "60"


def test_loads_of_a_stream_are_what_they_are_called() -> None:
    streams = {stream.name: stream for stream in bench_live._streams(INSTANCES, 100)}
    assert len(streams) == 7
    mixed = streams["V2-Lite: 20 % of another task"]
    before, after = mixed.shares(bench_live.BEFORE - 1), mixed.shares(bench_live.BEFORE)
    one, two = (LoadHistogram(tokens=1e6 * shares) for shares in (before, after))
    assert 0 < one.distance(two).max() < 0.05  # what cosine misses
    slow = streams["V2-Lite: one GPU 10 % slower"]
    assert (slow.speeds(0) == 1).all()
    assert sorted(slow.speeds(bench_live.BEFORE)) == [0.9] + [1.0] * 7
    for stream in streams.values():
        np.testing.assert_allclose(stream.shares(50).sum(axis=1), 1.0)


def test_real_moves_and_robust_tables(small: set[int]) -> None:
    real = list(islice(SUITES["drift-real"](INSTANCES), 5))
    assert [row["trigger"] for row in real] == [name for name, _ in TRIGGERS[1:]]
    assert real[0]["re-plans after windows"].startswith("10")
    moves = list(islice(SUITES["moves"](INSTANCES), 3))
    assert [row["copies a layer"] for row in moves] == ["stay", "0", "4"]
    assert moves[0]["share of the gain"] == "0.0%"
    tables = list(islice(SUITES["robust"](INSTANCES), 7))
    assert [row["against the sum"] for row in tables if row["planned on"] == "sum"] == ["+0.0%"] * 2
    assert small == {100}
