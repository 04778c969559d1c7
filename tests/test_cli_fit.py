import json
from pathlib import Path

import numpy as np

import moeplace as mp
from moeplace.cli_fit import SHOWN
from moeplace.hardware import Cluster
from moeplace.profile import write_profile
from tests.test_cli import TOY, Run, plain_terminal, refused, run
from tests.test_fit import made_up, profile, totals

__all__ = ["plain_terminal", "run"]  # fixtures


def trace(path: Path) -> str:
    s = made_up(0.005, gpus=3)
    rows = zip(s.gpu, s.tokens, s.activated, s.seconds, strict=True)
    text = "".join(f"{g},{n},{a},{t}\n" for g, n, a, t in rows)
    path.write_text("rank,tokens,activated,seconds\n" + text)
    return str(path)


def test_a_trace_is_fitted(run: Run, tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.csv")
    found = run("fit", path)
    assert found.code == 0
    assert "rank 2" in found.out
    assert "left out, mean" in found.out
    answer = json.loads(run("fit", path, "--json").out)
    (one,) = answer["fits"]
    assert [gpu["tied"] for gpu in one["gpus"]] == [0, 0, 1]
    assert one["mean_error"] < 0.01
    assert len(one["planes"]["startup"]) == 2


def test_long_lists_are_cut(run: Run, tmp_path: Path) -> None:
    """Each second time falls: the text shows some of them, the JSON all."""
    rows = "".join(f"0,{n},4,{n * (2 - n % 2) * 1e-6}\n" for n in range(1, 61))
    path = tmp_path / "t.csv"
    path.write_text("rank,tokens,activated,seconds\n" + rows)
    text = run("fit", str(path), "--model", "plane").out
    falls = json.loads(run("fit", str(path), "--model", "plane", "--json").out)["fits"][0]["falls"]
    assert text.count("Falls: ") == SHOWN < len(falls)
    assert f"And {len(falls) - SHOWN} more falls: see --json." in text


def test_all_models_are_compared(run: Run, tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.csv")
    answer = json.loads(run("fit", path, "--model", "all", "--json").out)
    error = {one["model"]: one["mean_error"] for one in answer["fits"]}
    assert list(error) == ["speed", "offset", "plane", "hinges", "planes", "table"]
    assert error["planes"] < error["plane"] < error["speed"]
    assert run("fit", path, "--model", "all").code == 0


def test_totals_are_fitted(run: Run, tmp_path: Path) -> None:
    tokens, seconds, activated = totals(np.array([1.0, 1.1, 1.0]), 200)
    rows = [
        f"{p},{g},{tokens[p, g]},{activated[p, g]},{seconds[p]}\n"
        for p in range(200)
        for g in range(3)
    ]
    path = tmp_path / "totals.csv"
    path.write_text("pass,rank,tokens,activated,seconds\n" + "".join(rows))
    refused(run("fit", str(path)), "same seconds for all ranks of each pass.*--passive")
    answer = json.loads(run("fit", str(path), "--passive", "--json").out)
    assert [rank["tied"] for rank in answer["ranks"]] == [0, 1, 0]
    assert "was slowest" in run("fit", str(path), "--passive").out


def test_a_profile_is_fitted_and_planned_with(run: Run, tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "profile.json")
    file = str(tmp_path / "profile.json")
    assert "GPU-2" in run("fit", file).out
    assert run("fit", file, "--phase", "decode").code == 2
    loads = mp.LoadHistogram(tokens=[[[900.0, 500, 300, 300, 10, 10]]], passes=[2.0])  # type: ignore[arg-type]
    one = mp.Problem(loads, Cluster.from_speeds([1, 1, 1], 3, speed_unit="relative"))
    mp.write_instance(one, tmp_path / "one.json")
    solve = ("solve", str(tmp_path / "one.json"), "--profile", file, "--work-limit", "1000")
    answer = json.loads(run(*solve, "--latency", "planes", "--json").out)
    assert answer["unit"] == "s"
    assert answer["lower_bound"] <= answer["objective"] < 1e-2
    refused(run(*solve, "--latency", "cubic"), "--latency must be one of speed, .*'cubic'")
    refused(run("solve", TOY, "--latency", "cubic"), "--latency must be one of speed")
    refused(run("solve", TOY, "--latency", "planes"), "give --profile too")


def test_bad_files_end_with_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for arguments in (
        ("fit", str(tmp_path / "x.csv")),
        ("fit", str(tmp_path / "none.csv")),
        ("fit", str(tmp_path / "x.csv"), "--model", "cubic"),
        ("fit", str(tmp_path / "x.csv"), "--passive"),
        ("fit", str(tmp_path / "x.csv"), "--phase", "tea"),
    ):
        found = run(*arguments)
        assert found.code == 2, arguments
        assert "Traceback" not in found.err


def test_a_plan_is_priced_over_random_batches(run: Run, tmp_path: Path) -> None:
    loads = mp.LoadHistogram(tokens=[[[9.0, 5, 3, 3]]], passes=[1.0])  # type: ignore[arg-type]
    one = mp.Problem(loads, Cluster.from_planes([1e-5], [1e-5], [1e-6], [1, 1], 2))
    mp.write_instance(one, tmp_path / "one.json")
    mp.write_plan(mp.solve(one).plan, tmp_path / "plan.json")
    files = (str(tmp_path / "one.json"), str(tmp_path / "plan.json"))
    assert "random batches" in run("evaluate", *files, "--batches", "32").out
    answer = json.loads(run("evaluate", *files, "--batches", "32", "--json").out)
    assert answer["batches"]["count"] == 32
    assert answer["batches"]["objective"] > answer["objective"]
