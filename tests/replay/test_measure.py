"""Replays of true ranks: what the report says, where ranks take turns, and the two modes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moeplace.errors import ProblemError, ReplayError
from moeplace.formats import write_plan
from moeplace.hardware import Cluster
from moeplace.instances import write_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.replay import Runtime, TokenRouting, replay_plans
from moeplace.replay.report import correlation, text

SLOTS = np.array([[0, 1, 2, 0, 3, -1]])
PROBLEM = Problem(
    LoadHistogram(tokens=np.array([[[40.0, 30, 20, 10]], [[10.0, 30, 20, 40]]])),
    Cluster.from_speeds([1, 0.5], slots=3, speed_unit="relative"),
    routing="weighted",
)
EVEN = Plan(slots=SLOTS, rank_slots=np.array([3, 3]), experts=4)
WEIGHTED = EVEN.with_split(np.array([[0.75, 1, 1, 0.25, 1, 0]]))


@pytest.fixture
def one_core() -> Iterator[None]:
    """Fewer cores than ranks, for this process and those that it starts."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system cannot pin a process to a core")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_more_ranks_than_cores_take_turns_and_their_waits_are_computed(one_core: None) -> None:
    runtime = Runtime(ranks=2, emulate=(1, 2.5), hidden=64, device="cpu", timeout=100)
    found = replay_plans(
        PROBLEM, [("even", EVEN), ("weighted", WEIGHTED)], runtime, tokens=400, rounds=3, window=0
    )
    assert found is not None
    assert (found.label, found.waits, found.mode) == ("cpu-emulated", "computed", "attributed")
    assert [plan.name for plan in found.plans] == ["even", "weighted"]
    even, weighted = found.plans
    assert even.rank_tokens == pytest.approx(
        [560, 240], abs=2
    )  # of 800: half of expert 0, and experts 1 and 2
    assert weighted.rank_tokens == pytest.approx([640, 160], abs=2)
    assert even.rank_activated == [3, 2]
    for plan in (*found.plans, found.control):
        assert plan.makespan_cpu_seconds == plan.makespan_seconds > 0
        assert plan.makespan_wall_seconds is plan.rank_wall_seconds is None
        assert plan.rank_cpu_seconds is not None
        assert plan.rank_wait_seconds is not None
        assert min(plan.rank_wait_seconds) >= 0
        assert plan.prediction is not None
        assert plan.prediction.unit == "token units"
        assert plan.prediction.over_measured is None
    assert weighted.prediction is not None
    assert weighted.prediction.makespan == pytest.approx(640)  # 160 tokens at half speed: 320
    assert weighted.prediction.slowest_rank == 0
    assert found.outputs_differ < 1e-5
    assert [(pair.plan, pair.control) for pair in found.pairs] == [
        ("weighted", False),
        ("even", True),
    ]
    for pair in found.pairs:
        assert pair.quartiles[0] <= pair.ratio <= pair.quartiles[1]
    assert found.pairs[0].predicted == pytest.approx(640 / 560)
    assert json.loads(json.dumps(found.to_json()))["plans"][1]["name"] == "weighted"
    printed = text(found)
    assert "took turns" in printed
    assert "A again" in printed
    assert all(len(line) <= 80 for line in printed.split("\n"))
    with pytest.raises(ReplayError, match="Fused mode needs a processor core for each rank"):
        replay_plans(PROBLEM, [("even", EVEN)], runtime, tokens=8, rounds=3, mode="fused")


def test_fused_mode_runs_a_trace_and_knows_no_waits() -> None:
    ids = np.array([[[0, 1], [1, 2], [0, 3], [0, 2], [0, 1]]])
    trace = TokenRouting(experts_of=ids, experts=4, layers=(0,), source="trace of mine")
    runtime = Runtime(ranks=2, hidden=32, device="cpu", dtype="bfloat16", kernel="grouped")
    found = replay_plans(PROBLEM, [("even", EVEN)], runtime, trace, rounds=3, mode="fused")
    assert found is not None
    assert (found.waits, found.routing, found.kernel) == (None, "trace of mine", "grouped")
    (plan,) = found.plans
    assert plan.rank_wait_seconds is None
    assert sum(plan.rank_tokens) == 10
    assert plan.layer_wall_seconds > 0


def test_under_torchrun_rank_0_alone_answers(tmp_path: Path) -> None:
    write_instance(PROBLEM, tmp_path / "in.json")
    write_plan(WEIGHTED, tmp_path / "plan.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = [str(tmp_path / "in.json"), str(tmp_path / "plan.json")]
    options = ["--tokens", "16", "--hidden", "32", "--rounds", "3", "--device", "cpu", "--json"]
    found = subprocess.run(
        [sys.executable, *launcher, "-m", "moeplace.replay", *files, *options],
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["ranks"] == 2  # one object, not one for each rank


def test_shares_by_window_need_a_window() -> None:
    split = np.broadcast_to(np.array([[0.75, 1, 1, 0.25, 1, 0]]), (2, 1, 6))
    runtime = Runtime(ranks=2, device="cpu")
    with pytest.raises(ProblemError, match="say which one to replay"):
        replay_plans(PROBLEM, [("mine", EVEN.with_split(split))], runtime)


def test_the_correlation_of_ranks() -> None:
    one = np.array([[1.0, 2], [5, 3]])
    assert correlation(one, one**3) == pytest.approx(1)
    assert correlation(one, -one) == pytest.approx(-1)
    assert correlation(one, np.ones((2, 2))) is None


def test_torch_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, moeplace, moeplace.replay, moeplace.cli_replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
