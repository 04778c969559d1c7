"""The command line: answers on stdout, errors in a line on stderr, and an exit code for each.

Most tests call `main` in this process; a few start a true process, where streams, encodings and
signals matter.
"""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import cli, cli_price, cli_solve
from moeplace.claims import Bound
from moeplace.errors import CertificateError, SolverError
from moeplace.evaluate import evaluate
from moeplace.formats import read_plan, write_plan
from moeplace.instances import generate, read_instance, write_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import Result, Status
from moeplace.solve import METHODS, solve

ROOT = Path(__file__).resolve().parents[1]
TOY = str(ROOT / "instances/small/flashlb-even.json")
WEIGHTED = str(ROOT / "instances/small/flashlb-weighted.json")
QUICK = ("--work-limit", "1000")

GOOD: dict[str, Any] = {
    "format": "moeplace-instance",
    "version": 1,
    "name": "good",
    "cluster": {"speeds": [1, 0.5], "slots": [2, 2]},
    "loads": {"tokens": [[[5, 3, 2], [1, 1, 1]], [[4, 4, 2], [0, 1, 2]]]},
}
PLAN: dict[str, Any] = {
    "format": "moeplace-plan",
    "version": 1,
    "experts": 3,
    "rank_slots": [2, 2],
    "slots": [[0, 1, 2, 0], [0, 1, 2, -1]],
}
#: What every command's JSON has.
KEYS = {"status", "objective", "lower_bound", "gap", "methods"}


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        loaded: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return loaded

    def fact(self, label: str) -> str:
        found = re.search(rf"^{label} {{2,}}(.*)$", self.out, re.MULTILINE)
        assert found, f"no {label!r} in:\n{self.out}"
        return found[1]


Run = Callable[..., Answer]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's terminal settings do not matter."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "MOEPLACE_DEBUG", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Answer(leaving.value.code, out, err)

    return call


