"""What goes wrong is said once and clearly, and leaves no process behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace.replay.settings as settings
from moeplace.cli import main
from moeplace.errors import MissingExtraError, PlanError, ProblemError, ReplayError
from moeplace.formats import write_plan
from moeplace.hardware import Cluster
from moeplace.instances import write_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.replay import Runtime, calibrate_ranks, replay_plans
from moeplace.replay.settings import check_memory

PLAN = Plan(slots=np.arange(8)[None], rank_slots=np.array([4, 4]), experts=8)
PROBLEM = Problem(
    LoadHistogram(tokens=np.full((1, 1, 8), 10.0)),
    Cluster.from_speeds([1, 1], slots=4, speed_unit="relative"),
)
MARK = "MOEPLACE_TEST_MARK"


def children(mark: str) -> list[int]:
    """Processes that carry the mark in their environment, this one aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if int(folder.name) != os.getpid() and state != "Z":
                    found.append(int(folder.name))
        except OSError:  # gone, or not ours
            continue
    return found


@pytest.fixture
def no_orphans(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    mark = f"{os.getpid()}-{request.node.name}"
    monkeypatch.setenv(MARK, mark)
    yield mark
    until = time.monotonic() + 5
    while children(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert children(mark) == []


def replay(kernel: str = "loop", ranks: int = 2, **more: Any) -> None:
    options: dict[str, Any] = {"hidden": 32, "device": "cpu", "timeout": 60.0} | more
    runtime = Runtime(ranks=ranks, kernel=kernel, **options)
    replay_plans(PROBLEM, [("plan", PLAN)], runtime, tokens=8, rounds=3)


def test_a_rank_that_is_killed(no_orphans: str) -> None:
    began = time.monotonic()
    with pytest.raises(ReplayError, match=r"^Rank 1 was killed \(signal SIGKILL.*was stopped\.$"):
        replay("tests.replay.jobs:killed")
    assert time.monotonic() - began < 50


def test_a_rank_that_raises(no_orphans: str) -> None:
    with pytest.raises(ReplayError, match="^Rank 1 failed: ValueError: the moon is in the wrong"):
        replay("tests.replay.jobs:broken")


def test_a_rank_that_never_ends(no_orphans: str) -> None:
    with pytest.raises(ReplayError, match=r"did not end within 5 s.*--timeout"):
        replay("tests.replay.jobs:stuck", timeout=5.0)


def test_a_kernel_that_is_not_there() -> None:
    from moeplace.replay.kernels import load

    with pytest.raises(ProblemError, match="^Kernel 'tests.replay.jobs:none' cannot be imported"):
        load("tests.replay.jobs:none")
    with pytest.raises(ProblemError, match="'os:sep' is not a function"):
        load("os:sep")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("narrow", r"outputs \[rows, hidden\] as tokens are, \(\d+, 32\) .* got \(\d+, 16\)"),
        ("wide", r"of torch.float32, got .* of torch.float64"),
        ("silent", "a tensor, got a NoneType"),
        ("none", "^Kernel 'tests.replay.jobs:none' cannot be imported"),
    ],
)
def test_a_kernel_that_breaks_its_contract(
    kernel: str, message: str, tmp_path: Path, no_orphans: str
) -> None:
    name = f"tests.replay.jobs:{kernel}"
    with pytest.raises(ProblemError, match=message):
        replay(name)
    runtime = Runtime(ranks=1, kernel=name, hidden=32, device="cpu", timeout=60.0)
    with pytest.raises(ProblemError, match=message):
        calibrate_ranks(runtime, tmp_path / "p.json", slots=2, tokens=[4], soak=0.0, seconds=0.0)
    assert not list(tmp_path.iterdir())


