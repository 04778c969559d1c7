"""Following a folder: order, bad and half-written dumps, restarts, what is written."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import watch as module
from moeplace.drift import Monitor
from moeplace.errors import FormatError, ProblemError
from moeplace.evaluate import evaluate
from moeplace.formats import read_plan
from moeplace.instances import read_instance
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.profile import Profile, write_profile
from moeplace.replan import Economy
from moeplace.solve import solve
from moeplace.transfer import Links
from moeplace.watch import Watch
from tests.test_profile import entry

REAL = Path(__file__).resolve().parents[1] / "instances" / "real"
ECONOMY = Economy(
    expert_bytes=17_301_504, links=Links(intra=1e11, inter=1e11), steps=1e5, step_seconds=0.02
)


@pytest.fixture(scope="module")
def start() -> tuple[Problem, Plan, Any]:
    """DeepSeek-V2-Lite: a plan for the first four windows, and all sixteen."""
    whole = read_instance(REAL / "dsv2lite-windows_8x9_equal.json")
    seen = LoadHistogram(tokens=whole.loads.tokens[:4]).aggregate()
    problem = replace(whole, loads=seen, window_weight=None)
    return problem, solve(problem, gap=1e-4).plan, whole.loads.tokens


class Folder:
    """A folder of dumps with a watch on it."""

    def __init__(self, path: Path, start: tuple[Problem, Plan, Any]) -> None:
        self.dumps, self.path = path / "dumps", path
        self.dumps.mkdir()
        self.problem, self.plan, self.tokens = start
        self.out, self.log = path / "plan.json", path / "log.jsonl"
        self.state = path / "state.json"

    def watch(self, **options: Any) -> Watch:
        monitor = Monitor(self.problem, self.plan, cooldown=3)
        options = {"economy": ECONOMY, "time_limit": 0.1} | options
        return Watch(
            folder=self.dumps, monitor=monitor, out=self.out, state=self.state, log=self.log,
            **options,
        )  # fmt: skip

    def dump(self, window: int, name: str = "") -> Path:
        path = self.dumps / (name or f"dump_{window}.npy")
        np.save(path, self.tokens[window])
        return path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, start: tuple[Problem, Plan, Any]) -> Folder:
    return Folder(tmp_path, start)


def test_a_shift_is_followed_and_the_plan_written(folder: Folder) -> None:
    watch = folder.watch()
    for window in range(4, 16):
        folder.dump(window)
    heard: list[dict[str, Any]] = []
    assert watch.poll(heard.append, settled=True) == 12
    assert watch.poll(settled=True) == 0
    assert heard == folder.lines()
    assert [line["file"] for line in heard] == [f"dump_{n}.npy" for n in range(4, 16)]
    assert [line["n"] for line in heard] == list(range(1, 13))
    assert heard[6]["action"] == "replan"  # windows 8, 9, 10 were from another task
    assert {line["action"] for line in heard[:6]} == {"keep"}
    assert heard[6]["moves"] > 0
    assert heard[6]["bytes"] == heard[6]["moves"] * ECONOMY.expert_bytes
    assert heard[6]["net_seconds"] > 0
    assert heard[6]["saves"] > 0.1
    written = read_plan(folder.out)
    later = replace(folder.problem, loads=LoadHistogram(tokens=folder.tokens[8:]).aggregate())
    assert evaluate(later, written).objective < 0.9 * evaluate(later, folder.plan).objective


def test_a_restart_goes_on_where_it_was(folder: Folder, tmp_path_factory: Any) -> None:
    """A run cut into pieces says and writes the same as one run."""
    whole = Folder(tmp_path_factory.mktemp("whole"), (folder.problem, folder.plan, folder.tokens))
    options = {"time_limit": None, "budgets": (4,)}
    watch = whole.watch(**options)
    for window in range(4, 13):
        whole.dump(window)
        folder.dump(window)
        folder.watch(**options).poll(settled=True)
    watch.poll(settled=True)

    def said(of: Folder) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "time"} for line in of.lines()]

    assert said(folder) == said(whole)
    assert folder.out.read_bytes() == whole.out.read_bytes()
    assert "replan" in {line["action"] for line in said(folder)}


@pytest.mark.parametrize("step", ["write_plan", "_append"])
def test_a_crash_between_writes_is_completed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    watch = folder.watch(economy=None)
    for window in range(8, 11):
        folder.dump(window)
    calls = []

    def crash(*_: Any) -> None:
        calls.append(None)
        if step == "write_plan" or len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        if step == "write_plan":
            broken.setattr(module, step, crash)
        else:
            broken.setattr(Watch, step, crash)
        with pytest.raises(KeyboardInterrupt):
            watch.poll(settled=True)
    if step == "_append":
        folder.log.write_text('{"n": 1, "file": "dump_8.npy"}\n{"n": 2}\n{"n": 3, "fi')
    assert folder.watch(economy=None).poll(settled=True) == 0
    assert [line["n"] for line in folder.lines()] == [1, 2, 3]
    assert folder.lines()[-1]["action"] == "replan"
    assert (read_plan(folder.out).slots != folder.plan.slots).any()


def test_bad_dumps_are_logged_and_passed_over(folder: Folder) -> None:
    folder.dump(4, "a_1.npy")
    (folder.dumps / "a_2.npy").write_bytes(b"\x93NUMPY nonsense")
    (folder.dumps / "a_3.json").write_text("[[1, 2")
    np.save(folder.dumps / "a_4.npy", np.ones((3, 5)))
    np.save(folder.dumps / "a_5.npy", -folder.tokens[5])
    np.save(folder.dumps / "a_6.npy", 0 * folder.tokens[5])
    (folder.dumps / "a_7.npy").write_bytes(b"")
    (folder.dumps / ".hidden").write_text("no")
    (folder.dumps / "sub").mkdir()
    folder.dump(5, "a_10.npy")
    watch = folder.watch()
    assert watch.poll(settled=True) == 8
    lines = folder.lines()
    assert [line["action"] for line in lines] == ["keep", *["skip"] * 4, "keep", "skip", "keep"]
    assert lines[-1]["file"] == "a_10.npy"
    assert "26 x 64" in lines[3]["reason"]
    assert lines[5]["reason"] == "the window holds no tokens"
    assert not folder.out.exists()


def test_bad_dumps_are_read_again_when_the_options_change(folder: Folder) -> None:
    (folder.dumps / "0.json").write_text("{")
    folder.dump(4)
    wrong: dict[str, Any] = {"format": "sglang", "layers": None}
    assert folder.watch(options=wrong).poll(settled=True) == 2
    assert folder.watch(options=wrong).poll(settled=True) == 0
    assert folder.watch().poll(settled=True) == 2
    assert [line["action"] for line in folder.lines()] == ["skip", "skip", "skip", "keep"]
    assert folder.watch().poll(settled=True) == 0
    state = json.loads(folder.state.read_text())
    del state["reading"]  # as older ones are
    folder.state.write_text(json.dumps(state))
    assert folder.watch().poll(settled=True) == 1


def test_half_written_dumps_are_waited_for(folder: Folder) -> None:
    watch = folder.watch(settle=3600.0)
    path = folder.dump(4)
    folder.dump(5)
    os.utime(folder.dumps / "dump_5.npy", (0, 0))
    assert watch.poll() == 0  # the later one, though old, waits for the earlier one
    os.utime(path, (0, 0))
    assert watch.poll() == 2
    half = folder.dumps / "dump_6.npy"
    half.write_bytes(path.read_bytes()[:500])
    assert watch.poll() == 0
    assert watch.poll(settled=True) == 1
    assert folder.lines()[-1]["action"] == "skip"
    half.write_bytes(path.read_bytes())  # finished after all
    assert folder.watch().poll(settled=True) == 1
    assert folder.lines()[-1]["action"] == "keep"
    os.utime(folder.dump(7), (2e9, 2e9))  # a clock that is ahead
    watch = folder.watch(settle=0.0)
    assert watch.poll() == 1


def test_decisions_of_policies_in_engines_are_followed(folder: Folder) -> None:
    (folder.dumps / "moeplace-observe.json").write_text('{"format": "moeplace-observe"}')
    watch = folder.watch(economy=None)
    assert watch.poll(settled=True) == 0
    model = folder.dumps / "26x64-72-8"
    model.mkdir()
    for n in range(3):
        np.savez(
            model / f"{n + 1:08d}.npz", weight=folder.tokens[8 + n], about=np.array("{}"),
            copies=np.zeros(26),
        )  # fmt: skip
    (model / "00000004.npz").write_bytes((model / "00000003.npz").read_bytes()[:900])
    assert watch.poll(settled=True) == 4
    assert [line["action"] for line in folder.lines()] == ["keep", "keep", "replan", "skip"]
    (folder.dumps / "another").mkdir()
    with pytest.raises(FormatError, match="several models"):
        watch.poll(settled=True)


def test_a_folder_that_goes_away_may_come_back(folder: Folder) -> None:
    watch = folder.watch()
    folder.dumps.rmdir()
    assert watch.poll(settled=True) == 0
    folder.dumps.mkdir()
    folder.dump(4)
    assert watch.poll(settled=True) == 1


def test_nothing_moves_that_does_not_pay(folder: Folder) -> None:
    for window in range(8, 12):
        folder.dump(window)
    slow = Links(intra=1e6, inter=1e6)
    folder.watch(economy=replace(ECONOMY, steps=1.0, links=slow)).poll(settled=True)
    asked = folder.lines()[2]
    assert asked.get("moves", 0) == 0  # copies given up cost nothing, so that may still pay
    assert asked["action"] == "replan" or "nothing pays: at most" in asked["reason"]


def test_what_does_not_pay_is_said_and_not_written(folder: Folder) -> None:
    for window in range(8, 12):
        folder.dump(window)
    folder.watch(economy=replace(ECONOMY, steps=0.0)).poll(settled=True)
    asked = folder.lines()[2]
    assert asked["action"] == "keep"
    assert "nothing pays: at most" in asked["reason"]
    assert "in cooldown" in folder.lines()[3]["reason"]
    assert not folder.out.exists()


def test_new_speeds_are_read_when_the_profile_changes(folder: Folder) -> None:
    profile = folder.path / "profile.json"
    profile.write_text("{}")
    watch = folder.watch(profile=profile, economy=None)
    watch.poll(settled=True)
    watch.poll(settled=True)
    entries = [entry(f"GPU-{n}", 1.25 if n == 3 else 1.0, rank=n) for n in range(8)]
    write_profile(Profile(entries=entries), profile)
    for window in range(4, 8):
        folder.dump(window)
    watch.poll(settled=True)
    assert [line["action"] for line in folder.lines()[:2]] == ["skip", "speeds"]
    assert 0.8 < float(folder.lines()[1]["reason"].split()[-1]) < 0.9
    assert folder.lines()[4]["action"] == "replan"
    written = read_plan(folder.out)
    slow = evaluate(watch.monitor.now, written).rank_tokens[0, :, 3]
    assert slow.sum() < evaluate(watch.monitor.now, folder.plan).rank_tokens[0, :, 3].sum()


def test_other_instances_states_and_folders_are_refused(folder: Folder) -> None:
    folder.dump(4)
    folder.watch().poll(settled=True)
    other = replace(folder.problem, layer_weight=np.full(26, 2.0))
    with pytest.raises(ProblemError, match="is of another instance"):
        Watch(
            folder=folder.dumps, monitor=Monitor(other, folder.plan), out=folder.out,
            state=folder.state, log=folder.log,
        )  # fmt: skip
    state = json.loads(folder.state.read_text())
    del state["monitor"]["slots"]
    folder.state.write_text(json.dumps(state))
    with pytest.raises(FormatError, match="is damaged"):
        folder.watch()
    folder.state.write_text("{")
    with pytest.raises(FormatError, match="state"):
        folder.watch()
    folder.dumps = folder.path / "nowhere"
    with pytest.raises(FormatError, match="is no folder"):
        folder.watch()


def test_names_are_ordered_by_their_numbers() -> None:
    names = ["dump_10.pt", "dump_9.pt", "r_17.45.pt", "r_17.5.pt", "a.npy", "10.npy", "9.npy"]
    order = ["9.npy", "10.npy", "a.npy", "dump_9.pt", "dump_10.pt", "r_17.45.pt", "r_17.5.pt"]
    assert sorted(names, key=module._natural) == order
