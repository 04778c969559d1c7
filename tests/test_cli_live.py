"""The commands for running systems: migrate, watch, whatif."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace import cli
from moeplace.evaluate import evaluate
from moeplace.formats import read_plan, write_plan
from moeplace.instances import generate, read_instance, write_instance
from moeplace.migrate import migrate
from moeplace.solve import solve
from tests.test_cli import GOOD, PLAN, Run, plain_terminal, refused, run, saved

__all__ = ["plain_terminal", "run"]  # fixtures

SHAPE = (4, 32, 40, 8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An instance after drift, its loads before it, and plans for both."""
    folder = tmp_path_factory.mktemp("inputs")
    before, after = (generate(SHAPE, 1, epoch=epoch).aggregate() for epoch in (0, 1))
    names = {name: str(folder / f"{name}.json") for name in ("before", "after", "old", "new")}
    write_instance(before, names["before"])
    write_instance(after, names["after"])
    write_plan(solve(before, work_limit=10_000).plan, names["old"])
    write_plan(solve(after, work_limit=10_000).plan, names["new"])
    return names


@pytest.fixture
def files(inputs: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The inputs, and where to write."""
    return inputs | {"out": str(tmp_path / "out.json"), "stages": str(tmp_path / "stages.json")}


def test_migrate_to_a_given_plan(run: Run, files: dict[str, str]) -> None:
    found = run(
        "migrate", files["after"], files["old"], files["new"], "--expert-bytes", "1000",
        "--step-seconds", "0.1", "--out", files["out"], "--stages", files["stages"], "--json",
    )  # fmt: skip
    assert found.code == cli.OK
    answer = json.loads(found.out)
    old, new, target = (read_plan(files[name]) for name in ("old", "new", "out"))
    problem = read_instance(files["after"])
    moves = int(target.moves_from(old).sum())
    assert answer["moves"] == moves <= new.moves_from(old).sum()
    assert answer["bytes"] == 1000 * moves
    assert answer["after"] == evaluate(problem, target).objective
    assert answer["after"] <= evaluate(problem, new).objective * (1 + 1e-9)
    assert answer["payback"]["gain_seconds_per_step"] == pytest.approx(
        0.1 * (1 - answer["after"] / answer["before"])
    )
    written = json.loads(Path(files["stages"]).read_text())
    slots = old.slots.copy()
    for stage in written["list"]:
        for expert, source, rank, slot in stage["copies"]:
            assert slot // 5 == rank
            assert expert in old.slots[stage["layer"], 5 * source : 5 * source + 5]
            slots[stage["layer"], slot] = expert
        slots[stage["layer"], stage["emptied"]] = -1
    assert (slots == target.slots).all()
    text = run("migrate", files["after"], files["old"], files["new"]).out
    assert f"copies          {moves:,} (" in text
    assert "the instance's times are not seconds" in text


def test_migrate_within_a_budget(run: Run, files: dict[str, str]) -> None:
    base = ("migrate", files["after"], files["old"], "--time-limit", "0.05")
    found = run(*base, "--moves", "2", "--out", files["out"])
    assert found.code == cli.OK
    moved = read_plan(files["out"]).moves_from(read_plan(files["old"]))
    assert 0 < moved.sum(axis=1).max() <= 2
    answer = json.loads(run(*base, "--bytes", "5000", "--expert-bytes", "1000", "--json").out)
    assert answer["bytes"] <= 5000
    answer = json.loads(run(*base, "--step-seconds", "1", "--steps", "1e9", "--json").out)
    kept = [point["kept"] for point in answer["tradeoff"]]
    assert kept == sorted(kept)
    assert kept[-1] == 1.0
    assert answer["after"] == min(point["objective"] for point in answer["tradeoff"])
    for point in answer["tradeoff"]:
        assert point["lower_bound"] <= point["objective"]
    few = json.loads(
        run(*base, "--step-seconds", "1e-6", "--steps", "1", "--inter", "1", "--json").out
    )
    assert few["moves"] == 0  # nothing that moves pays


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--moves", "2", "--bytes", "5"), "two budgets"),
        (("NEW", "--moves", "2"), "give either"),
        (("NEW", "--expert-bytes", "0"), "--expert-bytes must be at least 1"),
        (("NEW", "--expert-bytes", "no-such-model"), "no such file"),
        (("NEW", "--engine", "trt"), "one of vllm, sglang"),
        (("NEW", "--intra", "-1"), "intra must be a finite number"),
        (("NEW", "--tolerance", "nan"), "tolerance"),
        (("NEW", "--steps", "-1"), "Steps must be a finite number from 0"),
        (("NEW", "--time-limit", "nan"), "time limit must be a finite number"),
        (("NEW", "--slowdown", "2"), "slowdown must be from 0 to 1"),
        (("--slowdown", "2", "--step-seconds", "1"), "slowdown must be from 0 to 1"),
        (("--moves", "-2"), "whole number of copies from 0"),
        (("OLD-OUT",), "must not overwrite"),
        (("small",), "one shape|other"),
    ],
)
def test_migrate_refuses(
    run: Run, files: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps(PLAN))
    named = {"NEW": (files["new"],), "OLD-OUT": (files["new"], "--out", files["old"])}
    named["small"] = (str(small),)
    given = [part for each in arguments for part in named.get(each, (each,))]
    before = Path(files["old"]).read_bytes()
    found = run("migrate", files["after"], files["old"], *given)
    assert found.code == cli.BAD_INPUT
    assert re.search(words, found.err), found.err
    assert found.out == ""
    assert Path(files["old"]).read_bytes() == before


def test_watch_once(run: Run, files: dict[str, str], tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    after = read_instance(files["after"]).loads.tokens[0]
    for n in range(5):
        np.save(dumps / f"d{n}.npy", after + n)
    (dumps / "d1b.json").write_text("{")
    arguments = (
        "watch", str(dumps), "--instance", files["before"], "--plan", files["old"],
        "--out", files["out"], "--once", "--time-limit", "0.05",
    )  # fmt: skip
    found = run(*arguments, "--json")
    assert found.code == cli.OK
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [line["action"] for line in lines] == ["keep", "keep", "skip", "replan", "keep", "keep"]
    assert Path(files["out"] + ".log.jsonl").read_text() == found.out
    new = read_plan(files["out"])
    problem = read_instance(files["after"])
    assert evaluate(problem, new).objective < evaluate(problem, read_plan(files["old"])).objective
    assert run(*arguments).out == ""  # all was seen
    np.save(dumps / "d9.npy", after)
    assert "d9.npy window 0: keep: regret" in run(*arguments).out


def test_watch_with_its_costs(run: Run, files: dict[str, str], tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    after = read_instance(files["after"]).loads.tokens[0]
    for n in range(3):
        np.save(dumps / f"d{n}.npy", after)
    base = (
        "watch", str(dumps), "--instance", files["before"], "--plan", files["old"],
        "--out", files["out"], "--once", "--time-limit", "0.05", "--expert-bytes", "44050944",
    )  # fmt: skip
    found = run(*base)
    assert found.code == cli.BAD_INPUT
    assert "step_seconds" in found.err
    found = run(*base, "--step-seconds", "0.01", "--steps", "1", "--intra", "0.1", "--json")
    last = json.loads(found.out.splitlines()[-1])
    assert last.get("moves", 0) == 0
    assert last["action"] == "replan" or "nothing pays" in last["reason"]
    Path(files["out"] + ".state.json").unlink()
    found = run(*base, "--step-seconds", "0.01", "--steps", "1e6", "--json")
    last = json.loads(found.out.splitlines()[-1])
    assert (last["action"], last["net_seconds"] > 0) == ("replan", True)
    assert last["moves"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"DIR": "nowhere"}, "is no folder"),
        ({"--trigger": "moon"}, "Trigger must be one of"),
        ({"--out": "INSTANCE"}, "must not overwrite"),
        ({"--plan": "nowhere"}, "no such file"),
        ({"--layers": "x"}, "FROM:TO"),
        ({"--layers": "1:3"}, "keeps 2 rows of a dump, the instance has 4 layers"),
        ({"--layers": "3:1"}, "keeps 0 rows"),
        ({"--format": "foo"}, "Load format 'foo' is unknown"),
        ({"--passes": "0"}, "Passes must be finite, above 0"),
        ({"--passes": "inf"}, "Passes must be finite, above 0"),
        ({"--engine": "foo"}, "one of vllm, sglang"),
        ({"--chunk": "2"}, "Chunks are SGLang's"),
        ({"--engine": "sglang", "--chunk": "0"}, "chunk must be a whole number from 1"),
        ({"--slowdown": "nan"}, "slowdown must be from 0 to 1"),
        ({"--moves": "-1"}, "--moves must be a whole number from 1"),
        ({"--time-limit": "nan"}, "time limit must be a finite number"),
        ({"--mode": "foo"}, "one of stall, slowed"),
        ({"--steps": "nan"}, "Steps must be a finite number from 0"),
        ({"--step-seconds": "nan"}, "Seconds of a step must be above 0"),
        ({"--settle": "nan"}, "Settle must be finite seconds"),
        ({"--interval": "nan"}, "--interval must be above 0, at most 1e6 seconds, got nan"),
        ({"--interval": "0"}, "--interval must be above 0, at most 1e6 seconds, got 0.0"),
        ({"--state": "OUT"}, "is given for two outputs"),
    ],
)
def test_watch_refuses(
    run: Run, files: dict[str, str], tmp_path: Path, change: dict[str, str], words: str
) -> None:
    given = {"--instance": files["before"], "--plan": files["old"], "--out": files["out"]}
    known = {"INSTANCE": files["before"], "OUT": files["out"]}
    given |= {option: known.get(value, value) for option, value in change.items()}
    folder = given.pop("DIR", str(tmp_path))
    found = run("watch", folder, "--once", *(part for pair in given.items() for part in pair))
    assert found.code == cli.BAD_INPUT
    assert words in found.err
    assert not list(tmp_path.iterdir())


def test_whatif(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "i.json")
    write_instance(generate(SHAPE, 1).aggregate(), path)
    found = run("whatif", path, "--time-limit", "1", "--json")
    assert found.code == cli.OK
    answers: list[dict[str, Any]] = json.loads(found.out)["answers"]
    assert answers[0]["change"] == 0
    for answer in answers:
        if answer["lower_bound"] is not None:
            assert answer["lower_bound"] <= answer["price"]
    text = run("whatif", path, "--time-limit", "1", "--decode", path).out
    assert "at best: proven" in text
    assert "decode: a placement of its own" in text
    assert run("whatif", path, "--time-limit", "0").code == cli.BAD_INPUT
    for most in ("0", "-3", "1000"):
        refused(run("whatif", path, "--slots-most", most), f"a whole number from .*got {most}")


def test_stages_reach_a_plan_that_an_engine_made(run: Run, tmp_path: Path) -> None:
    """Old maps may hold an expert twice on a rank."""
    problem = saved(tmp_path / "good.json", GOOD)
    twice = PLAN | {"slots": [[0, 1, 2, 2], [0, 1, 2, -1]], "allow_duplicates": True}
    current = saved(tmp_path / "current.json", twice)
    new = saved(tmp_path / "new.json", PLAN)
    found = run("migrate", problem, current, new, "--sum-windows", "--json")
    assert found.json["moves"] == 1
    assert migrate(read_plan(current), read_plan(new), expert_bytes=1).moves == 1