def test_ranks_end_with_a_parent_that_is_killed(
    no_orphans: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they remove what it left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = "from tests.replay.test_failures import replay; replay('tests.replay.jobs:stuck')"
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    until = time.monotonic() + 30
    while len(children(no_orphans)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(children(no_orphans)) == 3
    assert len(list(tmp_path.glob("moeplace-*"))) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()  # then the fixture sees that its ranks end
    until = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ReplayError, match=rf"Port {port} .*already in use.*another --port"):
            replay(port=port)


def test_a_taken_port_that_only_the_rank_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun, where no parent looks first."""
    from moeplace.replay import launch

    monkeypatch.setattr(launch, "_check_port", lambda port: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ReplayError, match=rf"port of tcp://127.0.0.1:{port} is taken"):
            replay(port=port, timeout=20.0)


def test_a_plan_for_another_number_of_ranks() -> None:
    with pytest.raises(ProblemError, match="Plans for 2 ranks cannot run on 3"):
        replay(ranks=3)


def test_a_plan_for_another_cluster() -> None:
    other = Plan(slots=np.arange(8)[None], rank_slots=np.array([3, 5]), experts=8)
    runtime = Runtime(ranks=2, device="cpu")
    with pytest.raises(PlanError, match=r"^mine: Plan has \[3, 5\] slots per rank"):
        replay_plans(PROBLEM, [("mine", other)], runtime)


def test_more_memory_than_there_is_is_refused_before_it_is_taken(no_orphans: str) -> None:
    with pytest.raises(ReplayError, match=r"would need about [\d.e+]+ GiB but has [\d.]+ GiB free"):
        replay(hidden=1 << 17, intermediate=1 << 17)


def test_the_estimate_leaves_a_tenth() -> None:
    check_memory(90, 101, "It", "")
    check_memory(1 << 60, None, "It", "")
    with pytest.raises(ReplayError, match="It would need about"):
        check_memory(95, 101, "It", "")


def test_torch_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moeplace\[replay\]'"):
        replay()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emulate": (1.0,)}, "one factor for each of the 2 ranks, got 1"),
        ({"emulate": (1.0, float("nan"))}, "from 1 to 64.*got nan for rank 1"),
        ({"emulate": (1.0, 0.5)}, "from 1 to 64.*got 0.5 for rank 1"),
        ({"hidden": 36}, "multiple of 8.*got 36. Take 32"),
        ({"kernel": "fast"}, "auto, grouped, loop or module:function"),
        ({"dtype": "int8"}, "Dtype must be one of"),
        ({"device": "tpu"}, "Device must be one of"),
        ({"timeout": 0.0}, "positive number of seconds"),
        ({"port": 70000}, "Port must be from 0"),
        ({"seed": -1}, "Seed must be a whole number from 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Runtime(ranks=2, **options)


def test_bad_input_to_the_commands_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_instance(PROBLEM, tmp_path / "in.json")
    write_plan(PLAN, tmp_path / "plan.json")
    files = [str(tmp_path / "in.json"), str(tmp_path / "plan.json")]
    other = Plan(slots=np.arange(8)[None], rank_slots=np.array([3, 5]), experts=8)
    write_plan(other, tmp_path / "other.json")
    calibrate = ["calibrate", "--out", str(tmp_path / "profile.json")]
    for options, message in (
        (["--ranks", "0"], "error: Ranks must be a whole number from 1, got 0."),
        (["--ranks", "3"], "error: Plans for 2 ranks cannot run on 3: the world size must"),
        (["--emulate", "1,two"], "error: --emulate must be float numbers separated by commas"),
        (["--emulate", "1,nan"], "error: Emulated slowness must be from 1 to 64"),
        (["--emulate", "1,2,3"], "error: Emulation needs one factor for each of the 2 ranks"),
        (["--tokens", "0"], "error: Tokens must be a whole number from 1, got 0."),
        (["--draw", "foo"], "error: Draw must be one of exact, sampled"),
        (["--kernel", "x"], "error: Kernel must be auto, grouped, loop or module:function"),
        ([str(tmp_path / "other.json")], "error: " + str(tmp_path / "other.json") + ": Plan has"),
        ([*calibrate, "--ranks", "0"], "error: Ranks must be a whole number from 1, got 0."),
        ([*calibrate, "--phase", "foo"], "error: Phase must be one of prefill, decode, mixed"),
        ([*calibrate, "--tokens", "0"], "error: Tokens must be a whole number from 1, got 0."),
        ([*calibrate, "--ranks", "2", "--emulate", "1"], "error: Emulation needs one factor"),
        (["--mode", "both"], "error: Mode must be one of attributed, fused, got 'both'."),
        (["--rounds", "1"], "error: Rounds must be a whole number from 3, got 1."),
        (["--window", "4"], "error: Window must be from 0 to 0"),
        (["--top-k", "9"], "error: Layer 0 has load on 8 experts but tokens go to 9"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(options if options[0] == "calibrate" else ["replay", *files, *options])
        out, err = capsys.readouterr()
        assert (leaving.value.code, out) == (2, "")
        assert err.startswith(message), err
        assert err.count("\n") == 1


def test_only_rank_0_says_what_all_ranks_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_instance(PROBLEM, tmp_path / "in.json")
    write_plan(PLAN, tmp_path / "plan.json")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, said in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as leaving:
            main(["replay", str(tmp_path / "in.json"), str(tmp_path / "plan.json")])
        assert leaving.value.code == 2
        assert capsys.readouterr().err.count("Plans for 2 ranks cannot run on 4") == said