def process(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run the command as a process of its own."""
    environment = {**os.environ, **options.pop("env", {})}
    found = subprocess.run(
        [sys.executable, "-m", "moeplace.cli", *map(str, arguments)],
        env=environment,
        check=False,
        timeout=300,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )
    # Said once after installation, i.e. perhaps here.
    found.stderr = re.sub(rb"^compiling kernels.*\n", b"", found.stderr)
    return found


def saved(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(answer: Answer, message: str = "") -> None:
    """It is bad input: said in one clean message, and nothing else."""
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err
    assert re.search(message, answer.err), answer.err


# --- answers ---------------------------------------------------------------------------------


def test_the_console_script_is_main() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="moeplace")
    assert script.load() is cli.main


@pytest.mark.parametrize("method", METHODS)
def test_solve_says_what_it_found(run: Run, method: str) -> None:
    limit = ("--time-limit", "0.5") if method in ("highs", "gscip", "cbc") else QUICK
    answer = run("solve", TOY, "--method", method, *limit)
    if method == "eplb":  # two copies of one expert on a rank
        return refused(answer, "no legal plan here.*two replicas")
    assert answer.code == 0
    assert answer.err == ""
    assert answer.fact("shapes") == "1 window x 1 layer x 8 experts; 16 slots on 8 ranks"
    assert answer.fact("method") == method
    assert answer.fact("status") in ("feasible", "optimal", "within_gap")
    for label in ("step time", "lower bound", "gap", "wall time", "imbalance", "bound from"):
        assert answer.fact(label)
    for name in ("contiguous", "eplb", "eplb + speed-aware LPT", "vibe"):
        assert re.search(rf"^{re.escape(name)}", answer.out, re.MULTILINE)
    assert all(len(line) <= 80 for line in answer.out.split("\n"))
    return None


def test_auto_finds_the_known_optimum_of_the_toy(run: Run) -> None:
    even = run("solve", TOY, "--json").json
    assert even["objective"] == pytest.approx(590 / 3, rel=1e-12)
    weighted = run("solve", WEIGHTED, "--json").json
    assert weighted["objective"] == pytest.approx(181.25, rel=1e-9)
    assert weighted["status"] == "optimal"


def test_solve_in_json_is_one_object_and_nothing_else(run: Run) -> None:
    answer = run("solve", TOY, "--json", *QUICK)
    assert answer.code == 0
    assert answer.err == ""
    found = answer.json
    assert found.keys() >= KEYS | {
        *("instance", "method", "seconds", "work", "unit", "shapes", "digest", "imbalance"),
    }
    assert found["shapes"] == {"windows": 1, "layers": 1, "experts": 8, "slots": 16, "ranks": 8}
    assert found["unit"] == "token units"
    assert found["instance"] == TOY
    assert found["digest"] == read_instance(TOY).digest()
    assert [row["method"] for row in found["methods"]] == [
        *("contiguous", "eplb", "eplb_lpt", "vibe", "auto"),
    ]
    ours = found["methods"][-1]
    assert ours["objective"] == found["objective"]
    assert ours["imbalance"] == found["imbalance"]
    assert set(ours["imbalance"]) == {"total", "mean_layer", "worst_layer"}
    assert found["methods"][0]["moves"] == 0
    assert not found["methods"][1]["legal"]


def test_json_says_null_where_there_is_no_number(run: Run, tmp_path: Path) -> None:
    uneven = saved(tmp_path / "in.json", GOOD | {"cluster": {"speeds": [1, 1], "slots": [2, 1]}})
    rows = run("solve", uneven, "--json", *QUICK).json["methods"]
    eplb = next(row for row in rows if row["method"] == "eplb")
    assert eplb["objective"] is eplb["imbalance"] is eplb["moves"] is None
    assert "equal slots" in eplb["reason"]


def test_layers_without_tokens_take_no_time(run: Run, tmp_path: Path) -> None:
    empty = saved(tmp_path / "in.json", GOOD | {"loads": {"tokens": [[[0, 0, 0]]]}})
    found = run("solve", empty, "--json").json
    assert (found["status"], found["objective"], found["gap"]) == ("optimal", 0.0, 0.0)
    assert run("solve", empty).code == 0


def test_slots_beyond_use_stay_empty(run: Run, tmp_path: Path) -> None:
    roomy = saved(tmp_path / "in.json", GOOD | {"cluster": {"speeds": [1, 1], "slots": [9, 7]}})
    assert run("solve", roomy, *QUICK, "--out", tmp_path / "plan.json").code == 0
    plan = read_plan(tmp_path / "plan.json")
    assert (plan.slots == -1).sum(axis=1).min() >= 16 - 6


def test_zero_seconds_still_give_a_plan_and_its_bound(run: Run) -> None:
    found = run("solve", TOY, "--time-limit", "0", "--json").json
    assert found["objective"] >= found["lower_bound"] > 0


@pytest.mark.parametrize("instance", [TOY, WEIGHTED, "good", "generated"])
@pytest.mark.parametrize("summed", [(), ("--sum-windows",)])
@pytest.mark.parametrize("method", ["auto", "eplb_lpt"])
def test_solve_and_evaluate_agree_to_the_last_digit(
    run: Run, tmp_path: Path, instance: str, summed: tuple[str, ...], method: str
) -> None:
    out = tmp_path / "plan.json"
    if instance == "good":
        instance = str(saved(tmp_path / "in.json", GOOD | {"routing": "weighted"}))
    elif instance == "generated":
        instance = str(tmp_path / "in.json")
        write_instance(generate((3, 24, 32, 4), 0), instance)
    made = ("solve", instance, "--method", method, *QUICK, *summed)
    solved = run(*made, "--json", "--out", out).json
    priced = run("evaluate", instance, out, "--json", *summed).json
    for key in ("objective", "imbalance", "digest"):
        assert priced[key] == solved[key], key
    assert priced["lower_bound"] <= solved["lower_bound"], "a solve may prove more"
    solved_text, priced_text = run(*made), run("evaluate", instance, out, *summed)
    for label in ("step time", "imbalance"):
        assert priced_text.fact(label) == solved_text.fact(label)
    assert f"(exactly {solved['objective']!r})" in priced_text.fact("step time")


def test_the_same_inputs_give_the_same_plan(run: Run, tmp_path: Path) -> None:
    made = ("solve", TOY, *QUICK, "--seed", "3", "--quiet", "--out")
    for name, workers in (("a", 1), ("b", 2)):
        assert run(*made, tmp_path / name, "--workers", workers).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_start_is_never_made_worse(run: Run, tmp_path: Path) -> None:
    problem, start = read_instance(TOY), tmp_path / "start.json"
    write_plan(solve(problem).plan, start)
    found = run("solve", TOY, "--start", start, "--time-limit", "0", "--json").json
    assert found["objective"] <= evaluate(problem, read_plan(start)).objective


def test_quiet_prints_nothing(run: Run, tmp_path: Path) -> None:
    answer = run("solve", TOY, *QUICK, "--quiet", "--out", tmp_path / "plan.json")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert read_plan(tmp_path / "plan.json").experts == 8


def test_summed_windows_are_said_to_be_summed(run: Run, tmp_path: Path) -> None:
    good = saved(tmp_path / "in.json", GOOD)
    assert "2 windows into one" in run("solve", good, "--sum-windows", *QUICK).fact("summed")
    for command in ("solve", "compare", "bound"):
        assert run(command, good, "--sum-windows", "--json").json["shapes"]["windows"] == 1


def test_compare_prices_every_policy(run: Run) -> None:
    rows = run("compare", TOY, *QUICK, "--json").json["methods"]
    assert [row["method"] for row in rows] == [*POLICIES, "auto"]
    assert "round_robin" in run("compare", TOY, *QUICK).out


def test_the_table_shows_vibe_as_printed_where_it_does_not_fit(run: Run, tmp_path: Path) -> None:
    hot = saved(tmp_path / "in.json", GOOD | {"loads": {"tokens": [[[100, 1, 1, 1]]]}})
    answer = run("solve", hot, *QUICK)
    assert re.search(r"^vibe \(uncapped\) +n/a", answer.out, re.MULTILINE)
    assert "vibe (uncapped): 1 of 1 layers put more experts" in answer.out


def test_evaluate_says_how_good_a_plan_is(run: Run, tmp_path: Path) -> None:
    good = saved(tmp_path / "in.json", GOOD)
    answer = run("evaluate", good, saved(tmp_path / "plan.json", PLAN))
    assert answer.code == 0
    assert answer.fact("status") == "feasible"
    assert answer.fact("balancedness")
    found = run("evaluate", good, tmp_path / "plan.json", "--json").json
    assert found.keys() >= KEYS
    assert found["violations"] == []


def test_bytes_that_leave_rank_and_node_are_told_if_asked(run: Run, tmp_path: Path) -> None:
    here = saved(tmp_path / "in.json", GOOD)
    plan = saved(tmp_path / "plan.json", PLAN)
    options = ("--hidden", "100", "--top-k", "2")
    answer = run("evaluate", here, plan, *options)
    assert answer.fact("each token") == "800 bytes leave their rank, 0 their node"
    sent = {"off_rank_bytes_per_token": 800.0, "off_node_bytes_per_token": 0.0}
    assert run("evaluate", here, plan, *options, "--json").json["traffic"] == sent
    text = run("compare", here, *QUICK, *options).out
    assert re.search(r"bytes for each token +off rank +off node\ncontiguous +800 +0\n", text)
    told = run("compare", here, *QUICK, *options, "--json").json["traffic"]
    assert told["moeplace (auto)"] == sent
    refused(run("evaluate", here, plan, "--hidden", "0"), "--hidden must be a whole number from 1")
    refused(run("evaluate", here, plan, "--hidden", "9", "--top-k", "0"), "must be above 0")
    for top_k in ("99", "nan"):
        for command in (("evaluate", here, plan), ("compare", here)):
            refused(run(*command, "--top-k", top_k), rf"at most the \d+ experts .*got {top_k}")


def test_bound_is_proven_and_checked_again(run: Run) -> None:
    answer = run("bound", TOY)
    assert answer.code == 0
    assert answer.fact("lower bound").startswith("181.250 token units (exactly 181.2")
    assert answer.fact("bound from") == "fluid 1"
    assert answer.fact("checked").startswith("recomputed")
    found = run("bound", TOY, "--json").json
    assert found.keys() >= KEYS
    assert (found["fluid"], found["sources"], found["recomputed"]) == (181.25, {"fluid": 1}, True)


def test_a_generated_instance_needs_no_file(run: Run) -> None:
    found = run("bound", "generate:B:1", "--json").json
    assert found["digest"] == generate("B", 1).digest()
    found = run("bound", "generate:B:1:0.04", "--json").json
    assert found["digest"] == generate("B", 1, speeds=0.04).digest()


def test_help_names_commands_and_exit_codes(run: Run) -> None:
    answer = run("--help")
    assert answer.code == 0
    for text in ("solve", "compare", "evaluate", "bound", "Exit codes"):
        assert text in answer.out


def test_version(run: Run) -> None:
    answer = run("--version")
    said = f"moeplace {importlib.metadata.version('moeplace')}\n"
    assert (answer.code, answer.out) == (0, said)
    module = [sys.executable, "-m", "moeplace", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, cwd=ROOT).stdout == said


# --- bad input: exit code 2 --------------------------------------------------------------------


def loads(tokens: Any) -> dict[str, Any]:
    return GOOD | {"loads": {"tokens": tokens}}


def cluster(**change: Any) -> dict[str, Any]:
    return GOOD | {"cluster": GOOD["cluster"] | change}


INSTANCES: dict[str, tuple[Any, str]] = {
    "NaN loads": (json.dumps(loads([[[float("nan"), 1]]])).encode(), "NaN.*finite"),
    "infinite loads": (json.dumps(loads([[[float("inf"), 1]]])).encode(), "finite"),
    "loads beyond a float": (json.dumps(loads([[[1, 7]]])).replace("7", "1e999").encode(), ""),
    "negative loads": (loads([[[1, -2]]]), "at least 0.*-2.*expert 1"),
    "absurdly large loads": (loads([[[1, 1e300]]]), "1e\\+300"),
    "absurdly large sum": (loads([[[2**53, 2**53]]]), "2\\*\\*53"),
    "ragged loads": (loads([[[1, 2], [3]]]), "same length"),
    "empty loads": (loads([]), "empty"),
    "no experts": (loads([[[]]]), "empty"),
    "text loads": (loads([[["many"]]]), "tokens\\[0\\]\\[0\\]\\[0\\]"),
    "loads without layers": (loads([1, 2]), "tokens"),
    "zero speed": (cluster(speeds=[1, 0]), "Speeds.*rank 1"),
    "negative speed": (cluster(speeds=[-1, 1]), "Speeds.*rank 0"),
    "too many speeds": (cluster(speeds=[1, 1, 1]), "3 speeds but 2 slots"),
    "no speeds": (cluster(speeds=[], slots=[]), "empty"),
    "negative slots": (cluster(slots=[2, -1]), "slots"),
    "too few slots": (cluster(slots=[1, 1]), "3 experts do not fit.*2 usable slots"),
    "slots on too few ranks": (cluster(slots=[2, 0]), "do not fit"),
    "too much base load": (GOOD | {"base_load": [1, float("1e300")]}, "Base load"),
    "a pin to nowhere": (
        GOOD | {"constraints": [{"type": "pin", "expert": 9, "rank": 0}]},
        "expert 9",
    ),
    "an unknown routing": (GOOD | {"routing": "fast"}, "routing.*even.*weighted"),
    "an unknown field": (GOOD | {"speed": 3}, "unknown field.*speed"),
    "an unknown version": (GOOD | {"version": 99}, "version is 99"),
    "another format": (PLAN, "moeplace-plan"),
    "broken JSON": (b'{"format": "moeplace-instance", "version"', "whole JSON"),
    "a deep array": (b"[" * 100_000 + b"]" * 100_000, ""),
    "deep loads": (json.dumps(loads(["?"])).replace('"?"', "[" * 9999 + "]" * 9999).encode(), ""),
    "a binary file": (b"\x93NUMPY\x01\x00\xff\xfe" * 50, "not UTF-8"),
    "an empty file": (b"", "is empty"),
    "an array": ([1, 2], "object"),
}
SHARES = [[0.5, 1, 1, 0.5], [1, 1, 1, 0]]
PLANS: dict[str, tuple[Any, str]] = {
    "misses an expert": (
        PLAN | {"slots": [[0, 1, 0, 1], [0, 1, 2, -1]]},
        "misses expert 2.*layer 0",
    ),
    "an unknown expert": (PLAN | {"slots": [[0, 1, 2, 3], [0, 1, 2, 0]]}, "3.*layer 0"),
    "a duplicate": (PLAN | {"slots": [[0, 0, 1, 2], [0, 1, 2, 0]]}, "expert 0 twice on rank 0"),
    "shares that miss 1": (
        PLAN | {"split": [[0.5, 1, 1, 0.4], SHARES[1]]},
        "expert 0 sum to 0.9.*layer 0",
    ),
    "a share of nothing": (PLAN | {"split": [SHARES[0], [1, 1, 1, 0.5]]}, "EMPTY slot.*layer 1"),
    "a negative share": (PLAN | {"split": [[1.5, 1, 1, -0.5], SHARES[1]]}, "Shares"),
    "too few layers": (PLAN | {"slots": [[0, 1, 2, 0]]}, "1 layers but the problem has 2"),
    "other slots": (PLAN | {"rank_slots": [3, 1]}, "slots per rank"),
    "other experts": (PLAN | {"experts": 2, "slots": [[0, 1, 0, 1]] * 2}, "2 experts"),
    "too few slots": (PLAN | {"slots": [[0, 1, 2], [0, 1, 2]]}, "3 slots a layer"),
    "an unknown version": (PLAN | {"version": 2}, "version is 2"),
    "an instance": (GOOD, "moeplace-instance"),
    "broken JSON": (b'{"format"', "whole JSON"),
    "a deep array": (b"[" * 100_000, ""),
    "a binary file": (b"PK\x03\x04\xff\xff", "not UTF-8"),
}


@pytest.mark.parametrize("command", ["solve", "compare", "bound"])
@pytest.mark.parametrize(("content", "message"), INSTANCES.values(), ids=INSTANCES)
def test_a_bad_instance_is_refused(
    run: Run, tmp_path: Path, command: str, content: Any, message: str
) -> None:
    path = saved(tmp_path / "in.json", content)
    refused(run(command, path), message)
    refused(run(command, path, "--json"), "in.json: ")


@pytest.mark.parametrize(("content", "message"), INSTANCES.values(), ids=INSTANCES)
def test_an_output_survives_a_bad_instance(
    run: Run, tmp_path: Path, content: Any, message: str
) -> None:
    out = saved(tmp_path / "plan.json", b"precious")
    path = saved(tmp_path / "in.json", content)
    refused(run("solve", path, "--out", out), message)
    refused(run("solve", path, "--out", tmp_path / "new.json"), message)
    assert out.read_bytes() == b"precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.json", "plan.json"]


@pytest.mark.parametrize(("content", "message"), PLANS.values(), ids=PLANS)
def test_a_bad_plan_is_refused(run: Run, tmp_path: Path, content: Any, message: str) -> None:
    good = saved(tmp_path / "in.json", GOOD | {"routing": "weighted"})
    plan = saved(tmp_path / "bad.json", content)
    out = saved(tmp_path / "plan.json", b"precious")
    refused(run("evaluate", good, plan), message)
    refused(run("evaluate", good, plan, "--json"), message)
    refused(run("solve", good, "--start", plan, "--out", out), message)
    assert out.read_bytes() == b"precious"


def test_shares_are_refused_under_even_routing(run: Run, tmp_path: Path) -> None:
    plan = saved(tmp_path / "plan.json", PLAN | {"split": SHARES})
    refused(run("evaluate", saved(tmp_path / "in.json", GOOD), plan), "routing is even")


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_a_plan_that_breaks_a_rule_is_priced_and_ends_with_2(
    run: Run, tmp_path: Path, flag: tuple[str, ...]
) -> None:
    rules = [{"type": "forbid", "expert": 0, "rank": 0}, {"type": "pin", "expert": 1, "rank": 1}]
    barred = saved(tmp_path / "in.json", GOOD | {"constraints": rules})
    answer = run("evaluate", barred, saved(tmp_path / "plan.json", PLAN), *flag)
    assert answer.code == 2
    assert "breaks 4 rules" in answer.err
    if flag:
        assert answer.json["status"] == "illegal"
        assert answer.json["gap"] is None
        assert len(answer.json["violations"]) == 4
    else:
        assert answer.fact("status") == "illegal"
        assert answer.out.count("breaks a rule: layer") == 4


def test_a_published_map_with_duplicates_is_priced_and_ends_with_2(
    run: Run, tmp_path: Path
) -> None:
    write_plan(POLICIES["eplb"](read_instance(TOY)), tmp_path / "plan.json")
    answer = run("evaluate", TOY, tmp_path / "plan.json")
    assert answer.code == 2
    assert answer.fact("step time") == "232.000 token units (exactly 232.0)"
    assert "two replicas" in answer.err


@pytest.mark.parametrize("command", ["solve", "compare", "bound", "evaluate"])
@pytest.mark.parametrize("name", ["absent.json", ".", "absent/in.json", ""])
def test_a_missing_file_is_refused(run: Run, tmp_path: Path, command: str, name: str) -> None:
    path = tmp_path / name if name else ""
    plan = (saved(tmp_path / "plan.json", PLAN),) if command == "evaluate" else ()
    refused(run(command, path, *plan), "no such file|folder|empty path")


def test_an_output_that_is_an_input_is_refused(run: Run, tmp_path: Path) -> None:
    good = saved(tmp_path / "in.json", GOOD)
    start = saved(tmp_path / "start.json", PLAN)
    link = tmp_path / "link.json"
    link.symlink_to(good)
    before = good.read_bytes(), start.read_bytes()
    for out in (good, link, tmp_path / "." / "in.json"):
        refused(run("solve", good, "--out", out), "must not overwrite an input")
    refused(run("solve", good, "--start", start, "--out", start), "must not overwrite an input")
    assert (good.read_bytes(), start.read_bytes()) == before


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_solve, "find", None)  # not reached
    good = saved(tmp_path / "in.json", GOOD)
    refused(run("solve", good, "--out", tmp_path / "absent" / "plan.json"), "no folder")
    refused(run("solve", good, "--out", tmp_path), "is a folder")
    refused(run("solve", good, "--out", good / "plan.json"), "not a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown method": (("solve", TOY, "--method", "magic"), "one of auto, cp-sat.*'magic'"),
    "negative time": (("solve", TOY, "--time-limit", "-1"), "time limit.*-1"),
    "time that is no number": (("solve", TOY, "--time-limit", "nan"), "time limit.*nan"),
    "negative work": (("solve", TOY, "--work-limit", "-5"), "work limit.*-5"),
    "work in parts": (("solve", TOY, "--work-limit", "1.5"), "--work-limit"),
    "negative gap": (("solve", TOY, "--gap", "-0.1"), "gap.*-0.1"),
    "negative seed": (("solve", TOY, "--seed", "-1"), "seed.*-1"),
    "no workers": (("solve", TOY, "--workers", "0"), "workers.*0"),
    "workers in words": (("solve", TOY, "--workers", "two"), "--workers"),
    "negative time in compare": (("compare", TOY, "--time-limit", "-1"), "time limit"),
    "start for a policy": (
        ("solve", TOY, "--method", "vibe", "--start", "plan.json"),
        "cannot start from a plan",
    ),
    "unknown option": (("solve", TOY, "--fast"), "No such option"),
    "unknown command": (("resolve", TOY), "No such command"),
    "no instance": (("solve",), "INSTANCE"),
    "no plan": (("evaluate", TOY), "PLAN"),
    "too many files": (("solve", TOY, TOY), "unexpected"),
    "option without value": (("solve", TOY, "--out"), "--out"),
    "unknown shape": (("bound", "generate:Z:0"), "Shape 'Z' is unknown"),
    "seed in words": (("bound", "generate:A:zero"), "generate:SHAPE:SEED"),
    "no seed": (("bound", "generate:A"), "generate:SHAPE:SEED"),
    "too much to generate": (("bound", "generate:A:0:het:1"), "drop the rest"),
    "unknown speeds": (("bound", "generate:A:0:fast"), "Speeds 'fast'"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    refused(run(*arguments), message)


def test_no_command_shows_the_help_on_stderr(run: Run) -> None:
    answer = run()
    assert (answer.code, answer.out) == (2, "")
    assert "Usage: moeplace" in answer.err


def test_messages_escape_what_a_terminal_would_obey(run: Run) -> None:
    answer = run("bound", "absent\x1b[31m.json")
    refused(answer, r"absent\\x1b\[31m")
    assert "\x1b" not in answer.err


def test_names_from_a_file_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    odd = saved(tmp_path / "in.json", GOOD | {"name": "[bold]\x1b[2J\n:smile: caf\u00e9"})
    for answer in (run("solve", odd, *QUICK), run("bound", odd)):
        assert answer.fact("instance") == r"[bold]\x1b[2J\n:smile: café"


# --- the other exit codes ------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [(), ("--json",), ("--quiet",)])
def test_3_if_no_plan_can_exist(run: Run, tmp_path: Path, flag: tuple[str, ...]) -> None:
    rules = [{"type": kind, "expert": 1, "rank": 0} for kind in ("pin", "forbid")]
    clash = saved(tmp_path / "in.json", GOOD | {"constraints": rules})
    out = tmp_path / "plan.json"
    answer = run("solve", clash, "--out", out, *flag)
    assert answer.code == 3
    assert re.search("error: infeasible: .*expert 1 is pinned to rank 0", answer.err)
    assert not out.exists()
    if flag == ("--json",):
        assert answer.json["status"] == "infeasible"
        assert answer.json["objective"] is answer.json["gap"] is None
        assert "pinned" in answer.json["reason"]
    elif not flag:
        assert answer.fact("status") == "infeasible"
        assert "pinned" in answer.fact("reason")


def unfinished(status: Status, keep: bool) -> Callable[..., Result]:
    def find(problem: Problem, *arguments: Any, **options: Any) -> Result:
        result = solve(problem, "eplb_lpt")
        return replace(result, status=status, evaluation=result.evaluation if keep else None)

    return find


def test_4_if_no_plan_was_found_in_time(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_solve, "find", unfinished(Status.NONE_IN_TIME, keep=False))
    out = saved(tmp_path / "plan.json", b"precious")
    answer = run("solve", TOY, "--out", out)
    assert answer.code == 4
    assert "none_in_time" in answer.err
    assert out.read_bytes() == b"precious"


def test_5_if_a_bound_does_not_follow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(problem: Problem) -> Bound:
        return Bound(per_layer=np.array([[300.0]]), source=np.array([["fluid"]]), total=300.0)

    monkeypatch.setattr(cli_price, "lower_bound", claim)
    answer = run("bound", TOY)
    assert (answer.code, answer.out) == (5, "")
    assert re.search("error: Bound 300.0 of window 0, layer 0 does not follow", answer.err)


def test_130_if_interrupted_with_the_plan_so_far_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def stop(quiet: bool, unit: str) -> Iterator[Callable[[object], None]]:
        def interrupt(progress: object) -> None:
            raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr(cli_solve, "searching", stop)
    out = tmp_path / "plan.json"
    answer = run("solve", TOY, "--gap", "0", "--out", out, "--json")
    assert answer.code == 130
    assert answer.json["status"] == "interrupted"
    assert answer.err == "error: interrupted\n"
    problem = read_instance(TOY)
    assert evaluate(problem, read_plan(out)).objective == answer.json["objective"]


def test_130_if_interrupted_before_there_is_a_plan(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_solve, "find", interrupt)
    answer = run("solve", TOY)
    assert (answer.code, answer.out, answer.err) == (130, "", "error: interrupted\n")


FAILURES = [
    (RuntimeError("boom"), "unexpected RuntimeError: boom.*MOEPLACE_DEBUG=1"),
    (SolverError("the bound is above the plan"), "the bound is above the plan"),
    (MemoryError(), "out of memory"),
    (OSError(28, "No space left on device"), "operating system refused.*No space left"),
]


@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_1_for_a_failure_of_our_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(cli_solve, "find", fail)
    answer = run("solve", TOY)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error: ")
    assert re.search(message, answer.err)
    assert "Traceback" not in answer.err
    monkeypatch.setenv("MOEPLACE_DEBUG", "1")
    assert "Traceback" in run("solve", TOY).err


def test_a_certificate_error_anywhere_is_5(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise CertificateError("claim 3 does not follow")

    monkeypatch.setattr(cli_solve, "find", fail)
    assert run("solve", TOY).code == 5


# --- progress, streams and encodings -------------------------------------------------------------


def test_a_process_answers_as_main_does(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    found = process("solve", TOY, "--method", "eplb_lpt", "--out", out, "--json")
    assert (found.returncode, found.stderr) == (0, b"")
    solved = json.loads(found.stdout)
    assert solved["objective"] == 232.0
    found = process("evaluate", TOY, out, "--json")
    assert json.loads(found.stdout)["objective"] == solved["objective"]
    found = process("solve", tmp_path / "absent.json")
    assert (found.returncode, found.stdout) == (2, b"")
    assert found.stderr.startswith(b"error: ")


def test_plain_terminals_get_plain_text(tmp_path: Path) -> None:
    odd = saved(tmp_path / "in.json", GOOD | {"name": "caf\u00e9 \u4e13\u5bb6"})
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "NO_COLOR": "1", "TERM": "dumb"}
    found = process("solve", odd, "--method", "vibe", env=ascii_only)
    assert (found.returncode, found.stderr) == (0, b"")
    text = found.stdout.decode("ascii")
    assert "\x1b" not in text
    assert r"caf\xe9 \u4e13\u5bb6" in text
    found = process("solve", tmp_path / "caf\u00e9.json", env=ascii_only)
    assert found.returncode == 2
    assert b"Traceback" not in found.stderr


def test_colour_can_be_forced_and_refused() -> None:
    coloured, plain = (
        process("solve", TOY, "--method", "vibe", env=env)
        for env in ({"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": ""}, {"NO_COLOR": "1"})
    )
    assert b"\x1b[1;32mvibe" in coloured.stdout
    assert b"\x1b" not in plain.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="pipes break with a signal here only")
def test_a_reader_that_leaves_is_no_failure() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stream:
        found = process("bound", TOY, stdout=stream)
    assert (found.returncode, found.stderr) == (0, b"")


def test_a_plan_is_whole_or_absent(tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    def fail(plan: Plan, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_solve, "write_plan", fail)
    out = saved(tmp_path / "plan.json", b"precious")
    assert run("solve", TOY, *QUICK, "--out", out).code == 1
    assert out.read_bytes() == b"precious"


def test_names_beside_a_model_never_overwrite_the_instance(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "model.json"
    source.write_bytes(Path(TOY).read_bytes())
    answer = run("export", str(source), "--model", "lp", "--out", str(tmp_path / "model.lp"))
    assert answer.code == 2
    assert "must not overwrite an input" in " ".join(answer.err.split())
    assert source.read_bytes() == Path(TOY).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
